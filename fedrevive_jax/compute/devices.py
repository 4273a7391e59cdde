"""Several devices: a mesh with one axis, over which independent parts of the work are split.

Jobs of a window, teachers and distillation samples do not depend on each other, so each device
takes its part; everything that lives between calls is replicated. A mesh of None stands for the
default device alone.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedrevive_jax.errors import ConfigError

AXIS = "clients"


def make_mesh(devices: str) -> Mesh | None:
    """The mesh that a configuration asks for.

    Args:
      devices: how many, or `auto` for all there are; 0 and 1 mean none. Of several processes each
        contributes the same number.

    Raises:
      ConfigError: there are not so many, or processes would be left without one.
    """
    available, processes = jax.device_count(), jax.process_count()
    count = available if devices == "auto" else max(int(devices), 1)
    if count > available:
        raise ConfigError("mesh", devices, f"there are {available} devices")
    if count % processes:
        raise ConfigError(
            "mesh", devices, f"must be auto or a multiple of {processes}, the number of processes"
        )
    if count == 1:
        return None
    of_each = collections.defaultdict(list)
    for device in jax.devices():
        of_each[device.process_index].append(device)
    chosen = [device for own in of_each.values() for device in own[: count // processes]]
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Arrays of JAX or NumPy on every device of the mesh; every process must hold equal values.

    Those that are there already stay as they are.
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf):
        if isinstance(leaf, jax.Array) and leaf.sharding == everywhere:
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, everywhere, lambda index: host[index])

    return jax.tree.map(place, tree)


def jit(
    mesh: Mesh | None, function: Callable, platform: str | None = None, **options: Any
) -> jax.stages.Wrapped:
    """`jax.jit` with results that are replicated, like everything else between two calls.

    So one program serves whatever it is called with, and no call moves an array implicitly. The
    compiler is told what makes programs faster here, see `compiler_options`.

    Args:
      mesh: the devices that run it; None is one device.
      function: what is compiled.
      platform: of that device; None is that of the default backend.
      options: of `jax.jit`.
    """
    if mesh is not None:
        options["out_shardings"] = NamedSharding(mesh, PartitionSpec())
        platform = mesh.devices.flat[0].platform
    told = compiler_options(platform or jax.default_backend())
    return jax.jit(function, compiler_options=told, **options)


@functools.cache
def compiler_options(platform: str) -> dict[str, str]:
    """What the compiler of a platform is told for every program.

    On a CPU, to use its own convolutions and sums, not those of the library to which it would hand
    them by default: a step of ResNet-18 takes 0.45 s on two cores instead of 0.75 s, one of the
    ConvNet 28 ms instead of 100 ms, and equal parameters give equal logits in any program.
    """
    if platform != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}  # a version that knows no such option, or names it otherwise
    return options


def split(mesh: Mesh | None, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`function` with its second argument and its result split over the devices.

    The leading axis is padded by repetition where the devices do not divide it; the padding is cut
    off again. Differentiable: what every device contributes to the gradient of `shared` is summed.

    Args:
      mesh: the mesh; None gives `function` itself.
      function: (shared, part) -> result, where the leaves of part and result have one leading axis,
        along which each result depends on its own part alone.

    Returns:
      A function of the same arguments; its result is replicated.
    """
    if mesh is None:
        return function
    everywhere, along = PartitionSpec(), PartitionSpec(AXIS)
    # Inside, nothing communicates, so there is no replication to be tracked; and the scans of
    # `function` may start from constants.
    on_device = jax.shard_map(
        function, mesh=mesh, in_specs=(everywhere, along), out_specs=along, check_vma=False
    )

    def apply(shared, part):
        count = len(jax.tree.leaves(part)[0])
        missing = -count % mesh.size
        if missing:
            places = np.arange(count + missing) % count
            part = jax.tree.map(lambda leaf: leaf[places], part)
        # Whole on every device, of which each then takes its own part: what was made of replicated
        # arrays would otherwise be made in parts, and sent around.
        part = jax.lax.with_sharding_constraint(part, NamedSharding(mesh, everywhere))
        whole = jax.lax.with_sharding_constraint(
            on_device(shared, part), NamedSharding(mesh, everywhere)
        )
        return jax.tree.map(lambda leaf: leaf[:count], whole)

    return apply
