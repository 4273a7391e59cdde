"""python -m tests.killed_run ARRIVAL CONFIG.json: a run that kills itself, without any cleaning up,
when it is about to process that arrival."""

import json
import os
import signal
import sys
from pathlib import Path

from fedrevive_jax import runner
from fedrevive_jax.checkpoint import Checkpoints
from fedrevive_jax.config import Config
from fedrevive_jax.simulator import Simulation


def main(arrival: int, path: str) -> None:
    plain = Simulation.advance

    def advance(self):
        if self.position == arrival:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self)

    save = Checkpoints.save

    def save_and_wait(self, *args):
        save(self, *args)
        self.wait()  # so that it is known what there is to continue from

    Simulation.advance = advance
    Checkpoints.save = save_and_wait
    config = Config(**json.loads(Path(path).read_text()))
    runner.run(config, keep_record=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
