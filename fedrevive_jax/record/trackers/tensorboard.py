"""TensorBoard events of a run, begun anew each time the run is opened."""

import shutil
import time
from collections.abc import Mapping
from typing import Any

from fedrevive_jax.record import files
from fedrevive_jax.record.trackers import Followed


class TensorBoard:
    """Events are written by the thread that adds them.

    The queue of tensorboardX's own writer blocks for ever once its thread has failed, as it does on
    a full disk.
    """

    id = ""

    def __init__(self, followed: Followed):
        from tensorboardX.event_file_writer import EventsWriter

        folder = followed.folder / files.EVENTS
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        self._writer = EventsWriter(str(folder / "events"))

    def add(self, values: Mapping[str, float], version: int) -> None:
        # protobuf makes its classes when it is imported.
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._writer.write_event(
                Event(wall_time=time.time(), step=version, summary=scalar(name, value))
            )

    def flush(self) -> None:
        self._writer.flush()

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self._writer.close()


create = TensorBoard
