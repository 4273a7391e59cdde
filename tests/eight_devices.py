"""What must hold on several devices; run by test_devices.py in a process that has eight.

DFKD, whose programs take longest to compile, is run on 8 devices there; with LONG=1 in the
environment every method is, on 2, 4 and 8:

    LONG=1 JAX_NUM_CPU_DEVICES=8 python -m pytest -n 0 tests/eight_devices.py

Programs are compiled without most optimisations there: compiling is all that these tests wait for.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax.compute import devices
from fedrevive_jax.config import METHODS, PUBLISHED_METHODS
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import assert_same_params, rows, small

# Three teachers, nine samples of a step, calls of odd numbers of jobs: no mesh divides them all.
UNEVEN = {
    "convolution": "lax",
    "client_batch": 3,
    "num_teachers": 3,
    "distillation_batch": 3,
    "max_time": 4.5,
}


def play(config):
    simulation = Simulation(config)
    return simulation, list(simulation.arrivals())


LONG = os.environ.get("LONG") == "1"


# What the other methods add does not know of devices; the reference has other samples, no more.
SHORT = [name for name in PUBLISHED_METHODS if name != "dd_fedrevive"]


@pytest.mark.parametrize("method", METHODS if LONG else SHORT)
def test_the_number_of_devices_changes_nothing(method):
    """The same arrivals row by row and the same parameters on any number of devices.

    The tolerance is that of jobs trained together, see test_windows_and_one_by_one_agree: gradients
    summed in another order, a hundredth of a single step of Adam.
    """
    one, expected = play(small(method, **UNEVEN, mesh="1"))
    betas = [float(receipt.metrics["beta"]) for receipt in expected]
    if method in PUBLISHED_METHODS:
        assert any(betas) == (method in ("afl_dw", "fedrevive", "dd_fedrevive"))
    evaluation = one.evaluate()
    few = not LONG and method == "fedrevive"
    for number in ("8",) if few else ("2", "4", "8"):
        many, receipts = play(small(method, **UNEVEN, mesh=number))
        assert many.mesh.size == int(number)
        assert rows(receipts) == rows(expected)
        assert [float(receipt.metrics["beta"]) for receipt in receipts] == pytest.approx(betas)
        assert_same_params(many, one, atol=2e-5)
        assert many.evaluate().loss == pytest.approx(evaluation.loss, abs=1e-4)
        # Everything between calls is replicated, so each program is compiled once.
        for leaf in jax.tree.leaves((many.server.params, many.server.method_state)):
            assert leaf.sharding.is_equivalent_to(
                jax.sharding.NamedSharding(many.mesh, jax.sharding.PartitionSpec()), leaf.ndim
            )
        assert many.server._step._cache_size() == 1
        assert many._train._cache_size() == 1


def test_where_caches_live_changes_nothing_on_several_devices():
    """CA2FL's memory on the devices and on the host, continued on another number of them."""
    one, expected = play(small("ca2fl", **UNEVEN, num_clients=7, buffer_size=2))
    for memory in ("device", "host"):
        settings = {**UNEVEN, "num_clients": 7, "buffer_size": 2, "cache_memory": memory}
        begun = Simulation(small("ca2fl", **settings, mesh="2"))
        receipts = [begun.advance() for _ in range(len(expected) // 2)]
        assert begun.server._step._cache_size() == 1
        record, arrays = begun.snapshot()
        many = Simulation(small("ca2fl", **settings, mesh="4"))
        many.restore(record, begun.server.params, arrays)
        receipts += list(many.arrivals())
        assert rows(receipts) == rows(expected)
        assert_same_params(many, one, atol=2e-5)
        assert many.server._step._cache_size() == 1


def test_continued_on_other_devices():
    """One device, then four, then two: as if it had been one all along."""
    whole, expected = play(small("fedbuff", **UNEVEN))
    receipts, before = [], None
    for number, until in (("0", 4), ("4", 9), ("2", whole.schedule.num_arrivals)):
        simulation = Simulation(small("fedbuff", **UNEVEN, mesh=number))
        if before is not None:
            record, arrays = before.snapshot()
            simulation.restore(record, before.server.params, arrays)
        while simulation.position < until:
            receipts.append(simulation.advance())
        before = simulation
    assert rows(receipts) == rows(expected)
    assert_same_params(simulation, whole, atol=2e-5)


def layer(shared, part):
    """Like a network on its own samples: a weight for all, and a loop."""
    weight, bias = shared

    def step(x, _):
        return jnp.tanh(x @ weight + bias[None]), None

    return jax.lax.scan(step, part["x"], None, length=2)[0] * part["scale"][:, None]


@pytest.mark.parametrize("count", [1, 3, 8, 13])
def test_split_is_the_plain_function_with_the_plain_gradients(count):
    """Values, first derivatives for all arguments, and second ones as full MAML takes them.

    Sums of up to 13 float32 terms of order one in another order: 1e-5 is ten times their rounding.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    shared = (jax.random.normal(keys[0], (4, 4)), jax.random.normal(keys[1], (4,)))
    part = {
        "x": jax.random.normal(keys[2], (count, 4)),
        "scale": jax.random.normal(keys[3], (count,)),
    }

    def all_of(mesh):
        split = devices.split(mesh, layer)

        def loss(shared, part):
            return (split(shared, part) ** 2).sum()

        def after_a_step(shared):
            moved = jax.tree.map(lambda a, g: a - 0.01 * g, shared, jax.grad(loss)(shared, part))
            return loss(moved, part)

        return jax.jit(
            lambda shared, part: (
                split(shared, part),
                jax.grad(loss, (0, 1))(shared, part),
                jax.grad(after_a_step)(shared),
            )
        )(shared, part)

    expected = all_of(None)
    for number in ("3", "8"):
        result = all_of(devices.make_mesh(number))
        for a, b in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_meshes():
    assert devices.make_mesh("auto").size == jax.device_count() == 8
    assert devices.make_mesh("0") is devices.make_mesh("1") is None
    with pytest.raises(ConfigError, match="mesh=9: there are 8 devices"):
        devices.make_mesh("9")
