"""FedGen: its losses and a training of its generator by hand, what travels, limits, resumption."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax import models
from fedrevive_jax.clients.local_training import make_window_trainer
from fedrevive_jax.config import FedGen
from fedrevive_jax.dfkd import features, losses
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.messages import ClientPart, Download
from fedrevive_jax.methods import Ingredients, create, fedgen
from fedrevive_jax.models import t5
from fedrevive_jax.models.model import Text, dense_head, with_precision
from fedrevive_jax.presets import resolve
from fedrevive_jax.server.core import Server
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import (
    KEY,
    ONE,
    arrival,
    assert_same_params,
    make,
    play,
    rows,
    scalar_model,
    scalar_upload,
    small,
    submission,
)

# Versions of two arrivals, six clients at work: the generator is trained at every third.
ASYNCHRONOUS = {"fedgen_on": "fedbuff", "buffer_size": 2, "server_lr": 0.3, "fedgen_steps": 5}

# --- losses ---------------------------------------------------------------------------------------


def test_class_weights_by_hand():
    """Clients that saw 3 and 1 of class 0, and none of class 1; a place without a client."""
    heads = features.Heads(
        (), jnp.asarray([[3.0, 0.0], [1.0, 0.0], [9.0, 9.0]]), jnp.asarray([True, True, False])
    )
    weights, seen = features.class_weights(heads)
    assert seen.tolist() == [True, False]
    np.testing.assert_allclose(
        losses.teacher_weights(weights, jnp.asarray([0, 1])),
        [[4 / 6, 1 / 2], [2 / 6, 1 / 2], [0, 0]],
        rtol=1e-6,
    )


def test_diversity_by_hand():
    """Noise (0, 0) and (1, 1), features (0, 0) and (2, 4): of four pairs two are 1 * 3 apart."""
    eps, made = jnp.asarray([[0.0, 0], [1, 1]]), jnp.asarray([[0.0, 0], [2, 4]])
    assert float(features.diversity_loss(eps, made)) == pytest.approx(math.exp(-1.5))
    assert float(features.diversity_loss(eps, jnp.ones((2, 3)))) == 1.0


def test_the_students_loss_by_hand():
    """Together the teachers say softmax(log 9 / 2 + log 1 / 2, 0) = (3/4, 1/4), the student 1/2.

    KL = 3/4 log(3/2) + 1/4 log(1/2), over two classes; of two samples the other agrees.
    """
    answers = jnp.log(jnp.asarray([[[9.0, 1], [1, 1]], [[1, 1], [1, 1]]]))
    loss = features.student_loss(jnp.full((2, 2), 0.5), answers, jnp.zeros((2, 2)))
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(loss) == pytest.approx(divergence / 2 / 2, rel=1e-5)


# --- the generator --------------------------------------------------------------------------------


def linear(classes):
    """A model of which a dense head alone is looked at."""
    return scalar_model()._replace(num_classes=classes, head=dense_head("last"))


def constant(value, classes=2, trained=1):
    """A generator of noise 1 and hidden 1 whose features [1] are all the same."""
    start = features.init(KEY, classes, 1, FedGen(fedgen_noise=1, fedgen_hidden=1))
    output = {"kernel": jnp.zeros((1, 1)), "bias": jnp.full(1, value)}
    return start._replace(
        params={**start.params, "output": output}, trained=jnp.asarray(trained, jnp.int32)
    )


def test_features_by_hand():
    """h = 2 eps + (1, 5)[y] - 1; mean 1, variance 4 running: (h - 1) / 2, relu, times 3, plus 1.

    In training h = 0 and 8 have mean 4 and variance 16: -1 and 1; the running ones then take a
    tenth of 4, and of 16 * 2 / 1.
    """
    params = {
        "hidden": {"kernel": jnp.asarray([[2.0], [1], [5]]), "bias": jnp.asarray([-1.0])},
        "norm": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
        "output": {"kernel": jnp.full((1, 1), 3.0), "bias": jnp.ones(1)},
    }
    generator = features.FeatureGenerator(params, jnp.ones(1), jnp.full(1, 4.0), jnp.asarray(0))
    eps, labels = jnp.asarray([[0.0], [2.0]]), jnp.asarray([0, 1])
    made = features.make(generator, eps, labels)
    np.testing.assert_allclose(made, [[1.0], [1 + 3 * 3.5]], rtol=1e-4)
    made, mean, variance = features.make_in_training(generator, eps, labels)
    np.testing.assert_allclose(made, [[1.0], [1 + 3 * 1]], rtol=1e-4)
    assert float(mean[0]) == pytest.approx(0.9 * 1 + 0.1 * 4)
    assert float(variance[0]) == pytest.approx(0.9 * 4 + 0.1 * 32)


def in_numpy(params, eps, labels, heads, counts, head, settings):
    """L_teacher - beta L_student + eta L_diversity of plain arrays, and the batch's statistics."""

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    w1, b1, scale, offset, w2, b2 = params
    hidden = np.concatenate([eps, np.eye(3)[labels]], axis=1) @ w1 + b1
    mean, variance = hidden.mean(axis=0), hidden.var(axis=0)
    normal = (hidden - mean) / np.sqrt(variance + 1e-5) * scale + offset
    made = np.maximum(normal, 0) @ w2 + b2
    loss, together = 0.0, 0.0
    share = (1 + counts) / (1 + counts).sum(axis=0)
    for (kernel, bias), own in zip(heads, share, strict=True):
        logits = made @ kernel + bias
        for i, y in enumerate(labels):
            loss -= own[y] * log_softmax(logits)[i, y] / len(labels)
        together = together + own[labels][:, None] * logits
    teacher, student = log_softmax(together), log_softmax(made @ head[0] + head[1])
    loss -= settings.fedgen_student * (np.exp(teacher) * (teacher - student)).mean()
    apart = 0.0
    for i in range(len(eps)):
        for j in range(len(eps)):
            apart += ((eps[i] - eps[j]) ** 2).mean() * np.abs(made[i] - made[j]).mean()
    return loss + settings.fedgen_diversity * np.exp(-apart / len(eps) ** 2), mean, variance


