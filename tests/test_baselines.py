"""The methods of other papers: steps by hand on a scalar model, limits between them, caches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax.config import Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.methods import blending, staleness
from fedrevive_jax.methods.fedrevive import revived
from fedrevive_jax.presets import resolve
from fedrevive_jax.record.checkpoint import Checkpoints
from fedrevive_jax.server import client_cache
from fedrevive_jax.server.shelf import Memory
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import (
    ONE,
    arrival,
    drive,
    make,
    scalar_reviver,
    scalar_upload,
    small,
    submission,
)
from tests.toys import TINY_METHOD as TINY

# Deltas of clients 0 and 1, then twice of client 0, then of clients 2 and 1; all bases are 0.
PAIRS = [
    (delta, 0.0, arrival(job, client, completes=job % 2 == 1))
    for job, (client, delta) in enumerate([(0, 2), (1, -1), (0, 4), (0, 1), (2, 3), (1, 0)])
]


def random_uploads(count, buffer_size, staleness=0):
    generator = np.random.default_rng(0)
    return [
        (
            float(generator.normal()),
            0.0,
            arrival(i, int(generator.integers(4)), completes=(i + 1) % buffer_size == 0,
                    staleness=staleness),
        )
        for i in range(count)
    ]  # fmt: skip


# --- FedAsync, staleness weights ------------------------------------------------------------------


def test_fedasync_by_hand():
    """theta = 1, theta' = 3 from theta_b = 0, alpha = 1/2, s(3) = (1 + 3)^(-1/2) = 1/2.

    Mixing: 1 + 1/4 (3 - 1); delta: 1 + 1/4 (3 - 0).
    """
    upload = [(3.0, 0.0, arrival(staleness=3))]
    settings = {"server_lr": 0.5, "staleness_weight": "polynomial", "staleness_exponent": 0.5}
    history, seen = drive(make("fedasync", **settings), ONE, upload)
    assert history == pytest.approx([1.5])
    assert seen[0]["beta"] == pytest.approx(0.5)  # what the weight takes away
    history, _ = drive(make("fedasync", fedasync_form="delta", **settings), ONE, upload)
    assert history == pytest.approx([1.75])


def test_staleness_weights_by_hand():
    tau = np.asarray([0, 3, 4, 5, 14])
    np.testing.assert_allclose(staleness.polynomial(1.0)(tau), 1 / (1 + tau), rtol=1e-6)
    np.testing.assert_allclose(
        staleness.hinge(10.0, 4.0)(tau), [1, 1, 1, 1 / 11, 1 / 101], rtol=1e-6
    )
    for name in ("none", "sqrt", "polynomial", "hinge", "beta"):
        config = resolve("digits", "fedbuff", staleness_weight=name)
        values = np.asarray(staleness.create(config)(np.arange(500)))
        assert values[0] == 1
        assert (values >= 0).all()
        assert (np.diff(values) <= 0).all()


def test_fedbuff_under_the_weight_beta_is_afl_dw():
    uploads = random_uploads(6, 2, staleness=9)
    settings = {"buffer_size": 2, "server_lr": 0.3, "beta_s_max": 10}
    weighted, _ = drive(make("fedbuff", staleness_weight="beta", **settings), ONE, uploads)
    assert weighted == drive(make("afl_dw", **settings), ONE, uploads)[0]


def test_any_weight_goes_with_any_optimiser():
    """Adam's first step is its rate in the direction of the weighted update, whatever its size."""
    method = make(
        "fedbuff", buffer_size=1, server_lr=0.25, server_optimizer="adam", staleness_weight="hinge"
    )
    history, seen = drive(method, ONE, [(-5.0, 1.0, arrival(staleness=5))])
    assert history == pytest.approx([0.75], rel=1e-5)
    assert seen[0]["beta"] == pytest.approx(10 / 11)


@pytest.mark.parametrize("form", ["delta", "mixing"])
def test_fedasync_of_fresh_updates_is_fedbuff_of_one(form):
    """Constant alpha; at tau = 0 the base is the global model, so that the forms agree too."""
    asynchronous = make(
        "fedasync", fedasync_form=form, staleness_weight="none", server_lr=0.4
    )  # fmt: skip
    buffered = make("fedbuff", buffer_size=1, server_lr=0.4)
    w = 1.0
    for target in (2.0, -1.5, 0.3):
        upload, params = [(target, w, arrival())], {"w": jnp.asarray(w)}
        (one,), (other,) = (drive(m, params, upload)[0] for m in (asynchronous, buffered))
        assert one == other != w
        w = one


