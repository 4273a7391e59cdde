"""Weights & Biases; WANDB_MODE, WANDB_PROJECT and its other variables say where and how."""

import os
import secrets
from collections.abc import Mapping
from typing import Any

from fedrevive_jax.record.trackers import Followed


class WandB:
    """One run of wandb for a run, however often it is continued."""

    def __init__(self, followed: Followed):
        import wandb

        self.id = followed.id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedrevive_jax"),
            id=self.id,
            resume="allow",
            name=followed.name,
            dir=str(followed.folder),
            config=dict(followed.config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own steps count calls; ours are versions, of which several rows may have the same.
        self._run.define_metric("*", step_metric="version")

    def add(self, values: Mapping[str, float], version: int) -> None:
        self._run.log({**values, "version": version})

    def flush(self) -> None:
        """It has a process of its own that hands on."""

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0)


create = WandB
