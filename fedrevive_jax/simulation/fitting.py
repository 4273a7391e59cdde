"""Whether the programs of a run fit into its device, before the first arrival meets them."""

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
    _check(
        "client_batch", client_batch, "a call of client training", compiled, memory, waiting,
        "smaller, or `batch_size` must be" + _elsewhere(config, waiting),
    )  # fmt: skip


def check_server_step(
    config: Config, compiled: jax.stages.Compiled, memory: Memory, waiting: int, teacher_batch: int
) -> None:
    """Whether a server step fits; see `check_training`.

    Raises:
      ConfigError: it does not fit.
    """
    smaller = "smaller, or `num_teachers`, `synthesis_batch` or `pool_size` must be"
    _check(
        "teacher_batch", teacher_batch, "a server step", compiled, memory, waiting,
        smaller + _elsewhere(config, waiting),
    )  # fmt: skip


def _check(
    field: str,
    value: int,
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
        f"wait, the device has {limit}; must be {remedy}",
    )


def _elsewhere(config: Config, waiting: int) -> str:
    """What else makes room."""
    ways = []
    if waiting:
        ways.append("version_memory=host")
    if config.precision == "float32":
        ways.append("precision=bfloat16")
    return f", or give {' or '.join(ways)}" if ways else ""