# --- methods with a memory of every client --------------------------------------------------------


def test_ca2fl_by_hand():
    """N = 4, B = 2, eta = 1/2; h is the mean of all h_i as it was before each buffer.

    v = 0 + (2 - 1)/2 = 1/2. Then h = (2 - 1)/4 and client 0 is compared with its own 4 the second
    time: v = 1/4 + ((4 - 2) + (1 - 4))/2 = -1/4. Then h = (1 - 1)/4 = 0 and v = (3 + (0 + 1))/2.
    """
    history, _ = drive(make("ca2fl", buffer_size=2, server_lr=0.5), {"w": jnp.zeros(())}, PAIRS)
    assert history == pytest.approx([0, 0.25, 0.25, 0.125, 0.125, 1.125])


def test_fedstale_by_hand():
    """As above with beta = 1/2: v = 1/2, 1/8 + ((4 - 1) + (1 - 2))/2, 0 + (3 + (0 + 1/2))/2."""
    method = make("fedstale", buffer_size=2, server_lr=0.5, fedstale_beta=0.5)
    history, _ = drive(method, {"w": jnp.zeros(())}, PAIRS)
    assert history == pytest.approx([0, 0.25, 0.25, 0.8125, 0.8125, 1.6875])


def test_ace_by_hand():
    """B = 1, eta = 1/2: the means of the four are 2/4, 1/4, 3/4."""
    uploads = [(w, base, facts._replace(completes=jnp.asarray(True))) for w, base, facts in PAIRS]
    history, _ = drive(make("ace", buffer_size=1, server_lr=0.5), {"w": jnp.zeros(())}, uploads[:3])
    assert history == pytest.approx([0.25, 0.375, 0.75])


def test_fedstale_lies_between_fedbuff_and_ca2fl():
    """beta = 0 and beta = 1 are these methods, bit for bit; in between it is neither."""
    uploads = random_uploads(24, 3)
    settings = {"buffer_size": 3, "server_lr": 0.7}

    def history(name, **kwargs):
        return drive(make(name, **settings, **kwargs), ONE, uploads)[0]

    stale = functools.partial(history, "fedstale")
    assert stale(fedstale_beta=0.0) == history("fedbuff")
    assert stale(fedstale_beta=1.0) == history("ca2fl")
    assert stale(fedstale_beta=0.5)[-1] not in (history("fedbuff")[-1], history("ca2fl")[-1])


@pytest.mark.parametrize("name", ["ca2fl", "fedstale", "ace"])
def test_incremental_means_are_means_over_all_clients(name):
    """Against all entries kept plainly and averaged anew, in double precision.

    40 updates of size 1, sums in float32: far from 1e-4.
    """
    size, clients = 3, 4
    uploads = random_uploads(40, size)
    history, _ = drive(make(name, buffer_size=size, server_lr=0.5), ONE, uploads)
    kept, w, expected, buffer = np.zeros(clients), 1.0, [], []
    beta = {"ca2fl": 1.0, "fedstale": 0.5, "ace": 1.0}[name]
    before = kept.mean()
    for delta, _, facts in uploads:
        client = int(facts.client)
        buffer.append(delta - beta * kept[client])
        kept[client] = delta
        if len(buffer) == size:
            w += 0.5 * (kept.mean() if name == "ace" else beta * before + np.mean(buffer))
            before, buffer = kept.mean(), []
        expected.append(w)
    np.testing.assert_allclose(history, expected, atol=1e-4)


def test_ca2fl_with_every_entry_like_the_update_is_fedbuff():
    """Whatever beta: the memory cancels."""
    for name in ("ca2fl", "fedstale"):
        method = make(name, buffer_size=1, server_lr=0.5)
        state = method.init(ONE)
        update = {"w": jnp.asarray(2.0)}
        state = state._replace(aggregation=state.aggregation._replace(average=update))
        params, _, entry, _ = method.step(
            state, update, submission(scalar_upload(3.0), arrival(), ONE)
        )
        assert float(params["w"]) == 1 + 0.5 * 2
        assert float(entry["w"]) == 2.0