@pytest.mark.usefixtures("x64")
def test_a_training_of_the_generator():
    """Two steps against losses written anew, gradients by differences, and PyTorch's Adam."""
    settings = FedGen(
        fedgen_noise=2, fedgen_hidden=3, fedgen_batch=4, fedgen_steps=2, fedgen_lr=0.1,
        fedgen_weight_decay=0.01, fedgen_student=0.5, fedgen_diversity=2.0, fedgen_decay=0.5,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    draws = [(rng.normal(size=(2, 3)), rng.normal(size=3)) for _ in range(3)]
    *teachers, own = draws
    counts = np.asarray([[5.0, 0, 0], [1, 4, 0]])  # nobody has seen the last class
    state = features.start(jax.random.key(1), 3, 2, settings)
    generator = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state.generator.params)
    state = features.FeatureGeneratorState(
        state.generator._replace(params=generator, trained=jnp.asarray(2)),
        features.make_optimizer(settings).init(generator),
    )

    def head(kernels, biases):
        return {"kernel": jnp.asarray(kernels), "bias": jnp.asarray(biases)}

    heads = features.Heads(
        head(*(np.stack(leaves) for leaves in zip(*teachers, strict=True))),
        jnp.asarray(counts),
        jnp.ones(2, bool),
    )
    train = jax.jit(features.make_trainer(linear(3), settings))
    after, told = train(state, heads, head(*own), KEY)
    assert int(after.generator.trained) == 3
    assert all(math.isfinite(value) for value in told.values())

    flat = jax.tree.leaves(
        [generator["hidden"]["kernel"], generator["hidden"]["bias"], generator["norm"]["scale"],
         generator["norm"]["bias"], generator["output"]["kernel"], generator["output"]["bias"]]
    )  # fmt: skip
    params = [np.array(leaf) for leaf in flat]
    first = [np.zeros_like(p) for p in params]
    second = [np.zeros_like(p) for p in params]
    mean, variance = np.zeros(3), np.ones(3)
    drawn = set()
    for number in (0, 1):
        label_key, noise_key = jax.random.split(jax.random.fold_in(KEY, number))
        allowed = jnp.asarray([0.0, 0.0, -jnp.inf])
        labels = np.asarray(jax.random.categorical(label_key, allowed, shape=(4,)))
        eps = np.asarray(features.noise(noise_key, 4, settings))
        drawn |= set(labels.tolist())

        def loss(own_params, eps=eps, labels=labels):
            return in_numpy(own_params, eps, labels, teachers, counts, own, settings)[0]

        _, batch_mean, batch_variance = in_numpy(
            params, eps, labels, teachers, counts, own, settings
        )
        mean, variance = (
            0.9 * mean + 0.1 * batch_mean,
            0.9 * variance + 0.1 * batch_variance * 4 / 3,
        )
        gradients = []
        for place, leaf in enumerate(params):
            gradient = np.zeros_like(leaf)
            for index in np.ndindex(leaf.shape):
                sides = []
                for shift in (1e-6, -1e-6):
                    moved = [p.copy() for p in params]
                    moved[place][index] += shift
                    sides.append(loss(moved))
                gradient[index] = (sides[0] - sides[1]) / 2e-6
            gradients.append(gradient + 0.01 * leaf)
        for p, m, v, g in zip(params, first, second, gradients, strict=True):
            m[...] = 0.9 * m + 0.1 * g
            v[...] = 0.999 * v + 0.001 * g**2
            corrected = m / (1 - 0.9 ** (number + 1)), v / (1 - 0.999 ** (number + 1))
            # The third training: 0.1 * 0.5^2.
            p -= 0.025 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    assert drawn == {0, 1}
    found = after.generator.params
    expected = dict(zip(("w1", "b1", "scale", "offset", "w2", "b2"), params, strict=True))
    # A bias before a normalisation has no gradient of its own: weight decay alone moves it.
    for name, value in (
        ("w1", found["hidden"]["kernel"]), ("b1", found["hidden"]["bias"]),
        ("scale", found["norm"]["scale"]), ("offset", found["norm"]["bias"]),
        ("w2", found["output"]["kernel"]), ("b2", found["output"]["bias"]),
    ):  # fmt: skip
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(after.generator.mean, mean, atol=1e-5)
    np.testing.assert_allclose(after.generator.variance, variance, atol=1e-5)


