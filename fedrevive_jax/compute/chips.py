"""What is published of accelerators' chips."""

from typing import NamedTuple

MIB, GIB = 2**20, 2**30


class Chip(NamedTuple):
    """A chip, by what its maker tells.

    Attributes:
      half: FLOP/s of products of bfloat16.
      single: FLOP/s of products that keep all digits of float32, as JAX asks for them. A TPU takes
        six passes of bfloat16 for one.
      memory: bytes that programs may use; None where nobody has looked.
      hertz: clock of the cycles that a compiler counts; 0 where none are counted.
      fast: bytes of the memory within the chip that a call of client training had better stay in; 0
        where larger calls are faster, or nobody has looked.
    """

    half: float
    single: float
    memory: int | None = None
    hertz: float = 0.0
    fast: int = 0


def _tpu(half: float, memory: float, hertz: float, fast: int = 0) -> Chip:
    return Chip(half, half / 6, int(memory * GIB), hertz, fast)


# By `device_kind` in JAX. The memory of a TPU is what its compiler says it has.
CHIPS = {
    "NVIDIA H200": Chip(989e12, 67e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 67e12),
    "NVIDIA H100 PCIe": Chip(756e12, 51e12),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 19.5e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 19.5e12),
    "TPU v4": Chip(275e12, 275e12 / 6),
    "TPU v5 lite": _tpu(197e12, 15.75, 1.5e9, 128 * MIB),
    "TPU v5": _tpu(459e12, 95.74, 1.75e9),
    "TPU v5p": _tpu(459e12, 95.74, 1.75e9),
    "TPU v6 lite": _tpu(918e12, 31.25, 1.75e9, 128 * MIB),
}


def peak(chip: Chip, precision: str) -> float:
    """FLOP/s of a chip at most, in `float32` or `bfloat16`."""
    return chip.half if precision == "bfloat16" else chip.single


def fast_memory(kind: str) -> int:
    """`Chip.fast` of a `device_kind`; 0 of one that is not known."""
    return CHIPS[kind].fast if kind in CHIPS else 0