def test_the_memory_in_bfloat16_stays_consistent():
    """1 + 2^-9 is kept as 1; h is the mean of what is kept, the update itself is not rounded."""
    method = make("ca2fl", buffer_size=1, server_lr=1.0, cache_dtype="bfloat16")
    delta = 1 + 2.0**-9
    state, entry = method.init(ONE), method.entry(ONE)
    assert entry["w"].dtype == jnp.bfloat16
    params, state, entry, _ = method.step(
        state, entry, submission(scalar_upload(1 + delta), arrival(), ONE)
    )
    assert float(params["w"]) == 1 + delta
    assert float(entry["w"]) == 1.0
    assert float(state.aggregation.average["w"]) == 1 / 4


# --- FADAS, FedFa ---------------------------------------------------------------------------------


def test_fadas_by_hand():
    """beta1 = 1/2, beta2 = 3/4, Deltas 2 and 0: m = 1, 1/2; v = 1, 3/4; the maximum stays 1.

    Corrected: m / (1/2), v / (1/4), then m / (3/4), v / (7/16).
    """
    uploads = [(2.0, 0.0, arrival()), (0.0, 0.0, arrival(1))]
    settings = {
        "buffer_size": 1, "server_lr": 0.1, "fadas_beta1": 0.5, "fadas_beta2": 0.75,
    }  # fmt: skip
    history, _ = drive(make("fadas", **settings), ONE, uploads)
    assert history == pytest.approx([1.1, 1.15])
    history, _ = drive(make("fadas", fadas_bias_correction="on", **settings), ONE, uploads)
    second = 0.1 * (0.5 / 0.75) / np.sqrt(1 / (7 / 16))
    assert history == pytest.approx([1.1, 1.1 + second])


@pytest.mark.parametrize(
    ("rule", "stale", "expected"),
    [
        ("none", 8, 0.25), ("paper", 8, 1 / 8), ("code", 8, 0.25 / 8),
        ("paper", 3, 0.25), ("code", 3, 0.25 / 3), ("paper", 2, 0.25), ("code", 2, 0.25),
    ],
)  # fmt: skip
def test_the_delay_rules_of_fadas(rule, stale, expected):
    """Without memory a step is the rate itself: eta = 1/4, tau_c = 2, the stalest of two counts."""
    method = make(
        "fadas", buffer_size=2, server_lr=0.25, fadas_beta1=0, fadas_beta2=0, fadas_patience=2,
        fadas_delay_rule=rule,
    )  # fmt: skip
    uploads = [(5.0, 1.0, arrival(completes=False, staleness=stale)), (3.0, 1.0, arrival(1))]
    history, _ = drive(method, ONE, uploads)
    assert history[1] - 1 == pytest.approx(expected)
    # The next buffer starts without the old staleness.
    history, _ = drive(
        method, ONE, [*uploads, (9.0, 1.0, arrival(2, completes=False)), (9.0, 1.0, arrival(3))]
    )
    assert history[3] - history[1] == pytest.approx(0.25)


def test_fadas_without_memory_is_a_scaled_fedbuff():
    """beta1 = 0 and a second moment that stays at 4: FedBuff at eta / (2 + eps)."""
    uploads = random_uploads(8, 2)
    adaptive = make("fadas", buffer_size=2, server_lr=0.3, fadas_beta1=0, fadas_delay_rule="none")
    frozen = adaptive.init(ONE)
    frozen = frozen._replace(optimizer=frozen.optimizer._replace(largest={"w": jnp.asarray(4.0)}))
    adaptive = adaptive._replace(init=lambda params: frozen)
    scaled, _ = drive(adaptive, ONE, uploads)
    plain, _ = drive(make("fedbuff", buffer_size=2, server_lr=0.3 / 2), ONE, uploads)
    assert scaled == pytest.approx(plain, rel=1e-6)
    assert scaled[-1] != 1.0


def test_fedfa_by_hand():
    """k = 2: the queue is (1, 1), (3, 1), (3, 6), (0, 6)."""
    uploads = [(3.0, 1.0, arrival()), (6.0, 2.0, arrival(1)), (0.0, 1.0, arrival(2))]
    history, _ = drive(make("fedfa", fedfa_queue=2), ONE, uploads)
    assert history == pytest.approx([2.0, 4.5, 3.0])
    history, _ = drive(make("fedfa", fedfa_queue=2, server_lr=0.5), ONE, uploads[:1])
    assert history == pytest.approx([1.5])


# --- FedRevive on the step of another method ------------------------------------------------------


