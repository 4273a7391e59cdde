"""What teachers are asked about, who judges it, and what is told of a revival."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from fedrevive_jax.config import Config, Dfkd
from fedrevive_jax.dfkd import loss_guard, losses, pool, reviver, synthesis
from fedrevive_jax.dfkd.generator import Generator, image_maker
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.messages import Upload
from fedrevive_jax.models import make_network
from fedrevive_jax.models.model import initial_taps, tap_statistics
from fedrevive_jax.presets import resolve
from tests.toys import arrival, submission

KEY = jax.random.key(3)
SHAPE = (8, 8, 1)
SETTINGS = Dfkd(
    num_teachers=3, judges="own", synthesis_batch=12, synthesis_steps=2, generator_lr=0.01,
    latent_lr=0.003, feature_weight=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_network("digitsnet", input_shape=SHAPE, num_classes=10, width=4)


def ensemble_of(model, mixes):
    """As many teachers as mixes; those with a mix of zeros are absent."""
    params = [model.init(jax.random.key(i)) for i in range(len(mixes) + 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[:-1])
    own = tap_statistics(model.apply(params[0], jnp.ones((2, *SHAPE)))[1])
    taps = jax.tree.map(lambda m: jnp.stack([m + 0.5 * i for i in range(len(mixes))]), own)
    return synthesis.Ensemble(stacked, taps, jnp.asarray(mixes), params[-1], jnp.asarray(True))


def synthesiser_of(model, settings=SETTINGS):
    maker = image_maker(Generator(SHAPE, 4), 6, 10)
    made = synthesis.make_synthesiser(model, maker, lambda images, key: images, settings)
    return made, maker, maker.init(jax.random.key(5))


def mixes_of(*classes):
    """Each teacher knows one class, or none."""
    return [[float(label == c) for label in range(10)] for c in classes]


# --- each sample is judged by the teacher from whose mix its class was drawn ----------------------


def test_own_samples_are_judged_by_their_own_teacher(model):
    """The three terms, summed by hand over teachers that see four images each."""
    synthesiser, _, omega = synthesiser_of(model)
    ensemble = ensemble_of(model, mixes_of(7, 2, 4))
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(3, bool))
    assert drawn.targets.tolist() == [7] * 4 + [2] * 4 + [4] * 4
    variables = synthesis.Variables(omega, drawn.latents)
    _, (terms, images, agreement, *_) = jax.jit(synthesiser.objective)(
        variables, drawn, ensemble, loss_guard.init(SETTINGS), KEY
    )
    student = model.apply(ensemble.student, images)[0]
    feature, one_hot, adversarial, right = [], [], [], []
    for k, (label, own) in enumerate(zip((7, 2, 4), np.split(np.arange(12), 3), strict=True)):
        teacher, taps = jax.tree.map(lambda leaf, k=k: leaf[k], (ensemble.params, ensemble.taps))
        logits, activations = model.apply(teacher, images[own])
        feature.append(losses.statistics_distance(tap_statistics(activations), taps))
        log_p = jax.nn.log_softmax(logits)
        one_hot.append(-log_p[:, label].mean())
        agree = logits.argmax(axis=1) == student[own].argmax(axis=1)
        difference = log_p - jax.nn.log_softmax(student[own])
        adversarial.append(-(agree * (jnp.exp(log_p) * difference).sum(axis=1)).mean())
        right += (logits.argmax(axis=1) == label).tolist()
    assert float(terms.feature) == pytest.approx(np.mean(feature), rel=1e-5)
    assert float(terms.one_hot) == pytest.approx(np.mean(one_hot), rel=1e-5)
    assert float(terms.adversarial) == pytest.approx(np.mean(adversarial), rel=1e-4, abs=1e-7)
    assert float(agreement) == pytest.approx(np.mean(right))
    # The control: judged by all teachers, weighted, other features count.
    everybody = dataclasses.replace(SETTINGS, judges="all")
    _, (others, *_) = synthesiser_of(model, everybody)[0].objective(
        variables, drawn, ensemble, loss_guard.init(SETTINGS), KEY
    )
    assert float(others.feature) != pytest.approx(float(terms.feature), rel=5e-5)
    # There each class is one teacher's, too, so that this term is the same.
    assert float(others.one_hot) == pytest.approx(float(terms.one_hot), rel=1e-5)


def test_a_single_teacher_judges_the_same_either_way(model):
    ensemble = ensemble_of(model, [[0.5, 0.5] + [0.0] * 8])
    answers = []
    for judges in ("own", "all"):
        settings = dataclasses.replace(SETTINGS, num_teachers=1, judges=judges)
        synthesiser, _, omega = synthesiser_of(model, settings)
        drawn = synthesiser_of(model, SETTINGS)[0].draw(KEY, ensemble.proxies, jnp.ones(1, bool))
        result = jax.jit(synthesiser.synthesise)(
            synthesiser.init(omega), drawn, ensemble, loss_guard.init(settings), KEY
        )
        answers.append((result.samples, result.terms, result.agreement))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *answers)


def test_classes_are_drawn_from_each_teachers_own_mix(model):
    settings = dataclasses.replace(SETTINGS, synthesis_batch=30_000, pool_size=30_000)
    mixes = jnp.asarray(
        [[0.7, 0.3] + [0.0] * 8, [0.1, 0.0, 0.9] + [0.0] * 7, [0.0] * 10], jnp.float32
    )
    present = jnp.asarray([True, True, False])
    targets = synthesiser_of(model, settings)[0].draw(KEY, mixes, present).targets
    own = np.split(np.asarray(targets), 3)
    for k in range(2):
        expected = np.asarray(mixes[k]) * 10_000
        counts = np.bincount(own[k], minlength=10)
        assert counts[expected == 0].sum() == 0
        assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3
    assert set(own[2].tolist()) == {synthesis.UNKNOWN}
    # Nor has a teacher a class to judge whose client's mix is broken.
    broken = synthesiser_of(model, settings)[0].draw(KEY, mixes * jnp.nan, jnp.ones(3, bool))
    assert set(broken.targets.tolist()) == {synthesis.UNKNOWN}
    # The control: the first teacher's draws are not of the mean mix.
    assert np.bincount(own[0], minlength=10)[2] == 0


def test_samples_of_an_absent_teacher_count_for_nothing(model):
    """Neither in the loss, nor in its gradient, nor when samples are drawn."""
    synthesiser, _, omega = synthesiser_of(model)
    ensemble = ensemble_of(model, [*mixes_of(7, 2), [0.0] * 10])
    present = jnp.asarray([True, True, False])
    drawn = synthesiser.draw(KEY, ensemble.proxies, present)
    guard = loss_guard.init(SETTINGS)
    variables = synthesis.Variables(omega, drawn.latents)

    @jax.jit
    def gradient(ensemble):
        loss = lambda v: synthesiser.objective(v, drawn, ensemble, guard, KEY)[0]  # noqa: E731
        return jax.grad(loss)(variables)

    def with_scaled(teacher):
        scaled = jax.tree.map(lambda leaf: leaf.at[teacher].multiply(3.0), ensemble.params)
        return ensemble._replace(params=scaled)

    grads = gradient(ensemble)
    jax.tree.map(np.testing.assert_array_equal, grads, gradient(with_scaled(2)))
    control = gradient(with_scaled(1))
    assert np.abs(control.latents[0] - grads.latents[0]).max() > 1e-6
    result = jax.jit(synthesiser.synthesise)(synthesiser.init(omega), drawn, ensemble, guard, KEY)
    assert bool(result.sound)
    assert result.labels.tolist() == [7] * 4 + [2] * 4 + [synthesis.UNKNOWN] * 4
    filled = pool.add(pool.empty(12, result.samples), result.samples, result.labels)
    chosen = pool.draw(filled, jnp.full((1, 10), 0.1), 500, KEY)
    assert set(np.unique(chosen)) == set(range(8))


# --- what is told ---------------------------------------------------------------------------------


def test_agreement_by_hand():
    """Of two samples of class 0 the teachers' weighted answer is .75 * .6 + .25 * .1 = .475 for the
    first, a class 1 that is; of the second .75 * .6 + .25 * .9 = .675."""
    logits = jnp.log(jnp.asarray([[[0.6, 0.4], [0.6, 0.4]], [[0.1, 0.9], [0.9, 0.1]]]))
    weights = jnp.asarray([[0.75, 0.75], [0.25, 0.25]])
    assert float(losses.agreement(weights, logits, jnp.zeros(2, int))) == 0.5
    assert float(losses.agreement(weights, logits, jnp.ones(2, int))) == 0.5
    # Each of its own samples: the answers .6, .6 | .1, .9 to class 0; without the second teacher
    # they all count.
    own = jnp.zeros((2, 2), int)
    assert float(losses.agreement(jnp.full((2, 2), 0.5), logits, own)) == 0.75
    assert float(losses.agreement(jnp.asarray([[1.0, 1.0], [0, 0]]), logits, own)) == 1.0
    assert float(losses.agreement(jnp.zeros((2, 2)), logits, own)) == 0.0


TINY = {
    "model_width": 4, "num_clients": 6, "concurrency": 2, "num_teachers": 3, "latent_size": 6,
    "generator_features": 4, "synthesis_batch": 9, "pool_size": 600, "distillation_steps": 2,
    "distillation_batch": 4, "proxy_samples": 8, "freeze_versions": 4, "warmup_versions": 6,
    "generation_interval": 3,
}  # fmt: skip


def revive_once(model, version=9, **fields):
    config = resolve("digits", "fedrevive", **{**TINY, **fields})
    real = (np.zeros((4, *SHAPE), np.uint8), np.arange(4))
    made = reviver.create(config, model, lambda x, key: x / 255.0, real_samples=real)
    params = model.init(jax.random.key(0))
    own = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(KEY, p.shape), params)
    base = jax.tree.map(lambda p: p - 0.01, params)
    upload = Upload(own, initial_taps(model), jnp.asarray(0.0))
    sent = submission(upload, arrival(0, 0, version, 5), params, base)
    before = made.init(params)
    after, revival = jax.jit(made.revive)(before, jnp.asarray(0.5), sent)
    return before, after, revival, sent


@pytest.mark.parametrize("samples", ["noise", "real"])
def test_the_controls_synthesise_nothing(model, samples):
    before, after, revival, _ = revive_once(model, samples=samples)
    assert bool(revival.distilled)
    assert int(after.syntheses) == 0
    assert math.isnan(float(revival.metrics["feature"]))
    assert before.generator is None
    assert not bool(revive_once(model, version=6, samples=samples)[2].distilled)  # the warm-up's


def test_noise_is_uniform_in_values_and_classes(model):
    images, labels = revive_once(model, samples="noise")[0].pool[:2]
    assert images.dtype == jnp.uint8
    counts = np.bincount(np.asarray(images).ravel(), minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert np.bincount(labels).tolist() == [60] * 10
    other = revive_once(model, samples="noise", seed=1)[0].pool.samples
    assert (np.asarray(other) != np.asarray(images)).mean() > 0.9


def test_the_distilled_update_is_told(model):
    """Its norm, and its cosine with the raw one."""
    _, _, revival, sent = revive_once(model)
    distilled, raw = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
        for tree in (revival.delta, sent.delta)
    )
    norm = np.linalg.norm(distilled)
    assert norm > 0
    assert float(revival.metrics["distilled_norm"]) == pytest.approx(norm, rel=1e-5)
    cosine = distilled @ raw / norm / np.linalg.norm(raw)
    assert float(revival.metrics["distilled_cosine"]) == pytest.approx(cosine, abs=1e-5)
    before = revive_once(model, version=5)[2]
    assert math.isnan(float(before.metrics["distilled_norm"]))
    assert float(optax.tree.norm(before.delta)) == 0


# --- configurations -------------------------------------------------------------------------------


def test_samples_are_shared_among_the_teachers(model):
    assert Dfkd(judges="own", synthesis_batch=11, num_teachers=3).samples_made == 9
    assert Dfkd(judges="all", synthesis_batch=11, num_teachers=3).samples_made == 11
    with pytest.raises(ConfigError, match="synthesis_batch=2: must be at least num_teachers=3"):
        Dfkd(judges="own", synthesis_batch=2, num_teachers=3)
    with pytest.raises(ConfigError, match="target_sampling=uniform: must be teachers with judges"):
        Dfkd(judges="own", target_sampling="uniform")
    _, after, _, _ = revive_once(model, judges="own", synthesis_batch=11)
    assert int(after.pool.added) == 9


def test_the_reference_is_a_choice_of_samples():
    assert resolve("digits", "dd_fedrevive").samples == "real"
    assert not resolve("digits", "dd_fedrevive").synthesises
    with pytest.raises(ConfigError, match="samples=noise: must be real with dd_fedrevive"):
        resolve("digits", "dd_fedrevive", samples="noise")
    assert resolve("digits", "fedrevive").synthesises
    assert not Config(samples="noise").synthesises
    assert not resolve("digits", "fedbuff").synthesises