def test_a_generator_learns_what_heads_say():
    """Of two heads, what it makes of a class is taken for it by the one that has seen the class.

    The other is wrong of it. The control is the generator as it was.
    """
    settings = FedGen(fedgen_noise=4, fedgen_hidden=16, fedgen_steps=150, fedgen_lr=0.01)
    kernels = jnp.stack([4 * jnp.eye(4), jnp.roll(4 * jnp.eye(4), 1, axis=1)])
    counts = jnp.asarray([[900.0, 900, 0, 0], [0, 0, 900, 900]])
    heads = features.Heads(
        {"kernel": kernels, "bias": jnp.zeros((2, 4))}, counts, jnp.ones(2, bool)
    )
    start = features.start(KEY, 4, 4, settings)
    train = jax.jit(features.make_trainer(linear(4), settings))
    after, _ = train(start, heads, {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}, KEY)
    labels = jnp.arange(400) % 4
    eps = features.noise(jax.random.key(5), 400, settings)
    right = []
    for state in (start, after):
        made = features.make(state.generator, eps, labels)
        answers = jnp.where(
            labels < 2, (made @ kernels[0]).argmax(axis=1), (made @ kernels[1]).argmax(axis=1)
        )
        right.append(float((answers == labels).mean()))
    assert right[0] < 0.6
    assert right[1] > 0.95


# --- what clients do ------------------------------------------------------------------------------