@pytest.mark.parametrize("base", ["fedbuff", "fedasync", "fadas"])
def test_revived_steps(base):
    """beta = 0 is the base method; beta = 1 never looks at the client's update; beta = 1/2 differs.

    The bases keep their own staleness weight, delay rule, rate and buffer.
    """
    settings = {"staleness_weight": "sqrt", "server_lr": 0.3, "buffer_size": 2}
    uploads = random_uploads(6, 2, staleness=3)
    others = [(w + 1.0, b, facts) for w, b, facts in uploads]

    def history(beta, uploads):
        config = resolve(
            "digits", "fedrevive", revive_on=base, beta_shape="constant", beta_constant=beta,
            **{**TINY, **settings},
        )  # fmt: skip
        return drive(revived(config, scalar_reviver(-1.0)), ONE, uploads)[0]

    plain, _ = drive(make(base, **settings), ONE, uploads)
    assert history(0.0, uploads) == plain
    assert history(1.0, uploads) == history(1.0, others) != plain
    assert history(0.5, uploads) not in (plain, history(0.5, others))


def test_a_revived_update_is_not_weighted_down():
    """The weight s(3) = 1/2 is for the raw part: 1 + 0.4 (1/2 (1/2 * 2) + 1/2 (-1))."""
    config = resolve(
        "digits", "fedrevive", revive_on="fedasync", fedasync_form="delta", server_lr=0.4,
        staleness_weight="sqrt", beta_shape="constant", beta_constant=0.5, **TINY,
    )  # fmt: skip
    method = revived(config, scalar_reviver(-1.0))
    history, _ = drive(method, ONE, [(3.0, 1.0, arrival(staleness=3))])
    assert history == pytest.approx([1.0])


def test_the_preset_of_the_step_is_its_methods():
    on = resolve("cifar10", "fedrevive", revive_on="fadas")
    assert (on.server_lr, on.buffer_size) == (1e-3, 5)
    assert resolve("cifar10", "fedrevive", revive_on="fadas", server_lr=2).server_lr == 2
    assert resolve("cifar10", "fedrevive", revive_on="fedbuff").server_lr == 0.1


# --- where the memory lives -----------------------------------------------------------------------


def settle(memory, folder):
    return {"cache_memory": memory, "cache_dir": str(folder)}


def test_where_the_memory_lives_changes_nothing(tmp_path):
    """Runs with device, host and disk agree bit for bit, also when continued from a checkpoint.

    With K = 6 in flight and entries under way to the host, some are read back before they are down.
    """
    config = small("ca2fl", buffer_size=2, server_lr=0.5, num_clients=7)
    ends = []
    for memory in ("device", "host", "disk"):
        own = dataclasses.replace(config, **settle(memory, tmp_path))
        simulation = Simulation(own)
        half = simulation.schedule.num_arrivals // 2
        assert half > 2 * client_cache.UNDER_WAY
        while simulation.position < half or simulation.server.snapshot()[0]["buffered"] == 0:
            simulation.advance()
        (tmp_path / memory).mkdir()
        checkpoints = Checkpoints(tmp_path / memory)
        record, arrays = simulation.snapshot()
        assert isinstance(jax.tree.leaves(arrays["cache"])[0], np.memmap) == (memory == "disk")
        saved = {"version": record["version"], "simulation": record}
        checkpoints.save(saved, simulation.server.params, arrays)
        for _ in simulation.arrivals():  # while the checkpoint may still be being written
            pass
        checkpoints.wait()

        continued = Simulation(own)
        read, params, arrays = checkpoints.load(
            record["version"],
            continued.server.params,
            lambda saved, simulation=continued: simulation.shapes(saved["simulation"]),
        )
        continued.restore(read["simulation"], params, arrays)
        for _ in continued.arrivals():
            pass
        checkpoints.close()
        ends += [simulation, continued]
    first = [ends[0].server.params, ends[0].server.method_state, ends[0].server.snapshot()[1]]
    for other in ends[1:]:
        same = [other.server.params, other.server.method_state, other.server.snapshot()[1]]
        for a, b in zip(*map(jax.tree.leaves, (first, same)), strict=True):
            np.testing.assert_array_equal(a, b)
    entries = jax.tree.leaves(first[2]["cache"])
    assert all(len(leaf) == 7 for leaf in entries)
    assert {bool(np.any(leaf)) for leaf in entries} == {True}
    assert {path.name for path in tmp_path.iterdir()} == {"device", "host", "disk"}


