"""What trains on a client's machine: one long-lived process with the client's data and programs.

    python -m fedrevive_jax.live.trainer SOCKET OPTIONS.json

Whatever carries the messages starts short-lived processes for them, which would pay for JAX, the
data and the compilation each time. They hand a message over at a socket in the file system and wait
for the answer.
"""

import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax import data
from fedrevive_jax.clients import feed as feeds
from fedrevive_jax.clients.local_training import make_window_trainer
from fedrevive_jax.compute import devices
from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.config import Config
from fedrevive_jax.data import partition
from fedrevive_jax.data.partition import Shards
from fedrevive_jax.errors import ConfigError, UserError
from fedrevive_jax.live import packing, settings, wire
from fedrevive_jax.live.link import PREPARE, Message
from fedrevive_jax.messages import Download
from fedrevive_jax.models import judging, t5_weights
from fedrevive_jax.running.runner import settle
from fedrevive_jax.server import builder

_LOG = logging.getLogger(__name__)


class Options(NamedTuple):
    """What a client decides itself.

    Attributes:
      config: names the data set and where it lies, pretrained weights, and how to compute.
      part: the client's number where several on this machine share one data set between them, by
        `config.partition`; None: all of the training split is this client's.
      pause: seconds that each job takes longer, to play a slow client.
    """

    config: Config
    part: int | None = None
    pause: float = 0.0

    def to_json(self) -> str:
        return json.dumps({**self._asdict(), "config": self.config.as_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Options":
        given = json.loads(text)
        return cls(Config(**given["config"]), given["part"], given["pause"])


class _Ready(NamedTuple):
    """A client that knows its settings: their digest, its data and its programs."""

    digest: str
    config: Config
    template: Any
    store: Any
    labels: jax.Array
    shards: Shards
    train: jax.stages.Wrapped


class Trainer:
    """Answers the messages of a server."""

    def __init__(self, options: Options):
        self._options = options
        self._ready: _Ready | None = None

    def answer(self, message: Message) -> Message:
        """Prepares itself, or trains a job.

        Raises:
          UserError: it cannot; the message is for the server's log, too.
          ValueError: what came are not the parameters of the model.
        """
        if message.kind == PREPARE:
            return self._prepare(message)
        ready = self._ready
        header = message.header
        if ready is None or header.get("settings") != ready.digest:
            raise UserError("not prepared for these settings")
        began = time.monotonic()
        base = jax.device_put(packing.unpack(ready.template, message.body))
        upload = self._trained(ready, base, int(header["job"]), int(header["visit"]))
        body = packing.pack(upload)
        time.sleep(self._options.pause)
        seconds = time.monotonic() - began
        _LOG.info("job %d, version %s: %.2f s", header["job"], header["version"], seconds)
        return Message("train", {"version": header["version"], "seconds": seconds}, body)

    def _prepare(self, message: Message) -> Message:
        digest = str(message.header.get("digest"))
        if self._ready is None or self._ready.digest != digest:
            self._ready = None
            ready = self._made(message, digest)
            self._trained(ready, jax.tree.map(jnp.zeros_like, ready.template), 0, 0)
            self._ready = ready
        part = self._options.part
        return Message(PREPARE, {} if part is None else {"name": f"part {part}"})

    def _made(self, message: Message, digest: str) -> _Ready:
        """Reads the data and builds the model, by the server's settings over the client's own."""
        told = settings.from_json(str(message.header.get("settings")))
        config = settle(settings.configured(told, self._options.config))
        own_weights = t5_weights.digest(config.t5_weights) if config.t5_weights else ""
        if own_weights != told.weights_sha256:
            raise ConfigError(
                "t5_weights", config.t5_weights, "are not the weights that the server started from"
            )
        dataset = settings.as_served(told, data.load(config, message.body.decode()))
        model = judging.fitting(config, dataset)
        start = builder.start(config, model, dataset)
        feed = feeds.make_feed(dataset, start.frozen)
        store, labels = devices.replicate(None, (feed.store, dataset.labels))
        train = make_window_trainer(
            model,
            feed.training,
            config.client_lr,
            lambda job, step: jax_key(config.seed, Stream.AUGMENTATION, job, step),
        )
        return _Ready(digest, config, start.params, store, labels, self._shards(dataset), train)

    def _shards(self, dataset: data.Dataset) -> Shards:
        if self._options.part is not None:
            return partition.create(self._options.config, dataset)
        own = dataset.positions("train")
        return Shards(own, np.asarray([0, len(own)], np.int64))

    def _trained(self, ready: _Ready, base: Any, job: int, visit: int) -> Any:
        indices = ready.shards.batches(
            self._options.part or 0,
            visit,
            steps=ready.config.local_iterations,
            batch_size=ready.config.batch_size,
            seed=ready.config.seed,
        )
        (upload,) = ready.train(
            (Download(base),),
            ready.store,
            ready.labels,
            indices[None].astype(np.int32),
            np.asarray([job], np.int32),
        )
        return jax.block_until_ready(upload)


def listen(path: Path, trainer: Trainer) -> None:
    """Answers messages at a socket in the file system, one after the other, for ever."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        os.chmod(path, 0o600)
        listening.listen()
        while True:
            stream, _ = listening.accept()
            with stream:
                try:
                    _answer(stream, trainer)
                except (OSError, ValueError, RecursionError) as error:
                    _LOG.warning("a message was lost: %s", error)


def _answer(stream: socket.socket, trainer: Trainer) -> None:
    header, body = wire.receive(stream)
    kind = str(header.pop("kind", ""))
    try:
        answer = trainer.answer(Message(kind, header, body))
    except Exception as error:  # of JAX, of the data: the next message may be another
        _LOG.warning("%s: %r", kind, error)
        # What goes wrong here names files and classes of this client, which are nobody else's.
        plain = type(error) is UserError
        wire.send(stream, {"error": str(error) if plain else "the client's log says what is wrong"})
        return
    wire.send(stream, {**answer.header, "kind": answer.kind}, answer.body)


def main(path: str, options: str) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr, force=True
    )
    listen(Path(path), Trainer(Options.from_json(Path(options).read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