def part(classes=2, **settings):
    return fedgen.client_part(
        resolve("digits", "fedgen", fedgen_noise=1, fedgen_hidden=1, **settings), linear(classes)
    )


FLAT = {"last": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}}
STEP, LABELS = jnp.asarray(0), jnp.asarray([0, 1])


def test_the_clients_term_by_hand():
    """A head that says 1/2 of whatever is made: CE = log 2, and KL of (1/2, 1/2) to (3/4, 1/4).

    alpha = 2, beta = 3, halved once; four made features on two samples.
    """
    own = part(fedgen_alpha=2, fedgen_beta=3, fedgen_decay=0.5, fedgen_batch=4)
    logits = jnp.log(jnp.asarray([[3.0, 1], [3, 1]]))

    def term(trained=1, step=0, part=own):
        generator = constant(1.0, trained=trained)
        return float(part.term(FLAT, logits, LABELS, generator, jnp.asarray(step), KEY))

    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    whole = 4 / 2 * 1 * math.log(2) + 1.5 * divergence
    assert term() == pytest.approx(whole, rel=1e-5)
    assert term(trained=2) == pytest.approx(whole / 2, rel=1e-5)
    assert term(trained=0) == 0  # an untrained generator tells nothing
    assert term(step=19) == pytest.approx(whole, rel=1e-5)
    assert term(step=20) == 0
    least = 1e-4 * (4 / 2 * math.log(2) + divergence)
    assert term(trained=100) == pytest.approx(least, rel=1e-4)
    one = part(fedgen_alpha=2, fedgen_beta=0, fedgen_decay=0.5, fedgen_batch=4)
    assert term(part=one) == pytest.approx(2 * math.log(2), rel=1e-5)  # 0 has no floor


def test_what_the_clients_term_moves():
    """The head by the loss on made features; the divergence the answer on samples alone."""

    def gradient(**weights):
        own = part(fedgen_decay=1, **weights)
        params = {"last": {"kernel": jnp.asarray([[1.0, -1]]), "bias": jnp.zeros(2)}}
        found = jax.grad(own.term, argnums=(0, 1))(
            params, jnp.zeros((2, 2)), LABELS, constant(1.0), STEP, KEY
        )
        return [bool(jnp.abs(leaf).max() > 1e-3) for leaf in jax.tree.leaves(found)]

    assert gradient(fedgen_alpha=1, fedgen_beta=0) == [True, True, False]
    assert gradient(fedgen_alpha=0, fedgen_beta=1) == [False, False, True]


def test_a_term_has_a_key_of_its_own():
    """Of its job, wherever that is trained; and the loss that is told is that of the samples."""
    own = ClientPart(
        lambda params, logits, labels, extra, step, key: (
            extra * params["w"] * jax.random.normal(key)
        )
    )
    trainer = make_window_trainer(
        scalar_model(),
        lambda store, positions, key: store[positions],
        0.1,
        lambda job, step: jax.random.fold_in(jax.random.fold_in(KEY, job), step),
        part=own,
    )

    def trained(*jobs, extra=1.0):
        bases = (Download(ONE, jnp.asarray(extra)),) * len(jobs)
        indices = jnp.zeros((len(jobs), 3, 2), jnp.int32)
        store = jnp.ones((6, 4, 4, 1)), jnp.zeros(6, jnp.int32)
        return trainer(bases, *store, indices, jnp.asarray(jobs))

    three = [float(upload.params["w"]) for upload in trained(5, 7, 5)]
    assert three[0] == three[2] != three[1]
    assert float(trained(7, 5)[0].params["w"]) == pytest.approx(three[1], rel=1e-6)
    still, other = trained(5, 7, extra=0.0)
    assert float(still.params["w"]) == float(other.params["w"])
    one_step = trainer(
        (Download(ONE, jnp.asarray(1e6)),),
        jnp.ones((6, 4, 4, 1)),
        jnp.zeros(6, jnp.int32),
        jnp.zeros((1, 1, 2), jnp.int32),
        jnp.asarray([5]),
    )
    assert float(one_step[0].loss) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-5)


