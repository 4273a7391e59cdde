"""Where pytrees wait between two uses: on the device, or in the memory of its host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

# Share of a device's memory that is planned for; the rest is for programs and fragmentation.
USABLE = 0.85


class Shelf(NamedTuple):
    """Where pytrees wait between two uses.

    Attributes:
      name: `device` or `host`.
      store: tree -> tree, on its way to the shelf. Nothing waits for it.
      fetch: tree from the shelf -> tree on the device.
    """

    name: str
    store: Callable[[Any], Any]
    fetch: Callable[[Any], Any]


ON_DEVICE = Shelf("device", lambda tree: tree, lambda tree: tree)


def shelf(place: str, mesh: Mesh | None = None) -> Shelf:
    """The shelf in a kind of memory.

    Args:
      place: `device`, or `host`, the memory of the host that the device can reach.
      mesh: the devices of the run, where they are several.
    """
    if place == "device":
        return ON_DEVICE
    if mesh is None:
        here = SingleDeviceSharding(jax.local_devices()[0])
    else:
        here = NamedSharding(mesh, PartitionSpec())
    there = here.with_memory_kind("pinned_host")
    return Shelf(
        "host", lambda tree: jax.device_put(tree, there), lambda tree: jax.device_put(tree, here)
    )


class Memory(NamedTuple):
    """Memory of a device, in bytes: all of it, and what is in use."""

    limit: int
    used: int


def device_memory() -> Memory | None:
    """The memory of the device; None where it does not tell, as on a CPU."""
    told = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in told:
        return None
    return Memory(int(told["bytes_limit"]), int(told.get("bytes_in_use", 0)))


def device_bytes() -> int | None:
    """Memory of the device that may be planned for; None where it does not tell."""
    memory = device_memory()
    return None if memory is None else int(USABLE * memory.limit)
