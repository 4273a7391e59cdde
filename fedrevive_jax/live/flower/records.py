"""Messages as Flower carries them: a header in JSON, and one array of bytes.

One array, because each of Flower's objects is a request of its own. No pickle, and no `.npy`
either: the array is taken as the bytes that it is.
"""

import json

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedrevive_jax.live.link import Message

_HEADER, _BODY = "header", "body"


def to_record(message: Message) -> RecordDict:
    """A message as Flower's content."""
    header = json.dumps({**message.header, "kind": message.kind})
    record = RecordDict({_HEADER: ConfigRecord({"json": header})})
    if message.body:
        array = Array("uint8", (len(message.body),), "bytes", message.body)
        record[_BODY] = ArrayRecord({_BODY: array})
    return record


def from_record(record: RecordDict) -> Message:
    """The message in what came.

    Raises:
      ValueError: there is none.
    """
    try:
        header = json.loads(record.config_records[_HEADER]["json"])  # type: ignore[arg-type]
        kind = str(header.pop("kind"))
        body = record.array_records[_BODY][_BODY].data if _BODY in record.array_records else b""
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no message of this package ({error!r})") from None
    return Message(kind, header, body)