def test_classes_are_counted():
    assert part(3).report(jnp.asarray([[0, 2], [2, 2], [0, 2]])).tolist() == [2, 0, 4]


@pytest.mark.parametrize("network", ["digitsnet", "convnet", "resnet18", "t5"])
def test_the_head_is_the_last_layer(network):
    """With as many classes as features and the identity for a kernel, logits are the features."""
    size, width = {"digitsnet": (8, 64), "convnet": (12, 100), "resnet18": (8, 16), "t5": (8, 8)}[
        network
    ]
    if network == "t5":
        shape = t5.T5Shape(16, 8, 16, 2, 2, 4, classifier_token=3)
        model = t5.make_classifier(shape, 5, width)
        ids = jax.random.randint(KEY, (4, 5), 1, 16)
        inputs = Text(ids, model.frozen(KEY))
    else:
        model = models.make_network(
            network, input_shape=(size, size, 1), num_classes=width, width=2, convolution="lax"
        )
        inputs = jax.random.normal(KEY, (4, size, size, 1))
    params = model.init(KEY)
    layer = model.head.params(params)
    assert model.head.width(layer) == width
    (name,) = (name for name in params if params[name] is layer)
    plain = {"kernel": jnp.eye(width), **({"bias": jnp.zeros(width)} if "bias" in layer else {})}
    made, _ = model.apply({**params, name: plain}, inputs)
    np.testing.assert_allclose(
        model.head.apply(layer, made), model.apply(params, inputs)[0], atol=1e-5
    )
    half = with_precision(model, "bfloat16").head.apply(layer, made)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, model.head.apply(layer, made), atol=0.05)


# --- the server -----------------------------------------------------------------------------------


