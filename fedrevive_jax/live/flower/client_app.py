"""What Flower starts for every message to a client: hands it to the client's trainer.

The trainer listens at a socket in the file system, see `live.trainer`; its path is in the
environment. Nothing of JAX is imported here.
"""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedrevive_jax.live import wire
from fedrevive_jax.live.flower import records
from fedrevive_jax.live.link import Message as Order

app = ClientApp()


@app.query()
@app.train()
def pass_on(message: Message, context: Context) -> Message:
    """Asks the trainer; what it cannot do becomes an error of the message."""
    del context
    order = records.from_record(message.content)
    header, body = wire.ask(
        os.environ[wire.SOCKET], {**order.header, "kind": order.kind}, order.body
    )
    if "error" in header:
        raise RuntimeError(header["error"])
    answer = Order(str(header.pop("kind")), header, body)
    return Message(records.to_record(answer), reply_to=message)
