"""Messages over a socket between processes of one machine: a header in JSON, and a block of bytes.

No more than Python is imported here, so that a short-lived process pays for nothing else.
"""

import json
import socket
import struct
from typing import Any

# The environment variable that holds the path of a trainer's socket.
SOCKET = "FEDREVIVE_TRAINER"
_LENGTHS = struct.Struct("<QQ")
LONGEST_HEADER = 1 << 24
LONGEST_BODY = 1 << 36


class ClosedError(ConnectionError):
    """The other side has closed the socket in the midst of a message, or before one."""


def send(stream: socket.socket, header: dict[str, Any], body: bytes = b"") -> None:
    """Sends one message."""
    text = json.dumps(header).encode()
    stream.sendall(_LENGTHS.pack(len(text), len(body)) + text)
    if body:  # who has all it waits for may have closed already
        stream.sendall(body)


def receive(stream: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Waits for one message: (header, body).

    Raises:
      ClosedError: there is none.
      ValueError: it is longer than any, or its header is no JSON object.
    """
    header_length, body_length = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    if header_length > LONGEST_HEADER or body_length > LONGEST_BODY:
        raise ValueError("a message is longer than any can be")
    header = json.loads(bytes(_exactly(stream, header_length)))
    if not isinstance(header, dict):
        raise ValueError("a header is no JSON object")
    return header, bytes(_exactly(stream, body_length))


def ask(path: str, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """Sends a message to a socket in the file system and waits for the answer.

    Raises:
      OSError: nobody listens there, or the other side is gone.
    """
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(path)
        send(stream, header, body)
        return receive(stream)


def _exactly(stream: socket.socket, count: int) -> bytearray:
    block = bytearray(count)
    view, start = memoryview(block), 0
    while start < count:
        got = stream.recv_into(view[start:])
        if not got:
            raise ClosedError("the other side has closed the connection")
        start += got
    return block
