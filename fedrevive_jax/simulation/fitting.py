"""Whether the programs of a run fit into its device, before the first arrival meets them."""

from typing import Any

import jax

from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.server.shelf import Memory


def new_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program takes beside its arguments while it runs: temporaries, results, its code.

    What is given back in the place of an argument takes no room of its own.
    """
    memory = compiled.memory_analysis()
    if memory is None:  # some backends do not tell
        return 0
    return (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def check_training(
    config: Config, compiled: jax.stages.Compiled, memory: Memory, waiting: int, client_batch: int
) -> None:
    """Whether a call of client training fits.

    Args:
      config: what is run.
      compiled: the call.
      memory: of the device, with all in place that stays there.
      waiting: bytes of stale versions and uploads that will come beside.
      client_batch: jobs of a call.

    Raises:
      ConfigError: it does not fit.
    """
    smaller = ["client_batch"] * (client_batch > 1) + ["batch_size"]
    _check(
        "client_batch", client_batch, "a call of client training", compiled, memory, waiting,
        _remedies(config, smaller, waiting),
    )  # fmt: skip


def check_server_step(
    config: Config, compiled: jax.stages.Compiled, memory: Memory, waiting: int, teacher_batch: int
) -> None:
    """Whether a server step fits; see `check_training`.

    Args:
      config, compiled, memory, waiting: see `check_training`.
      teacher_batch: as in `Dfkd`.

    Raises:
      ConfigError: it does not fit.
    """
    field, value, smaller = "method", config.method, []
    if config.traits.distils:
        field, value = "teacher_batch", teacher_batch or config.num_teachers
        smaller = ["teacher_batch"] * (value > 1) + ["num_teachers", "distillation_batch"]
        smaller += ["synthesis_batch"] * config.synthesises + ["pool_size"]
    _check(
        field, value, "a server step", compiled, memory, waiting,
        _remedies(config, smaller, waiting),
    )  # fmt: skip


def _check(
    field: str,
    value: Any,
    what: str,
    compiled: jax.stages.Compiled,
    memory: Memory,
    waiting: int,
    remedy: str,
) -> None:
    needed = new_bytes(compiled)
    if memory.used + waiting + needed <= memory.limit:
        return
    used, own, own_waiting, limit = (
        f"{number / 1e9:.2f} GB" for number in (memory.used, needed, waiting, memory.limit)
    )
    raise ConfigError(
        field,
        value,
        f"{what} needs {own} beside {used} in use and {own_waiting} for versions and uploads that "
        f"wait, the device has {limit}; {remedy}",
    )


def _remedies(config: Config, smaller: list[str], waiting: int) -> str:
    """What makes room: smaller values of some fields, or other values."""
    ways = ["a smaller " + " or ".join(smaller)] if smaller else ["a smaller model"]
    if waiting:
        ways.append("version_memory=host")
    if config.precision == "float32":
        ways.append("precision=bfloat16")
    return "give " + " or ".join(ways)