def test_what_the_server_keeps_of_uploads():
    """K = 2 heads, B = 2: trained when the version is made, on what was accepted until then.

    A rejected upload leaves no trace, but the version that it completes is one.
    """
    method = make("fedgen", fedgen_on="fedbuff", buffer_size=2, fedgen_hidden=2, fedgen_steps=1)
    step = jax.jit(method.step)
    state = method.init(ONE)

    def submit(state, w, job, completes, accepted=True, counts=(2.0, 1.0)):
        upload = scalar_upload(w)._replace(extra=jnp.asarray(counts))
        facts = arrival(job, job, version=job // 2, completes=completes)
        _, state, _, told = step(state, (), submission(upload, facts, ONE, accepted=accepted))
        return state, told

    start = method.extra(state)
    state, told = submit(state, 3.0, 0, False)
    assert math.isnan(told["generator_teacher"])
    assert jax.tree.all(jax.tree.map(np.array_equal, method.extra(state), start))
    state, told = submit(state, math.nan, 1, True, accepted=False, counts=(math.nan, 0))
    assert math.isfinite(told["generator_teacher"])
    head, counts = state.heads.params
    assert head["w"].tolist() == [3.0, 0.0]
    assert counts.tolist() == [[2, 1], [0, 0]]
    assert int(method.extra(state).trained) == 1
    # Nothing has come since: nothing is trained.
    for job, completes in ((2, False), (3, True)):
        state, told = submit(state, math.nan, job, completes, accepted=False)
    assert math.isnan(told["generator_teacher"])
    # What a client claims is at most what it can have seen, 20 steps of 32.
    state, _ = submit(state, 1.0, 4, False, counts=(1e30, -5.0))
    assert state.heads.params[1].tolist() == [[2, 1], [640, 0]]


def server_of(config):
    method = create(config, Ingredients(scalar_model(), lambda x, key: x))
    return Server(method, ONE, scalar_upload(0.0).taps, seed=0, num_clients=9)


def test_what_a_client_reports_is_judged():
    server = server_of(small("fedgen", **ASYNCHRONOUS))
    good = scalar_upload(2.0)._replace(extra=jnp.ones(2))
    assert bool(server.submit(server.dispatch(0).job, good).accepted)
    bad = good._replace(extra=jnp.asarray([1.0, math.nan]))
    assert not bool(server.submit(server.dispatch(0).job, bad).accepted)
    for extra in ((), jnp.ones(3), jnp.ones(2, jnp.int32)):
        refused = server.submit(server.dispatch(0).job, good._replace(extra=extra))
        assert refused.reason == "wrong_shape"


def test_what_goes_out_with_a_version_stays():
    """A step takes the memory of the state, from which version 0's generator came."""
    server = server_of(small("fedgen", **{**ASYNCHRONOUS, "buffer_size": 1, "fedgen_interval": 1}))
    before = jax.tree.map(np.array, server.download_of(0).extra)
    upload = scalar_upload(2.0)._replace(extra=jnp.ones(2))
    first, _ = server.dispatch(0), server.dispatch(1)
    server.submit(first.job, upload)
    jax.tree.map(np.testing.assert_array_equal, server.download_of(0).extra, before)
    assert [int(server.download_of(version).extra.trained) for version in (0, 1)] == [0, 1]
    server.submit(server.dispatch(0).job, upload)
    assert [int(server.download_of(version).extra.trained) for version in (0, 2)] == [0, 2]


# --- whole runs -----------------------------------------------------------------------------------


def watched(config):
    """A finished simulation, and how often the generator was trained of which each job knew."""
    simulation = Simulation(config)
    train, known = simulation._train, {}

    def spy(bases, store, labels, indices, jobs):
        for job, base in zip(jobs.tolist(), bases, strict=True):
            known[job] = int(base.extra.trained)
        return train(bases, store, labels, indices, jobs)

    simulation._train = spy
    for _ in simulation.arrivals():
        pass
    return simulation, known


def test_a_stale_job_has_the_generator_of_its_version():
    simulation, known = watched(small("fedgen", **ASYNCHRONOUS))
    plan = simulation.schedule
    assert len(known) >= plan.num_arrivals > 20
    for job, trained in known.items():
        assert trained == plan.base_version[job] // 3
    assert max(plan.staleness) >= 3 < max(plan.version)  # so that some are behind
    arrived = np.asarray(plan.job)
    newest = (plan.base_version[arrived] + plan.staleness) // 3
    assert any(known[job] < now for job, now in zip(arrived.tolist(), newest, strict=True))


@pytest.mark.parametrize(
    ("base", "settings"),
    [("fedavg", {}), ("fedbuff", {"buffer_size": 2}), ("fedasync", {}), ("fadas", {})],
)
def test_without_weights_it_is_the_method_whose_step_it_takes(base, settings):
    """Bit for bit; with weights it is not. The first round is the same in any case."""
    settings = {"server_lr": 0.3, "max_time": 10.0, "staleness_weight": "none", **settings}
    plain, receipts, _ = play(small(base, **settings))
    settings |= {"fedgen_on": base, "fedgen_steps": 2}
    silent, others, _ = play(small("fedgen", fedgen_alpha=0, fedgen_beta=0, **settings))
    assert rows(receipts) == rows(others)
    assert_same_params(plain, silent, atol=0)
    loud, _, _ = play(small("fedgen", **settings))
    with pytest.raises(AssertionError):
        assert_same_params(plain, loud, atol=1e-3)


def test_the_first_round_is_fedavgs():
    """Its generator is untrained; the term is in the program and adds nothing but its rounding."""
    plain, other = (Simulation(small(m, server_lr=1.0)) for m in ("fedavg", "fedgen"))
    for simulation in (plain, other):
        while simulation.server.version == 0:
            simulation.advance()
    assert_same_params(plain, other, atol=1e-6)


def test_windows_change_nothing_asynchronously():
    """See `test_windows_and_one_by_one_agree`; steps here are 0.15 * 3e-3 * 2 = 1e-3 at most."""
    windowed, receipts, _ = play(small("fedgen", client_batch=4, **ASYNCHRONOUS))
    single, expected, _ = play(small("fedgen", client_batch=1, window_limit=1, **ASYNCHRONOUS))
    assert rows(receipts) == rows(expected)
    assert_same_params(windowed, single, atol=2e-5)
    generators = (s.server.method_state.generator.generator for s in (windowed, single))
    assert_same_params(*(as_server(g.params) for g in generators), atol=1e-4)


def as_server(params):
    return SimpleNamespace(server=SimpleNamespace(params=params))


def behind(simulation):
    """Jobs in flight that are not trained yet and started from two stale versions or more."""
    record, _ = simulation.snapshot()
    waiting = {version for job, _, version in record["jobs"] if job not in record["uploads"]}
    return len(waiting - {record["version"]}) > 1 and record["uploads"]


@pytest.mark.parametrize("memory", ["device", "host"])
def test_continued_bit_for_bit(memory):
    """From a moment at which jobs still to be trained have older generators than the newest."""
    config = small("fedgen", version_memory=memory, **{**ASYNCHRONOUS, "fedgen_interval": 1})
    straight = Simulation(config)
    while not behind(straight):
        straight.advance()
    record, arrays = straight.snapshot()
    assert len({int(extra.trained) for extra in arrays["extra"].values()}) > 1
    assert record["uploads"]
    params = jax.tree.map(np.array, straight.server.params)
    arrays = jax.tree.map(np.array, arrays)  # the next step takes the state's memory
    continued = Simulation(config)
    told, kept = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        for tree in (continued.shapes(record), arrays)
    )
    assert told == kept
    continued.restore(record, params, arrays)
    newest = continued.server.download_of(record["version"]).extra
    assert int(newest.trained) == record["version"]
    for simulation in (straight, continued):
        for _ in simulation.arrivals():
            pass
    assert_same_params(straight, continued, atol=0)
    ends = (s.server.download_of(s.server.version).extra for s in (straight, continued))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_what_is_sent_is_counted():
    config = small("fedgen", **ASYNCHRONOUS)
    simulation = Simulation(config)
    plain = Simulation(small("fedbuff", buffer_size=2))
    jobs = simulation.server.next_job
    extra = simulation.server.download_of(0).extra
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(extra))
    # (32 + 10 + 1) 256 + 2 * 256 + (256 + 1) 64 for 64 features, the statistics, and a number.
    assert size == 4 * (43 * 256 + 2 * 256 + 257 * 64 + 2 * 256 + 1)
    assert simulation.bytes_sent == plain.bytes_sent + jobs * size
    simulation.advance()
    plain.advance()
    more = simulation.server.next_job * size + 4 * 10  # counts of ten classes
    assert simulation.bytes_sent == plain.bytes_sent + more


