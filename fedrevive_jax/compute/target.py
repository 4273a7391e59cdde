"""TPUs that programs are compiled for without having them.

Their compiler runs on any machine that has `libtpu`. It compiles for a topology that is only
described; nothing runs there.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fedrevive_jax.compute.chips import CHIPS, Chip
from fedrevive_jax.compute.devices import AXIS
from fedrevive_jax.errors import ConfigError

# generation in Cloud's names -> number of its topology's axes.
GENERATIONS = {"v5e": 2, "v5p": 3, "v6e": 2}
# Without these the compiler asks the machine which TPU it has, and keeps other processes from it.
ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
EXAMPLES = "v5e:1x1, v5e:2x2, v5p:1x1x1 or v6e:2x4"


class Target(NamedTuple):
    """Devices that programs are compiled for.

    Attributes:
      name: as it was asked for.
      platform: see `models.Model`.
      kind: `device_kind` in JAX.
      chip: what is published of it.
      devices: described, not there.
      mesh: over them, where they are several.
    """

    name: str
    platform: str
    kind: str
    chip: Chip
    devices: tuple[Any, ...]
    mesh: Mesh | None

    def shapes(self, tree: Any) -> Any:
        """Arrays or shapes as shapes that lie on the target, on all of its devices."""
        if self.mesh is None:
            place: Any = SingleDeviceSharding(self.devices[0])
        else:
            place = NamedSharding(self.mesh, PartitionSpec())

        def lying(leaf):
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)

        return jax.tree.map(lying, tree)


def has_compiler() -> bool:
    """Whether the compiler of TPUs is installed."""
    return importlib.util.find_spec("libtpu") is not None


def described(name: str) -> Target:
    """TPUs by the name of their topology, like `v5e:2x2`.

    Raises:
      ConfigError: there is no such topology, or the compiler is not installed.
    """
    generation, _, sides = name.partition(":")
    axes = GENERATIONS.get(generation)
    if axes is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise ConfigError("target", name, f"must be a topology like {EXAMPLES}")
    if sides.count("x") != axes - 1:
        raise ConfigError("target", name, f"must have {axes} sides, see {EXAMPLES}")
    if not has_compiler():
        raise ConfigError(
            "target", name, "needs the compiler of TPUs: python -m pip install -e '.[tpu]'"
        )
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    alone = set(sides.split("x")) == {"1"}
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if alone else {}
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError("target", name, f"must be a topology like {EXAMPLES}; {reason}") from None
    mesh = None
    if len(devices) > 1:
        mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    kind = devices[0].device_kind
    return Target(name, devices[0].platform, kind, CHIPS[kind], tuple(devices), mesh)
