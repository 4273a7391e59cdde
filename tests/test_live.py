"""The coordinator of a live federation, without a network."""

import functools
import re
import resource

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrevive_jax.errors import ConfigError
from fedrevive_jax.live import packing, serving
from fedrevive_jax.live.coordinator import Coordinator, Times, drawn, prepared
from fedrevive_jax.live.federation import Federation
from fedrevive_jax.live.link import Message
from fedrevive_jax.live.registry import LONGEST_REST, Registry
from fedrevive_jax.live.trainer import Options, Trainer
from fedrevive_jax.presets import resolve
from fedrevive_jax.record import files, lock
from fedrevive_jax.record.reading import read_params
from fedrevive_jax.running import runner
from fedrevive_jax.server.core import Server
from fedrevive_jax.simulation.simulator import Simulation
from tests.links import Direct, Hostile, Planned
from tests.toys import ONE, make, rows, scalar_upload, small

# A client is free when its upload arrives, in a simulation as it is live.
AT_ONCE = {"delays": "exponential", "delay_download": 0.0, "delay_upload": 0.0}


def simulated(config):
    """A simulation that is over, its receipts, and all its uploads as they would be sent."""
    simulation, uploads, receipts = Simulation(config), {}, []
    while not simulation.finished:
        simulation.train_ahead()
        uploads.update(simulation.uploads)
        receipts.append(simulation.advance())
    return simulation, receipts, {job: packing.pack(own) for job, own in uploads.items()}


def live(config, link, choose, **kwargs):
    """A federation that has processed all that comes over a link."""
    ticks = iter(range(10**9))
    federation = Federation(
        config, link=link, choose=choose, clock=lambda: next(ticks) / 1e6,
        wait=lambda seconds: None, **kwargs,
    )  # fmt: skip
    receipts = []
    while (receipt := federation.advance()) is not None:
        receipts.append(receipt)
    return federation, receipts