# --- settings -------------------------------------------------------------------------------------


def test_presets():
    """Rounds of plain averages; on another method's step its buffer and rate, unless told."""
    rounds = resolve("digits", "fedgen")
    assert (rounds.buffer_size, rounds.open_slots, rounds.server_lr) == (20, 20, 1.0)
    assert rounds.generator_interval == 1
    buffered = resolve("digits", "fedgen", fedgen_on="fedbuff")
    plain = resolve("digits", "fedbuff")
    for name in ("buffer_size", "open_slots", "server_lr", "eval_every"):
        assert getattr(buffered, name) == getattr(plain, name)
    assert buffered.generator_interval == 20 // 2
    assert resolve("digits", "fedgen", fedgen_on="fadas").server_lr == 1e-3
    assert resolve("cifar10", "fedgen", fedgen_on="fedbuff").eval_every == 10
    with pytest.raises(ConfigError, match="with fedgen_on=fedavg, whose round waits for all"):
        resolve("digits", "fedgen", buffer_size=2)
    with pytest.raises(ConfigError, match="fedgen_on=fedgen: must be one of"):
        resolve("digits", "fedgen", fedgen_on="fedgen")


def test_a_model_without_a_head_is_refused():
    model = scalar_model()._replace(head=None)
    with pytest.raises(ConfigError, match="needs a model whose `head` is known; scalar tells none"):
        create(resolve("digits", "fedgen"), Ingredients(model, lambda x, key: x))
