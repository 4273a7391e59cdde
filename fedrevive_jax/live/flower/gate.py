"""What of a SuperLink can be reached from outside: the door for nodes, and nothing else.

    python -m fedrevive_jax.live.flower.gate HOST:PORT SUPERLINK_PORT KEYS AUTHORITY CERTIFICATE KEY

Flower's SuperLink serves its three interfaces on one port. The one for nodes asks for a registered
key. The one for control asks for none in the open-source package: whoever can speak to it may
register a key of his own, and run code of his choice. So the SuperLink listens on loopback, and
this process passes on what is meant for the first.

Flower reads a whole request before it asks who sent it, and never forgets a key. So the gate looks
first, at the headers alone: a request is passed on if one of the public keys in the folder KEYS has
signed it just now. Whose key is taken away stays outside from the next start on.
"""

import asyncio
import base64
import binascii
import re
import ssl
import sys
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvicorn
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

LOOPBACK = "127.0.0.1"
# The whole path, as it came: nothing that is decoded, or climbs, can mean another one.
ALLOWED = re.compile(rb"/v1/fleet/[a-z-]{1,64}")
# Headers that are about one connection, not about what passes through.
_OF_CONNECTION = {
    b"connection", b"host", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
    b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
# Seconds in which a node sends its next block, and in which the SuperLink answers.
IDLE = 60.0
_TIMEOUT = httpx.Timeout(IDLE, connect=5.0, pool=IDLE)
# Flower's own objects are cut into blocks of 20 MB; nothing else of a node is as large.
LARGEST = 1 << 28
# Seconds that the clocks of a node and of this machine may differ; Flower is stricter.
SKEW = 60.0


class Gate:
    """An ASGI application that passes requests of nodes on and refuses all others."""

    def __init__(self, client: httpx.AsyncClient, keys: dict[bytes, ec.EllipticCurvePublicKey]):
        """Passes requests on to a client's base address if one of the keys, by their PEM, has
        signed them."""
        self._client, self._keys = client, keys

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            return None
        path = scope.get("raw_path") or scope["path"].encode()
        if scope["method"] != "POST" or scope["query_string"] or not ALLOWED.fullmatch(path):
            return await _tell(send, 404)
        headers = dict(scope["headers"])
        if not self._is_member(headers):
            return await _tell(send, 401)
        if not headers.get(b"content-length", b"").isdigit():
            return await _tell(send, 411)
        if int(headers[b"content-length"]) > LARGEST:
            return await _tell(send, 413)
        request = self._client.build_request(
            "POST",
            path.decode(),
            # Those that were looked at, each once.
            headers=[(k, v) for k, v in headers.items() if k.lower() not in _OF_CONNECTION],
            content=_body(receive),
        )
        try:
            response = await self._client.send(request, stream=True)
        except (httpx.HTTPError, TimeoutError):
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

    def _is_member(self, headers: dict[bytes, bytes]) -> bool:
        """Whether one of the keys has signed the time of the request, and that is now."""
        try:
            pem, signature = (
                base64.b64decode(headers[name], validate=True)
                for name in (b"flwr-public-key", b"flwr-signature")
            )
            told = headers[b"flwr-timestamp"]
            now, sent = datetime.now(UTC), datetime.fromisoformat(told.decode("ascii"))
            if abs((now - sent).total_seconds()) > SKEW:
                return False
            self._keys[pem].verify(signature, told, ec.ECDSA(hashes.SHA256()))
        except (LookupError, ValueError, TypeError, binascii.Error, InvalidSignature):
            return False
        return True


def keys_in(folder: Path) -> dict[bytes, ec.EllipticCurvePublicKey]:
    """The public keys in a folder, *.pub in OpenSSH's form, by their PEM as nodes send it."""
    found = {}
    for path in sorted(folder.glob("*.pub")):
        key = serialization.load_ssh_public_key(path.read_bytes())
        assert isinstance(key, ec.EllipticCurvePublicKey), path
        pem = key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        found[pem] = key
    return found


async def _lifespan(receive, send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _body(receive):
    """The request's body, block by block."""
    while True:
        message = await asyncio.wait_for(receive(), IDLE)
        if message["type"] != "http.request":  # the node has gone
            raise httpx.ReadError("the request was not sent to its end")
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _tell(send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def main(address: str, port: str, keys: str, authority: str, certificate: str, key: str) -> None:
    host, _, own_port = address.rpartition(":")
    context = ssl.create_default_context(cafile=authority)
    client = httpx.AsyncClient(
        base_url=f"https://{LOOPBACK}:{port}",
        verify=context,
        timeout=_TIMEOUT,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        trust_env=False,
    )
    uvicorn.run(
        Gate(client, keys_in(Path(keys))),
        host=host,
        port=int(own_port),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        limit_concurrency=4096,
        server_header=False,
        access_log=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