@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        ("fedrevive", {}),
        ("fedbuff", {"buffer_size": 3}),
        ("ca2fl", {"max_time": 12.0}),
        ("fedavg", {"concurrency": 4}),
    ],
)
def test_the_same_uploads_make_the_same_model_simulated_and_live(method, kwargs):
    config = small(method, **{**AT_ONCE, **kwargs})
    simulation, expected, packed = simulated(config)
    order = simulation.schedule.job.tolist()
    link = Planned(config.num_clients, order, packed)
    federation, receipts = live(
        config, link, lambda job, free: int(simulation.schedule.client[job])
    )
    assert rows(receipts) == rows(expected)
    assert federation.server.version == simulation.server.version > 1
    for live_state, state in zip(
        *(
            jax.tree.leaves((run.server.params, run.server.method_state))
            for run in (federation, simulation)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(live_state, state)


def test_a_client_that_comes_back_by_another_node_takes_over_its_seat_and_its_slot():
    server, link, coordinator = hostile(believes_names=True)
    link.up = {1}
    coordinator.advance(0.0)
    ready = Message("prepare", {"name": "a client"})
    link.answer(*link.open, ready)
    coordinator.advance(0.1)
    assert coordinator.jobs == {0: 1}
    old = next(iter(link.open))
    link.up = {4}  # started again
    coordinator.advance(0.2)
    link.answer(next(name for name in link.open if name != old), ready)
    coordinator.advance(0.3)
    assert coordinator.jobs == {1: 4}  # the first job is given up at once
    link.answer(old, good())
    assert coordinator.advance(0.4) is None
    assert coordinator.ignored == 1
    link.answer(*link.open, good())
    arrived = coordinator.advance(0.5)
    assert arrived is not None
    assert (arrived.receipt.job, arrived.receipt.client) == (1, 0)
    assert server.rejected == {}


def ask(link, coordinator, now, message):
    """Lets every node answer what it was asked, and the coordinator take all of it in."""
    for flight in list(link.open):
        link.answer(flight, message)
    taken = 0
    for _ in range(NODES + 1):
        taken += coordinator.advance(now) is not None
    return taken


@pytest.mark.parametrize("body", ["short", "nan", "dead"])
def test_a_client_rests_longer_until_an_upload_is_sound(body):
    _, link, coordinator = hostile()
    link.up, now, rests = {0}, 0.0, []
    client = None
    for round_ in range(6):
        coordinator.advance(now)
        ask(link, coordinator, now, good())  # it makes itself ready
        client = coordinator._registry.clients[0]
        ask(link, coordinator, now, BODIES[body] if round_ < 4 else good())
        coordinator.advance(now)
        rests.append(round(client.rests_until - now, 6))
        now = max(now, client.rests_until) + 0.001
    assert rests[:4] == [1, 2, 4, 8]
    assert client is not None
    assert client.failures == 0


def test_a_cohort_goes_on_where_it_was(tmp_path):
    """FedAvg stays synchronous: the others of a round, and no more, complete it after a restart."""
    config = small("fedavg", num_clients=6, concurrency=4, max_versions=100, max_time=1e9)
    shape = jax.eval_shape(Simulation(config).server.upload_like)
    body = packing.pack(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shape))

    def some(federation, link, count):
        receipts = []
        while len(receipts) < count:
            for flight in list(link.open)[: count - len(receipts) or None]:
                link.answer(flight, Message("train", {}, body))
            if (receipt := federation.advance()) is not None:
                receipts.append(receipt)
        return receipts

    def made():
        ticks = iter(range(10**9))
        link = Hostile(6)
        return link, Federation(
            config, link=link, clock=lambda: next(ticks) / 1e3, wait=lambda seconds: None
        )

    link, first = made()
    some(first, link, 6)  # one round, and two of the next
    record, arrays = jax.device_get(first.snapshot())
    assert (record["version"], record["buffered"], record["cohort"]) == (1, 2, 2)
    link, second = made()
    second.restore(record, first.server.params, arrays)
    receipts = some(second, link, 6)
    assert [r.staleness for r in receipts] == [0] * 6
    assert [r.version for r in receipts] == [1, 1, 2, 2, 2, 2]


def test_a_method_that_changes_what_clients_train_is_refused():
    with pytest.raises(ConfigError, match="method=fedgen: changes what clients train"):
        Federation(small("fedgen"), link=Planned(1, [], {}))


def test_true_histograms_are_refused():
    with pytest.raises(ConfigError, match="proxy=histogram: is for simulations"):
        Federation(small("fedrevive", proxy="histogram"), link=Planned(1, [], {}))


NODES, K = 5, 3
TAPS = ((jnp.zeros(1), jnp.ones(1)),)


@functools.cache
def scalar_server():
    """A server of a scalar model, whose step is traced once in all tests, and how it began."""
    method = make("fedbuff", num_clients=NODES, concurrency=K)
    chex.clear_trace_counter()
    method = method._replace(step=chex.assert_max_traces(method.step, n=1))
    server = Server(method, ONE, TAPS, seed=0, num_clients=NODES)
    return server, jax.device_get(server.snapshot())


def hostile(open_slots=1, **kwargs):
    """A coordinator of a scalar model over a link that does the worst."""
    server, (record, arrays) = scalar_server()
    server.restore(record, ONE, arrays)
    link = Hostile(NODES)
    coordinator = Coordinator(
        server, link, Registry(NODES), jax.eval_shape(lambda: scalar_upload(0.0)),
        prepared("{}", "digest"), concurrency=K, open_slots=open_slots, choose=drawn(0),
        times=Times(job=10, prepare=20, rest=1), **kwargs,
    )  # fmt: skip
    return server, link, coordinator


def good(w=0.5):
    return Message("train", {"seconds": 0.5}, packing.pack(scalar_upload(w)))


BODIES = {
    "good": good(),
    "nan": good(float("nan")),
    "short": Message("train", {}, b"\0"),
    "long": Message("train", {"seconds": "x"}, good().body + b"\0"),
    "empty": Message("train", {"version": "no", "seconds": float("inf")}, b""),
    "huge": Message("train", {"seconds": 10**400}, good().body),
    "none": Message("train", {"seconds": -1}, None),  # type: ignore[arg-type]
    "wrong version": Message("train", {"version": 10**9}, good().body),
    "dead": None,
}
ACTS = st.one_of(
    st.tuples(st.just("answer"), st.integers(0, 9), st.sampled_from(sorted(BODIES))),
    st.tuples(st.just("again"), st.integers(0, 99), st.sampled_from(sorted(BODIES))),
    st.tuples(st.just("lose"), st.integers(0, NODES - 1)),
    st.tuples(st.just("return"), st.integers(0, NODES - 1)),
    st.tuples(st.just("refuse"), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 3.0, 30.0])),
)


def act(link, kind, *what):
    """Does one thing to a link; returns the seconds that pass."""
    flights = sorted(link.open if kind == "answer" else link.over)
    if kind in ("answer", "again") and flights:
        link.answer(flights[what[0] % len(flights)], BODIES[what[1]], "a reason")
    elif kind == "lose":
        link.up.discard(what[0])
    elif kind == "return":
        link.up.add(what[0])
    elif kind == "refuse":
        link.refuses = what[0]
    return what[0] if kind == "wait" else 0.0


def check(server, coordinator, open_slots):
    """What holds at every moment: no slot and no job is lost, and no version is kept for nobody."""
    at_work, cohort, vacant = coordinator.slots
    assert at_work + cohort + vacant == K
    assert 0 <= cohort < open_slots
    assert {ticket[0] for ticket in server.snapshot()[0]["jobs"]} == set(coordinator.jobs)
    assert len(set(coordinator.jobs.values())) == at_work  # one job a node
    assert len(server.live_versions) <= at_work + 1


def test_who_refused_again_and_again_is_asked_again():
    """Found by the search below: rests grow with each refusal, and a first deadline adds one."""
    long = [("wait", seconds) for seconds in (3.0, 3.0, 30.0, 30.0)]
    survive(K, [("refuse", True), *long])


