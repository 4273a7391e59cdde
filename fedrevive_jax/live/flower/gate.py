"""What of a SuperLink can be reached from outside: the door for nodes, and nothing else.

    python -m fedrevive_jax.live.flower.gate HOST:PORT SUPERLINK_PORT AUTHORITY CERTIFICATE KEY

Flower's SuperLink serves its three interfaces on one port. The one for nodes asks for a registered
key. The one for control asks for none in the open-source package: whoever can speak to it may
register a key of his own, and run code of his choice. So the SuperLink listens on loopback, and
this process passes on what is meant for the first.
"""

import re
import ssl
import sys

import httpx
import uvicorn

LOOPBACK = "127.0.0.1"
# The whole path, as it came: nothing that is decoded, or climbs, can mean another one.
ALLOWED = re.compile(rb"/v1/fleet/[a-z-]{1,64}")
# Headers that are about one connection, not about what passes through.
_OF_CONNECTION = {
    b"connection", b"host", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
    b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)


class Gate:
    """An ASGI application that passes requests of nodes on and refuses all others."""

    def __init__(self, client: httpx.AsyncClient):
        self._client = client

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            return None
        path = scope.get("raw_path") or scope["path"].encode()
        if scope["method"] != "POST" or scope["query_string"] or not ALLOWED.fullmatch(path):
            return await _tell(send, 404)
        request = self._client.build_request(
            "POST",
            path.decode(),
            headers=[(k, v) for k, v in scope["headers"] if k.lower() not in _OF_CONNECTION],
            content=_body(receive),
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError:
            return await _tell(send, 502)
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": response.status_code,
                    "headers": [
                        (k.lower(), v)
                        for k, v in response.headers.raw
                        if k.lower() not in _OF_CONNECTION
                    ],
                }
            )
            async for block in response.aiter_raw():
                await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()
        return None


async def _lifespan(receive, send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _body(receive):
    """The request's body, block by block."""
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the node has gone
            raise httpx.ReadError("the request was not sent to its end")
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _tell(send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def main(address: str, port: str, authority: str, certificate: str, key: str) -> None:
    host, _, own_port = address.rpartition(":")
    context = ssl.create_default_context(cafile=authority)
    client = httpx.AsyncClient(
        base_url=f"https://{LOOPBACK}:{port}", verify=context, timeout=_TIMEOUT, trust_env=False
    )
    uvicorn.run(
        Gate(client),
        host=host,
        port=int(own_port),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        server_header=False,
        access_log=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
