"""The one configuration of a run: frozen, validated, one field per command-line flag.

A field's metadata is the single source for its flag's help text and for what values are allowed. A
`Config` is always complete; `fedrevive_jax.presets.resolve` fills in what a user left open from the
preset of (dataset, method).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from fedrevive_jax.config.fields import LIMITS, is_bucket, whole_path, without_tilde
from fedrevive_jax.config.generators import Dfkd, FedGen
from fedrevive_jax.config.parts import (
    BETA_SHAPES,
    DATASETS,
    DELAYS,
    FAULTS,
    MODELS,
    SERVER_OPTIMIZERS,
    STALENESS_WEIGHTS,
    TRACKERS,
    Clients,
    Device,
    Record,
    Server,
    World,
)
from fedrevive_jax.config.traits import METHODS, PUBLISHED_METHODS, Traits
from fedrevive_jax.errors import ConfigError

__all__ = [
    "BETA_SHAPES", "DATASETS", "DELAYS", "DEVICE_FIELDS", "FAULTS", "INPUT_FIELDS",
    "LIMITS", "LOCATION_FIELDS", "METHODS", "MODELS", "PUBLISHED_METHODS",
    "SERVER_OPTIMIZERS", "STALENESS_WEIGHTS", "TRACKERS", "Clients", "Config", "Device", "Dfkd",
    "FedGen", "Record", "Server", "Traits", "World", "is_bucket", "whole_path",
    "without_tilde",
]  # fmt: skip

# Where a run is written and where its data lie do not change what it computes.
LOCATION_FIELDS = ("workdir", "data_dir", "cache_dir")
# Nor do the devices, up to the rounding of sums, nor where a run is followed.
DEVICE_FIELDS = ("mesh", "version_memory", "trackers")
# Files and folders that a run reads beside its data; recorded with their whole path.
INPUT_FIELDS = ("t5_weights", "pretrained", "seed_text", "delay_trace")


@dataclass(frozen=True)
class Config(Device, Record, Dfkd, FedGen, Server, Clients, World):
    """Everything that determines a run, and where it is written: all parts in one.

    A function that reads one part takes that part, and a `Config` is one.

    Raises:
      ConfigError: a value is outside its limits, or two values contradict each other.
    """

    def _check(self) -> None:
        asked = self.traits.step_field or "method"
        for name in ("buffer_size", "open_slots") if self.cohort else ():
            if getattr(self, name) != self.concurrency:
                raise ConfigError(
                    name,
                    getattr(self, name),
                    f"must be concurrency={self.concurrency} with {asked}={self.step_method}, "
                    f"whose round waits for all; {asked}=fedbuff takes others",
                )
        if self.synthesises and self.warmup_versions < self.freeze_versions:
            raise ConfigError(
                "warmup_versions",
                self.warmup_versions,
                f"must be at least freeze_versions={self.freeze_versions} (distillation needs a "
                "synthesised pool)",
            )

    @property
    def synthesises(self) -> bool:
        """Whether the server makes the samples that it distils on."""
        return self.traits.distils and self.samples == "generator"

    @property
    def generator_interval(self) -> int:
        """Versions between two trainings of fedgen's generator."""
        return self.fedgen_interval or max(1, self.concurrency // self.buffer_size)

    @property
    def run_dir(self) -> Path:
        """The folder for the record of this run; a path of `epath` where it is in a bucket."""
        name = self.workdir or f"runs/{self.dataset}_{self.method}_seed{self.seed}"
        return epath.Path(name) if is_bucket(name) else Path(name)  # type: ignore[return-value]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