@pytest.mark.parametrize("open_slots", [1, K])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(acts=st.lists(ACTS, max_size=60))
def test_nothing_that_nodes_or_network_do_loses_a_slot_or_a_job(open_slots, acts):
    survive(open_slots, acts)


@pytest.mark.slow
@pytest.mark.parametrize("open_slots", [1, K])
@settings(max_examples=500, deadline=None, derandomize=True)
@given(acts=st.lists(ACTS, max_size=60))
def test_nor_does_it_in_a_thousand_random_sequences(open_slots, acts):
    survive(open_slots, acts)


def survive(open_slots, acts):
    """Does what is told, then lets all be well again, and holds the coordinator to its promises."""
    server, link, coordinator = hostile(open_slots=open_slots)
    now = 0.0
    for kind, *what in acts:
        now += act(link, kind, *what)
        arrived = coordinator.advance(now)
        assert arrived is None or 0 <= arrived.training <= arrived.round_trip
        check(server, coordinator, open_slots)
    # Once all is well again, the work goes on.
    link.up, link.refuses = set(range(NODES)), False
    for _ in range(30 + LONGEST_REST):  # beyond every deadline and the longest rest
        for flight in list(link.open):
            link.answer(flight, good())
        now += 1.0
        coordinator.advance(now)
    taken = 0
    for _ in range(4 * K):
        for flight in list(link.open):
            link.answer(flight, good())
        for _ in range(2 * NODES):
            now += 0.1
            taken += coordinator.advance(now) is not None
            check(server, coordinator, open_slots)
    assert taken >= 4 * K


def texts(folder, classes, count, seed):
    """Texts whose class is told by half of their words, in folders named after the classes."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            words = [f"{name}{k}" for k in range(5)] + [f"common{k}" for k in range(5)]
            (folder / name / f"{number}.txt").write_text(" ".join(generator.choice(words, 8)))
    return folder


@pytest.mark.slow
def test_clients_train_on_texts_of_their_own_with_the_servers_tokenizer_and_classes(tmp_path):
    common = {"preset_scale": "small", "text_length": 16, "vocabulary_size": 128}
    config = resolve(
        "text_folder", "fedrevive", **common, data_dir=str(texts(tmp_path / "s", "abc", 20, 0)),
        num_clients=2, concurrency=2, max_versions=24, max_time=1e9, local_iterations=8,
        client_lr=0.01, server_lr=0.5, buffer_size=1, generation_interval=1, freeze_versions=2,
        warmup_versions=4, beta_s_max=2,
    )  # fmt: skip
    # Neither holds all classes; on their own both would number them 0 and 1.
    own = [
        resolve(
            "text_folder", "fedbuff", **common, data_dir=str(texts(tmp_path / name, held, 40, n))
        )
        for n, (name, held) in enumerate({"one": "ab", "two": "bc"}.items(), start=1)
    ]
    link = Direct([Trainer(Options(config)) for config in own])
    federation = Federation(runner.settle(config), link=link)
    start = federation.evaluate()
    distilled = []
    while not federation.finished:
        if (receipt := federation.advance()) is not None:
            distilled.append(float(receipt.metrics["distillation"]))
    assert np.isfinite(distilled).any()
    found = federation.evaluate()
    assert found.accuracy > max(0.8, start.accuracy)
    assert min(found.per_class) > 0.5  # class c too, which only the second client holds


def test_a_full_disk_is_told_and_the_newest_checkpoint_stays(tmp_path, caplog):
    config = runner.settle(
        small("fedbuff", max_versions=1000, max_time=1e9, num_clients=2, concurrency=1,
              buffer_size=1, workdir=str(tmp_path / "run"), checkpoint_every=2)
    )  # fmt: skip
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(message):
        if message.header.get("job") == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))

    state = tmp_path / "state"
    state.mkdir()
    serving.Order(config, Times(), 0.0).write(state)
    try:
        serving.serve(state, Direct([Trainer(Options(config))] * 2, fill_up))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"error: workdir={config.run_dir}: " in caplog.text
    kept = int(re.search(r"the newest on disk is of version (\d+)", caplog.text)[1])
    assert not lock.is_held(state)
    version, _ = read_params(config.run_dir, Federation(config, link=Direct([])).model)
    assert version == kept >= 2
    # There is room again, and the run goes on from there.
    stop = state / serving.STOP

    def enough(message):
        if message.header.get("version") == 9:
            stop.touch()

    serving.serve(state, Direct([Trainer(Options(config))] * 2, enough))
    status = files.read_json(state / serving.STATUS)
    assert status["state"] == serving.STOPPED
    rows = files.read_rows(config.run_dir / files.ARRIVALS)
    assert [row["version"] for row in rows] == list(range(len(rows)))
    assert len(rows) >= 9


def test_one_run_at_a_time_is_told_by_its_lock(tmp_path):
    assert not lock.is_held(tmp_path)
    with lock.exclusive(tmp_path):
        assert lock.is_held(tmp_path)
    assert not lock.is_held(tmp_path)
