"""Where versions wait, and how many jobs fit: the choice, and that it changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax import models
from fedrevive_jax.clients.local_training import train
from fedrevive_jax.clock import schedule
from fedrevive_jax.clock.windows import plan_windows
from fedrevive_jax.compute import chips, trees
from fedrevive_jax.dfkd import loss_guard, reviver, synthesis
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models.model import Vocabulary, initial_taps
from fedrevive_jax.presets import resolve
from fedrevive_jax.server import shelf as shelves
from fedrevive_jax.server.shelf import Memory
from fedrevive_jax.server.version_store import VersionStore
from fedrevive_jax.simulation import fitting, simulator, sizing
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import Fixed, assert_same_params, clock, play, rows, scalar_model, small


def kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def test_versions_in_host_memory_change_nothing():
    # CA2FL has parts of every kind: uploads, a method's state, and an entry of every client.
    on_device, receipts, _ = play(small("ca2fl", buffer_size=1, version_memory="device"))
    on_host, others, _ = play(small("ca2fl", buffer_size=1, version_memory="host"))
    for program in (on_host._train, on_host.server._step):
        assert program._cache_size() == 1  # arrays bound to a device would make a second
    assert rows(receipts) == rows(others)
    assert_same_params(on_device, on_host, atol=0)
    server = on_host.server
    stale = [v for v in server.live_versions if v != server.version]
    assert stale
    assert all(kinds(server._versions.stored(v)) == {"pinned_host"} for v in stale)
    assert kinds(server.params) == kinds(server.params_of(stale[0])) == {"device"}
    begun = Simulation(on_host.config)
    begun.train_ahead()
    assert len(begun.uploads) > 1
    assert all(kinds(upload) == {"pinned_host"} for upload in begun.uploads.values())


def test_only_what_is_not_the_newest_goes_to_the_shelf():
    stored, fetched = [], []
    shelf = shelves.Shelf(
        "host", lambda x: stored.append(x) or -x, lambda x: fetched.append(x) or -x
    )
    store = VersionStore(0, 10, shelf)
    assert (store.get(0), stored, fetched) == (10, [], [])
    store.acquire(0)
    store.put(1, 11)
    assert (stored, store.stored(0), store.get(0), store.get(1)) == ([10], -10, 10, 11)
    assert fetched == [-10]


def test_the_place_follows_the_room():
    config = resolve("digits", "fedbuff")
    for used, job, place in ((900, 100, "device"), (901, 100, "host"), (2000, 1, "host")):
        assert sizing.choose_place(config, job, used, 1000) == place
    forced = resolve("digits", "fedbuff", version_memory="device")
    assert sizing.choose_place(forced, 1, 2000, 1000) == "device"
    assert sizing.choose_place(config, 10**15, 10**15, None) == "device"  # as on a CPU


def test_as_many_jobs_as_fit():
    model, config = scalar_model()._replace(platform="gpu"), resolve("digits", "fedbuff")
    for used, job, count in ((0, 100, 10), (500, 100, 5), (990, 100, 1), (5000, 100, 1)):
        assert sizing.default_client_batch(model, config, job, used, 1000) == count
    assert sizing.default_client_batch(model, config, 1, 0, 1000) == sizing.JOBS_IN_A_CALL


def test_a_call_stays_in_fast_memory():
    """Two jobs at least, and no more than fit beside what lives there; without it, all that fit."""
    model, config = scalar_model()._replace(platform="tpu"), resolve("digits", "fedbuff")
    for job, used, fast, count in (
        (100, 0, 399, 3), (100, 0, 100, 2), (100, 900, 399, 1), (100, 0, 0, 10),
    ):  # fmt: skip
        assert sizing.default_client_batch(model, config, job, used, 1000, fast) == count
    assert [sizing.training_bytes(8, 100, jobs, fast=250) for jobs in (2, 3)] == [16, 50]
    assert sizing.training_bytes(8, 100, 3, fast=250, devices=4) == 50 + 12 * 8
    assert chips.fast_memory("TPU v5 lite") == 128 * 2**20
    assert chips.fast_memory("cpu") == 0


def test_as_many_teachers_as_fit():
    """Of eight: all, half of them, one where nothing fits; what is asked for is not changed."""
    model, params = tiny_convnet()
    model = model._replace(platform="tpu")
    config = resolve("fashion_mnist", "fedrevive", num_teachers=8, samples="real")

    def chosen(room, **fields):
        own = dataclasses.replace(config, **fields)
        return sizing.teachers_in_a_call(own, model, params, 1000, room)

    needed = {
        size: 1000
        + sizing.revival_bytes(dataclasses.replace(config, teacher_batch=size), model, params)
        for size in (8, 4, 2, 1)
    }
    assert chosen(needed[8]) == 0
    assert chosen(needed[8] - 1) == 4
    assert chosen(needed[4] - 1) == 2
    assert chosen(needed[1] - 1) == 1
    assert chosen(None) == 0
    assert chosen(1, teacher_batch=2) == 2
    assert chosen(1, method="fedbuff", samples="generator") == 0


def test_jobs_in_a_call_on_a_cpu():
    """Two of small images; one of large images, and of texts, whose few numbers become many."""
    config = resolve("digits", "fedbuff", batch_size=32)
    for model, shape, count in (
        ("digitsnet", (8, 8, 1), 2), ("convnet", (28, 28, 1), 1), ("resnet18", (32, 32, 3), 1),
    ):  # fmt: skip
        images = models.make_network(model, input_shape=shape, num_classes=10, width=4)
        assert sizing.default_client_batch(images, config, 1, 0, None) == count
    texts = scalar_model()._replace(vocabulary=Vocabulary(16, 8))
    assert sizing.default_client_batch(texts, config, 1, 0, None) == 1


@pytest.mark.parametrize(
    ("limit", "devices", "size"),
    [
        # Of CALL_COST = 2: of ten jobs two calls of five take 2 * 7, three of four 3 * 6, two of
        # eight 2 * 10.
        (8, 1, 5),
        # Three of four take 3 * 6, four of three 4 * 5.
        (4, 1, 4),
        # Of two devices one call of five each takes 7, two of four 2 * 6.
        (8, 2, 10),
        # Two of three take 2 * 5, three of two 3 * 4.
        (3, 2, 6),
    ],
)
def test_calls_of_the_size_that_suits_cohorts(limit, devices, size):
    """Ten clients, who all start anew when the last of them has arrived."""
    assert sizing.CALL_COST == 2
    plan = clock(Fixed([1.0] * 10), 10, 10, 10, 10)
    assert sizing.jobs_in_a_call(plan, limit, devices) == size


def test_calls_as_large_as_can_be_kept_full():
    """Without cohorts a call waits until it is full; the more are in flight, the larger it is. Of a
    long plan its beginning decides."""
    config = resolve("cifar10", "fedrevive", max_time=20.0)
    plan = schedule.create(config)
    assert sizing.jobs_in_a_call(plan, 9) == 9
    assert sizing.jobs_in_a_call(plan, 4, devices=2) == 8
    few = schedule.create(dataclasses.replace(config, concurrency=4))
    assert 1 < sizing.jobs_in_a_call(few, 9) <= 4
    longer = schedule.create(dataclasses.replace(config, max_time=100.0))
    longest = schedule.create(dataclasses.replace(config, max_time=120.0))
    assert longer.num_arrivals > sizing.SIZED_BY
    assert sizing.jobs_in_a_call(longer, 32) == sizing.jobs_in_a_call(longest, 32)
    none = clock(Fixed([5.0]), 1, 1, max_time=1.0)
    assert sizing.jobs_in_a_call(none, 8, devices=2) == 2


@pytest.mark.parametrize("method", ["fedrevive", "fedbuff"])
def test_few_calls_of_the_published_plans_are_padded(method):
    """Of what is trained less than one in a hundred, and few uploads wait; windows of all that can
    be trained, each in calls of its own, are the control."""
    config = resolve("cifar10", method, max_time=60.0)
    plan = schedule.create(config)
    for jobs in (2, 9, 16):
        calls = sizing.plan_calls(config, plan, jobs)
        assert len(calls) * jobs <= 1.01 * plan.num_arrivals
        trained = np.cumsum([len(call.jobs) for call in calls])
        assert (trained - [call.first_arrival for call in calls]).max() <= 2 * jobs
        apart = sum(-(-len(window.jobs) // jobs) for window in plan_windows(plan))
        assert apart * jobs > 1.01 * plan.num_arrivals
    alone = dataclasses.replace(config, window_limit=1)
    assert len(sizing.plan_calls(alone, plan, 9)) == plan.num_arrivals


def tiny_convnet():
    """The ConvNet at 28x28 and width 8, and the shapes of its parameters."""
    model = models.make_network(
        "convnet", input_shape=(28, 28, 1), num_classes=10, width=8, convolution="lax"
    )
    return model, jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("batch", [8, 32])
def test_a_job_keeps_its_activations(batch):
    """Of every sample the inputs of the second and third convolution and their outputs, in float32,
    at the least; and no more than ten times that. Nothing but the copies of the parameters is
    needed beside what grows with the batch."""
    model, params = tiny_convnet()
    own = sizing.COPIES * 4 * models.parameter_count(params)
    activations = 4 * batch * 8 * (26 * 26 + 24 * 24 + 12 * 12 + 10 * 10)
    kept = sizing.job_bytes(model, params, batch) - own
    assert activations <= kept <= 10 * activations
    assert sizing.job_bytes(model, params, 2 * batch) - own == 2 * kept


def reserved(function, *given):
    """Bytes that XLA reserves for a call, its arguments and results apart."""
    compiled = jax.jit(function).lower(*given).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_what_xla_reserves_for_a_job():
    """The estimate knows nothing of what XLA fuses and reuses; here it is within a fifth."""
    model, params = tiny_convnet()
    batches = (
        jax.ShapeDtypeStruct((3, 64, 28, 28, 1), jnp.float32),
        jax.ShapeDtypeStruct((3, 64), jnp.int32),
    )
    temporary = reserved(
        lambda params, batches: train(model, params, batches, lambda batch: (*batch, None), 1e-3),
        params,
        batches,
    )
    start_and_upload = 2 * trees.nbytes(params)
    told = sizing.job_bytes(model, params, 64)
    assert told == pytest.approx(temporary + start_and_upload, rel=0.2)


def test_what_xla_reserves_for_a_synthesis():
    """As for a job; the generator keeps a good third of it."""
    model, params = tiny_convnet()
    config = resolve(
        "fashion_mnist", "fedrevive", num_teachers=4, synthesis_batch=32, model_width=8,
        generator_features=16, distillation_batch=2, convolution="lax", data_dir="data",
        preset_revival="published",
    )  # fmt: skip
    synthesiser, maker = reviver.make_synthesiser(config, model, lambda samples, key: samples)

    def given(key):
        def ring(tree):
            return jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), tree)

        params, mixes = model.init(key), jnp.full((4, 10), 0.1)
        drawn = synthesiser.draw(key, mixes, jnp.ones(4, bool), ())
        ensemble = synthesis.Ensemble(
            ring(params), ring(initial_taps(model)), mixes, params, jnp.asarray(True), ()
        )
        return synthesiser.init(maker.init(key)), drawn, ensemble, loss_guard.init(config), key

    shapes = jax.eval_shape(given, jax.random.key(0))
    told = sizing.revival_bytes(config, model, params)
    assert told == pytest.approx(reserved(synthesiser.synthesise, *shapes), rel=0.25)


def test_a_server_step_needs_room_for_what_it_keeps(monkeypatch):
    """A step of synthesis keeps the activations of each of c teachers and of the student; a step of
    the student is a job of c b samples. Whichever is larger decides where versions wait."""
    model, params = tiny_convnet()
    own = sizing.COPIES * 4 * models.parameter_count(params)
    sizes = {
        "num_teachers": 4, "distillation_batch": 2, "synthesis_batch": 32, "teacher_batch": 4,
        "model_width": 8, "data_dir": "data",
    }  # fmt: skip
    config = resolve("fashion_mnist", "fedrevive", preset_revival="published", **sizes)
    job = sizing.job_bytes(model, params, 32) - own
    # Beside them the generator: its images' activations, in float32, once each at the least.
    features = config.generator_features
    images = 32 * 4 * (2 * features * 14 * 14 + features * 28 * 28)
    generator = sizing.revival_bytes(config, model, params) - (4 + 1) * job
    assert images <= generator <= 10 * images
    reference = dataclasses.replace(config, method="dd_fedrevive", samples="real")
    student = sizing.job_bytes(model, params, 4 * 2)
    assert sizing.revival_bytes(reference, model, params) == student
    # Where each sample has one judge, two networks and not five keep what they did.
    single = sizing.revival_bytes(dataclasses.replace(config, judges="own"), model, params)
    assert single == 2 * job + generator
    few = dataclasses.replace(config, synthesis_batch=1)
    assert sizing.revival_bytes(few, model, params) == student
    assert sizing.revival_bytes(dataclasses.replace(config, method="fedbuff"), model, params) == 0

    # A simulation asks for it: with room for a job alone its versions go to the host.
    told = []
    choose = sizing.choose_place
    monkeypatch.setattr(
        sizing, "choose_place", lambda *given: told.append(given[1]) or choose(*given)
    )
    tiny = Simulation(small("fedrevive"))
    assert told == [sizing.revival_bytes(tiny.config, tiny.model, tiny.server.params)]
    assert told[0] > sizing.job_bytes(tiny.model, tiny.server.params, tiny.config.batch_size)


# --- what the compiler says -----------------------------------------------------------------------


def on_a_device_of(limit, used, monkeypatch):
    """Only the device's own report is made up: programs and their sizes are the compiler's."""
    monkeypatch.setattr(simulator, "device_memory", lambda: Memory(limit, used))


@pytest.mark.parametrize(
    ("method", "field", "remedy"),
    [("fedbuff", "client_batch", "batch_size"), ("fedrevive", "teacher_batch", "num_teachers")],
)
def test_a_program_that_does_not_fit_is_told_before_the_first_arrival(
    monkeypatch, method, field, remedy
):
    config = small(method, client_batch=2)
    probe = Simulation(config)
    size = fitting.new_bytes(probe.server.compile())
    assert size > 0
    used = 10**9
    if field == "teacher_batch":  # one byte less than it takes
        on_a_device_of(used + size - 1 + probe._room.beside, used, monkeypatch)
        monkeypatch.setattr(Simulation, "_check_training", lambda self, call: None)
    else:
        on_a_device_of(used + probe._room.beside, used, monkeypatch)
    run = Simulation(config)
    with pytest.raises(ConfigError, match=rf"^{field}=\d+: .* beside 1.00 GB in use .*{remedy}"):
        run.advance()
    assert run.server.version == 0


def test_what_would_make_room_is_possible(monkeypatch):
    """Nothing is to become smaller than one, and a method that distils nothing has no teachers."""
    probe = Simulation(small("fedbuff"))
    compiled, full = probe.server.compile(), Memory(1, 1)
    for config, batch, words in (
        (small("fedbuff", precision="bfloat16"), 1, "^method=fedbuff: .*; give a smaller model$"),
        (
            small("fedrevive"),
            0,
            "^teacher_batch=3: .*; give a smaller teacher_batch or num_teachers or ",
        ),
        (small("fedrevive"), 1, "^teacher_batch=1: .*; give a smaller num_teachers or "),
    ):
        with pytest.raises(ConfigError, match=words):
            fitting.check_server_step(config, compiled, full, 0, batch)
    for batch, words in ((1, "a smaller batch_size"), (2, "a smaller client_batch or batch_size")):
        with pytest.raises(
            ConfigError, match=f"^client_batch={batch}: .*; give {words} or version_"
        ):
            fitting.check_training(small("fedbuff"), compiled, full, 1, batch)


def test_a_program_that_fits_is_compiled_once_and_nothing_is_asked_of_a_cpu(monkeypatch):
    config = small("fedbuff", max_time=2.0)
    assert Simulation(config)._memory is None
    on_a_device_of(10**12, 0, monkeypatch)
    run = Simulation(config)
    checked = []
    for name in ("check_training", "check_server_step"):
        check = getattr(fitting, name)
        monkeypatch.setattr(
            fitting, name, lambda *a, name=name, check=check: checked.append(name) or check(*a)
        )
    list(run.arrivals())
    assert sorted(checked) == ["check_server_step", "check_training"]  # once each
    assert run._train._cache_size() == run.server._step._cache_size() == 1
