"""The server core on its own, as a live federation would drive it."""

import chex
import jax
import jax.numpy as jnp
import pytest

from fedrevive_jax.methods import method as interface
from fedrevive_jax.presets import resolve
from fedrevive_jax.server.core import Server
from fedrevive_jax.server.version_store import VersionNotFoundError
from tests.toys import scalar_upload


def make(buffer_size=1, server_lr=0.5):
    """A server whose step may be traced once; once more is an error."""
    config = resolve("digits", "fedbuff", server_lr=server_lr)
    method = interface.compose(
        interface.as_it_is(), buffer_size, interface.server_optimizer(config)
    )
    chex.clear_trace_counter()  # it counts by the name of a function
    method = method._replace(step=chex.assert_max_traces(method.step, n=1))
    return Server(method, {"w": jnp.asarray(1.0)}, scalar_upload(0.0).taps, seed=0, num_clients=100)


def test_dispatch_submit_and_versions():
    server = make()
    first, second = server.dispatch(7), server.dispatch(8)
    assert (first.job, first.version, second.job) == (0, 0, 1)
    receipt = server.submit(second.job, scalar_upload(3.0))  # Delta = 2
    assert (receipt.client, receipt.version, receipt.new_version, receipt.staleness) == (8, 0, 1, 0)
    assert bool(receipt.accepted)
    assert float(server.params["w"]) == 2.0
    assert server.live_versions == (0, 1)
    third = server.dispatch(8)
    assert third.version == 1
    receipt = server.submit(first.job, scalar_upload(0.0))  # Delta = -1 from version 0
    assert receipt.staleness == 1
    assert float(server.params["w"]) == 1.5
    assert server.live_versions == (1, 2)
    with pytest.raises(VersionNotFoundError, match="live versions: 1, 2"):
        server.params_of(0)


def test_a_buffer_makes_a_version_every_b_arrivals():
    server = make(buffer_size=3)
    made = []
    for i in range(7):
        ticket = server.dispatch(i)
        made.append(server.submit(ticket.job, scalar_upload(2.0)).new_version)
    assert made == [0, 0, 1, 1, 1, 2, 2]


def test_one_compilation_for_all_steps():
    """A second trace would be an error, see `make`."""
    server = make(buffer_size=2)
    for i in range(10):
        ticket = server.dispatch(i % 3)
        server.submit(ticket.job, scalar_upload(float(i)))


def test_snapshot_and_restore():
    def play(server, script):
        for what, value in script:
            if what == "dispatch":
                server.dispatch(value)
            else:
                server.submit(value, scalar_upload(value + 2.0))

    before = [("dispatch", 0), ("dispatch", 1), ("dispatch", 2), ("submit", 1), ("dispatch", 3)]
    after = [("submit", 0), ("dispatch", 4), ("submit", 3), ("submit", 2), ("submit", 4)]
    straight = make(buffer_size=2)
    play(straight, before + after)

    original = make(buffer_size=2)
    play(original, before)
    record, arrays = original.snapshot()
    copy = make(buffer_size=2)
    copy.restore(record, original.params, jax.tree.map(jnp.array, arrays))
    assert copy.live_versions == original.live_versions
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), arrays)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), copy.shapes(record)) == described
    play(copy, after)
    assert float(copy.params["w"]) == float(straight.params["w"])
    assert copy.live_versions == straight.live_versions