@pytest.mark.parametrize("memory", ["device", "host", "disk"])
def test_a_cache_gives_what_was_stored(memory, tmp_path):
    """bfloat16 entries too, some of them overtaking what is under way; snapshots stay."""
    entry = {
        "w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((), jnp.float32),
    }
    config = resolve("digits", "ca2fl", num_clients=20, **settle(memory, tmp_path))
    cache = client_cache.create(config, entry)

    def value(number):
        return {"w": jnp.full((2, 3), number, jnp.bfloat16), "b": jnp.asarray(float(number))}

    assert float(cache.fetch(3)["b"]) == 0.0
    expected = np.zeros(20)
    for number, client in enumerate([3, 4, 3, 5, 6, 7, 8, 9, 3, 19, 0, 3], start=1):
        cache.store(client, value(number))
        expected[client] = number
        np.testing.assert_array_equal(cache.fetch(client)["w"], value(number)["w"])
    copied = np.asarray if memory == "disk" else np.array
    snapshot = jax.tree.map(copied, cache.snapshot())
    for client in range(3, 3 + client_cache.UNDER_WAY + 2):  # so many that some come down
        cache.store(client, value(99))
    assert cache.fetch(3)["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(snapshot["b"], expected)
    assert float(cache.fetch(3)["b"]) == 99
    cache.restore(jax.tree.map(jnp.asarray, snapshot))
    assert [float(cache.fetch(client)["b"]) for client in range(20)] == expected.tolist()
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache.shapes())
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), snapshot)


def test_a_cache_that_cannot_fit_is_refused_at_once(tmp_path, monkeypatch):
    """A thousand clients at 44.66 MB against 40 GB; half of that, in bfloat16, fits a device."""
    monkeypatch.setattr(client_cache, "host_memory", lambda: 40 * 10**9)
    monkeypatch.setattr(client_cache, "device_memory", lambda: Memory(40 * 10**9, 0))
    config = resolve("cifar10", "ca2fl", cache_dir=str(tmp_path))
    needed = 1000 * 44_657_408
    with monkeypatch.context() as patch:
        patch.setattr(client_cache, "host_memory", lambda: 80 * 10**9)
        with pytest.raises(ConfigError) as refused:
            client_cache.check_fit(config, needed)
    assert str(refused.value).startswith(
        "cache_memory=device: the last updates of num_clients=1000 and what lives beside them "
        "need 44.7 GB there, of 40.0 GB"
    )
    client_cache.check_fit(config, needed // 2)
    with pytest.raises(ConfigError, match=r"need 42\.3 GB there"):
        client_cache.check_fit(config, needed // 2, beside=20 * 10**9)
    monkeypatch.setattr(client_cache, "device_memory", lambda: Memory(80 * 10**9, 0))
    with pytest.raises(ConfigError, match=r"copies 44\.7 GB to the host, which has 40\.0 GB"):
        client_cache.check_fit(config, needed)
    monkeypatch.setattr(client_cache, "device_memory", lambda: None)  # a CPU: both are on the host
    with pytest.raises(ConfigError, match=r"need 45\.7 GB there"):
        client_cache.check_fit(config, needed // 2, beside=10**9)
    client_cache.check_fit(config, needed // 3)
    host = dataclasses.replace(config, cache_memory="host")
    with pytest.raises(ConfigError, match=r"cache_memory=host: .* need 44\.7 GB"):
        client_cache.check_fit(host, needed // 2)  # a checkpoint holds a copy
    disk = dataclasses.replace(config, cache_memory="disk")
    with pytest.raises(ConfigError, match=r"cache_dir=.*: the last updates of"):
        client_cache.check_fit(disk, 10**18)
    lost = dataclasses.replace(disk, cache_dir=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="is not a folder that can be written to"):
        client_cache.check_fit(lost, 1)


def test_contradictions_are_told():
    for method, settings, message in (
        ("afl_dw", {"staleness_weight": "sqrt"}, "must be none with afl_dw: it weighs by beta"),
        ("fedfa", {"staleness_weight": "hinge"}, "averages whole models"),
        ("fadas", {"server_optimizer": "adam"}, "an optimiser of its own"),
        (
            "fedrevive",
            {"revive_on": "fadas", "server_optimizer": "adam"},
            "must be sgd with fadas: it is an optimiser",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Config(method=method, **settings)
    assert blending.create(Config(method="fedbuff", staleness_weight="beta"))(0) == 0
