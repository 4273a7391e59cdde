"""DFKD part by part, against numbers worked out by hand and laws with a negative control."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from fedrevive_jax.compute import devices
from fedrevive_jax.config import Dfkd
from fedrevive_jax.dfkd import distillation, loss_guard, losses, pool, proxy, synthesis, teachers
from fedrevive_jax.dfkd.generator import Generator, image_maker
from fedrevive_jax.dfkd.reviver import create
from fedrevive_jax.models import make_network
from fedrevive_jax.models.model import per_call, tap_statistics
from fedrevive_jax.presets import resolve
from tests.toys import KEY, ONE, arrival, scalar_model, scalar_upload, submission

# --- loss terms -----------------------------------------------------------------------------------


def test_teacher_weights():
    q = jnp.asarray([[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]])
    weights = losses.teacher_weights(q, jnp.asarray([0, 1, 2, 0]))
    expected = [[2 / 3, 1, 0, 2 / 3], [1 / 3, 0, 1, 1 / 3]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    nobody = losses.teacher_weights(jnp.zeros((2, 3)), jnp.asarray([1]))
    assert nobody.tolist() == [[0.0], [0.0]]  # the denominator's floor, not NaN


def test_feature_loss():
    taps = ((jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, 1.0])), (jnp.zeros(1), jnp.ones(1)))
    seen = ((jnp.asarray([4.0, 6.0]), jnp.asarray([1.0, 3.0])), (jnp.zeros(1), jnp.ones(1)))
    # ||(3, 4)|| + ||(0, 2)|| + 0 + 0, not squared.
    assert float(losses.statistics_distance(taps, seen)) == pytest.approx(7.0)
    weights = jnp.asarray([[1.0, 0.5], [0.0, 0.5]])
    # (1/2) (1.5 * 7 + 0.5 * 3)
    assert float(losses.feature_loss(weights, jnp.asarray([7.0, 3.0]))) == pytest.approx(6.0)


def test_feature_distance_has_a_finite_gradient_where_it_is_zero():
    seen = ((jnp.zeros(3), jnp.ones(3)),)
    gradient = jax.grad(lambda t: losses.statistics_distance(t, seen))(seen)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_one_hot_loss():
    logits = jnp.log(jnp.asarray([[[0.8, 0.2], [0.4, 0.6]], [[0.5, 0.5], [0.1, 0.9]]]))
    weights = jnp.asarray([[0.75, 0.0], [0.25, 1.0]])
    targets = jnp.asarray([0, 1])
    expected = (0.75 * -math.log(0.8) + 0.25 * -math.log(0.5) + 1.0 * -math.log(0.9)) / 2
    assert float(losses.one_hot_loss(weights, logits, targets)) == pytest.approx(expected)


def test_kl_divergence_and_temperature():
    p, q = jnp.asarray([[0.9, 0.1]]), jnp.asarray([[0.5, 0.5]])
    expected = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert float(losses.kl_divergence(jnp.log(p), jnp.log(q))[0]) == pytest.approx(expected)
    # At temperature T: T^2 KL of the softened laws.
    soft = np.sqrt([0.9, 0.1]) / np.sqrt([0.9, 0.1]).sum()
    expected = 4 * float((soft * np.log(soft / 0.5)).sum())
    assert float(losses.kl_divergence(jnp.log(p), jnp.log(q), 2.0)[0]) == pytest.approx(expected)


def test_adversarial_loss_counts_agreeing_samples_only():
    teacher = jnp.log(jnp.asarray([[[0.9, 0.1], [0.2, 0.8]]]))
    student = jnp.log(jnp.asarray([[0.6, 0.4], [0.7, 0.3]]))  # agrees on the first sample only
    divergence = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    loss = losses.adversarial_loss(jnp.asarray([[0.5, 1.0]]), teacher, student)
    assert float(loss) == pytest.approx(-0.5 * divergence / 2)


# --- loss guard -----------------------------------------------------------------------------------


def guarded(values, term="feature", form="published"):
    settings = Dfkd(loss_guard=form)
    guard, flags = loss_guard.init(settings), []
    for value in values:
        counts, guard = loss_guard.check(guard, term, 0, jnp.asarray(float(value)), settings)
        flags.append(bool(counts))
    return flags, guard


def test_guard_needs_ten_values_before_it_calls_a_spike():
    assert guarded([1.0] * 9 + [100.0])[0] == [True] * 10
    assert guarded([1.0] * 10 + [3.0, 3.7, 1.0])[0] == [True] * 11 + [False, True]
    # After 3.0 was kept the mean is 13/11, so 3 * 13/11 = 3.545 is the new limit.
    assert guarded([1.0] * 10 + [3.0, 3.5])[0][-1]


def test_guard_never_keeps_what_is_not_finite():
    flags, guard = guarded([1.0, math.nan, math.inf, -math.inf, 2.0])
    assert flags == [True, False, False, False, True]
    assert int(guard.counts[0]) == 2
    assert float(guard.values[0].sum()) == 3.0


def test_guard_forgets_after_twenty_values():
    _, guard = guarded([10.0] * 20 + [1.0] * 20)
    assert float(guard.values[0].mean()) == 1.0
    # With the tens still in the window 8 would pass; they are gone.
    assert not bool(loss_guard.check(guard, "feature", 0, jnp.asarray(8.0), Dfkd())[0])


def test_guard_takes_any_finite_adversarial_term():
    """It is never positive, and its mean is zero where teachers and student agree on nothing."""
    assert guarded([-1.0] * 10 + [-2.9, -3.6, -100.0], "adversarial")[0] == [True] * 13
    assert guarded([0.0] * 10 + [-0.2], "adversarial")[0] == [True] * 11
    assert guarded([-1.0] * 10 + [math.nan, -math.inf], "adversarial")[0][10:] == [False] * 2


def test_guard_and_a_level_that_rises():
    """From 0.5 to 1.6. As published, 1.6 is above 3 * 0.5 for good. A guard that follows keeps 1.5
    in its place, so that the mean is 0.55 then and the limit 1.65; a single spike is still
    rejected."""
    rise = [0.5] * 20 + [1.6] * 300
    assert guarded(rise)[0] == [True] * 20 + [False] * 300
    assert guarded(rise, form="per_step")[0] == [True] * 20 + [False] + [True] * 299
    flags, guard = guarded([0.5] * 20 + [100.0, 0.5], form="per_step")
    assert flags == [True] * 20 + [False, True]
    assert float(guard.values[0].max()) == 1.5
    # Each rejected value puts 3 m in the place of 0.5, m' = 1.15 m - 0.025, so that after k of them
    # m = (1 + 2 * 1.15^k) / 6; 5.0 counts once m >= 5/3, after 11.
    assert guarded([0.5] * 20 + [5.0] * 30, form="per_step")[0][20:] == [False] * 11 + [True] * 19
    assert guarded([1.0, math.nan], form="per_step")[0] == [True, False]
    assert guarded([0.5] * 20 + [100.0, math.nan], form="off")[0] == [True] * 21 + [False]
    assert int(guarded([1.0, math.nan], form="per_step")[1].counts[0]) == 1


def test_guard_keeps_terms_apart():
    _, guard = guarded([1.0] * 10, "feature")
    assert bool(loss_guard.check(guard, "one_hot", 0, jnp.asarray(100.0), Dfkd())[0])
    assert not bool(loss_guard.check(guard, "feature", 0, jnp.asarray(100.0), Dfkd())[0])


# --- pool -----------------------------------------------------------------------------------------


def numbered(count, start=0):
    """Images whose pixels tell their number."""
    return jnp.arange(start, start + count, dtype=jnp.float32).reshape(count, 1, 1, 1)


def test_pool_is_first_in_first_out():
    images = pool.empty(5, numbered(1))
    for start in range(0, 28, 2):
        images = pool.add(images, numbered(2, start), jnp.asarray([0, 1]))
        kept = sorted(
            float(i) for i, y in zip(images.samples.ravel(), images.labels, strict=True) if y >= 0
        )
        assert kept == [float(i) for i in range(max(0, start + 2 - 5), start + 2)]


def test_what_is_not_wanted_leaves_the_pool_as_it_was():
    images = pool.add(pool.empty(5, numbered(1)), numbered(4), jnp.asarray([3, 1, 2, 0]))
    kept = pool.add(images, numbered(3, 10), jnp.asarray([0, 0, 0]), jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, kept, images)


def draws(labels, mixes, size, count=20_000):
    images = pool.add(
        pool.empty(size, numbered(1)), numbered(len(labels)), jnp.asarray(labels, jnp.int32)
    )
    chosen = pool.draw(images, jnp.asarray(mixes), count, jax.random.key(3))
    return np.stack([np.bincount(row, minlength=size) for row in np.asarray(chosen)])


def test_pool_sampling_law():
    """Labels follow the mix restricted to labels present, images are uniform within a label.

    Chi-square with a fixed key; a wrong law (uniform over images) must fail the same test.
    """
    labels = [2, 0, 0, 2, 2, 4]  # label 1 and 3 are absent; two places are empty
    mixes = [[0.1, 0.5, 0.3, 0.0, 0.1], [0.0, 0.0, 1.0, 0.0, 0.0]]
    counts = draws(labels, mixes, size=8)
    assert counts[:, 6:].sum() == 0
    share = np.asarray([0.3 / 3, 0.1 / 2, 0.1 / 2, 0.3 / 3, 0.3 / 3, 0.1]) / 0.5
    expected = share * 20_000
    assert scipy.stats.chisquare(counts[0, :6], expected).pvalue > 1e-3
    assert scipy.stats.chisquare(counts[0, :6], np.full(6, 20_000 / 6)).pvalue < 1e-12
    assert counts[1, [1, 2, 5]].sum() == 0
    assert scipy.stats.chisquare(counts[1, [0, 3, 4]]).pvalue > 1e-3


def test_pool_draws_uniformly_where_the_mix_has_no_mass_present():
    counts = draws([2, 0, 0, 2, 2, 4], [[0.0, 0.6, 0.0, 0.4, 0.0], [0.0] * 5], size=8)
    for row in counts:
        assert row[6:].sum() == 0
        assert scipy.stats.chisquare(row[:6]).pvalue > 1e-3


# --- proxy ----------------------------------------------------------------------------------------


def test_proxy_is_the_mean_of_the_first_two_uploads_then_frozen():
    model = scalar_model()
    seen = []
    proxies = proxy.unknown(3, 2)
    for visit, w in enumerate((5.0, -20.0, 300.0)):
        key = jax.random.key(visit)
        inputs = jax.random.normal(key, (64, 4, 4, 1))
        seen.append(proxy.probe(model, {"w": jnp.asarray(w)}, inputs, 0.8))
        params = {"w": jnp.asarray(w)}
        proxies = proxy.observe(proxies, model, params, ONE, jnp.asarray(1), key, Dfkd())
        q = proxy.of_clients(proxies, jnp.asarray([1, 0, -1]))
        np.testing.assert_allclose(q[0], sum(seen[:2]) / len(seen[:2]), rtol=1e-6)
        assert float(jnp.abs(q[1:]).sum()) == 0
    assert float(q[0].sum()) == pytest.approx(1.0)


def test_known_proxies_are_never_probed():
    mixes = np.asarray([[0.25, 0.75], [1.0, 0.0]], np.float32)
    proxies = proxy.known(mixes)
    again = proxy.observe(
        proxies, scalar_model(), {"w": jnp.asarray(9.0)}, ONE, jnp.asarray(0), KEY,
        Dfkd(),
    )  # fmt: skip
    np.testing.assert_allclose(proxy.of_clients(again, jnp.asarray([0, 1])), mixes)


def test_what_a_job_changed_by_hand():
    """The scalar model answers (w m, 0), m the mean of an input. d = (w' - w) m / 2 and its
    negative, so that of two classes one is e^8 times the other, whatever the size of the change."""
    model = scalar_model()
    inputs = jnp.ones((4, 4, 4, 1))
    for before, after in ((1.0, 1.001), (1.0, 7.0)):
        mix = proxy.change(model, {"w": jnp.asarray(after)}, {"w": jnp.asarray(before)}, inputs)
        np.testing.assert_allclose(mix, [1 / (1 + math.exp(-8)), 1 / (1 + math.exp(8))], rtol=1e-3)
    np.testing.assert_allclose(proxy.change(model, ONE, ONE, inputs), [0.5, 0.5])


def test_all_jobs_of_a_client_count_for_what_they_changed():
    model, settings = scalar_model(), Dfkd(proxy="change")
    proxies, seen = proxy.unknown(2, 2), []
    for visit, w in enumerate((5.0, -20.0, 300.0, 2.0)):
        key, params = jax.random.key(visit), {"w": jnp.asarray(w)}
        seen.append(proxy.change(model, params, ONE, jax.random.normal(key, (64, 4, 4, 1))))
        proxies = proxy.observe(proxies, model, params, ONE, jnp.asarray(1), key, settings)
    q = proxy.of_clients(proxies, jnp.asarray([1, 0]))
    np.testing.assert_allclose(q[0], np.mean(seen, axis=0), rtol=1e-6)
    assert float(jnp.abs(q[1]).sum()) == 0
    assert int(proxies.probes[1]) == 4


def test_a_mix_is_better_known_by_what_changed():
    """Clients of two or three classes train a few steps from random parameters. On average what
    they changed is nearer to their true mixes than what they answer, which is much the start's."""
    from fedrevive_jax.clients.local_training import train

    model = make_network("digitsnet", input_shape=(8, 8, 1), num_classes=5, width=4)
    start = model.init(jax.random.key(0))
    patterns = jax.random.uniform(jax.random.key(1), (5, 8, 8, 1))
    inputs = jax.random.normal(KEY, (64, 8, 8, 1))

    @jax.jit
    def train_job(start, batches):
        return train(model, start, batches, lambda batch: (*batch, None), 1e-3)

    apart: dict[str, list] = {"change": [], "answers": []}
    generator, steps = np.random.default_rng(0), 5
    for _ in range(40):
        mix = generator.dirichlet([0.3] * 5)
        labels = generator.choice(5, size=(steps, 16), p=mix)
        noise = generator.normal(0, 0.1, (steps, 16, 8, 8, 1))
        images = jnp.asarray(np.asarray(patterns)[labels] + noise, jnp.float32)
        upload = train_job(start, (images, jnp.asarray(labels)))
        own = np.bincount(labels.ravel(), minlength=5) / labels.size
        for name, q in (
            ("change", proxy.change(model, upload.params, start, inputs)),
            ("answers", proxy.probe(model, upload.params, inputs, 0.8)),
        ):
            apart[name].append(0.5 * np.abs(np.asarray(q) - own).sum())
    difference = np.subtract(apart["answers"], apart["change"])
    assert scipy.stats.ttest_1samp(difference, 0, alternative="greater").pvalue < 0.01


# --- teachers -------------------------------------------------------------------------------------


def test_the_newest_uploads_teach():
    ring = teachers.init({"w": jnp.zeros(())}, scalar_upload(0).taps, 3)
    for i in range(5):
        ring = teachers.insert(ring, scalar_upload(i * 10.0, mean=i), jnp.asarray(i))
    assert sorted(ring.clients.tolist()) == [2, 3, 4]
    assert sorted(ring.params["w"].tolist()) == [20, 30, 40]
    for client, w, mean in zip(ring.clients, ring.params["w"], ring.taps[0][0][:, 0], strict=True):
        assert float(w) == 10 * int(client) == 10 * float(mean)


# --- synthesis and the meta-step ------------------------------------------------------------------


def small_synthesis(**kwargs):
    model = make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=4)
    generator = Generator((8, 8, 1), 4)
    options = {
        "synthesis_batch": 12, "synthesis_steps": 2, "generator_lr": 0.01, "latent_lr": 0.003,
        "feature_weight": 0.3, "one_hot_weight": 1.0, "adversarial_weight": 0.1, **kwargs,
    }  # fmt: skip
    maker = image_maker(generator, 6, 10)
    synthesiser = synthesis.make_synthesiser(model, maker, lambda x, key: x, Dfkd(**options))
    omega = maker.init(jax.random.key(5))
    params = [model.init(jax.random.key(i)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[:2])
    statistics = jax.tree.map(
        lambda m: jnp.stack([m, m + 0.5]),
        tap_statistics(model.apply(params[0], jnp.ones((2, 8, 8, 1)))[1]),
    )
    q = jax.nn.softmax(jax.random.normal(jax.random.key(9), (2, 10)))
    ensemble = synthesis.Ensemble(stacked, statistics, q, params[2], jnp.asarray(True))
    return synthesiser, omega, ensemble


def test_reptile_step_by_hand():
    """Adam's first step has the size of the rate: omega moves by lr_g towards phi, elementwise."""
    synthesiser, omega, ensemble = small_synthesis()
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(2, bool))
    rest = (ensemble, loss_guard.init(Dfkd()), KEY)
    inner = jax.jit(synthesiser.inner)(synthesis.Variables(omega, drawn.latents), drawn, *rest)
    after = jax.jit(synthesiser.synthesise)(synthesiser.init(omega), drawn, *rest)
    for old, fast, new in zip(
        *map(jax.tree.leaves, (omega, inner.variables.generator, after.generator.params)),
        strict=True,
    ):
        # The gradient is omega - phi; far from zero, Adam's step is lr * sign.
        far = np.abs(fast - old) > 1e-4
        moved = np.asarray(new - old)[far]
        np.testing.assert_allclose(moved, 0.01 * np.sign(np.asarray(fast - old)[far]), rtol=2e-3)
    assert after.samples.shape == (12, 8, 8, 1)
    np.testing.assert_array_equal(after.labels, drawn.targets)


def test_targets_follow_the_teachers_or_are_uniform():
    q = jnp.asarray([[0.7, 0.3] + [0.0] * 8, [0.1, 0.0, 0.9] + [0.0] * 7, [0.0] * 10])
    present = jnp.asarray([True, True, False])
    for how, expected in (
        ("teachers", np.asarray([0.4, 0.15, 0.45] + [0.0] * 7)), ("uniform", np.full(10, 0.1)),
    ):  # fmt: skip
        synthesiser, _, _ = small_synthesis(
            target_sampling=how, synthesis_batch=20_000, pool_size=20_000
        )
        counts = np.bincount(synthesiser.draw(KEY, q, present)[0], minlength=10)
        allowed = expected > 0
        assert counts[~allowed].sum() == 0
        assert scipy.stats.chisquare(counts[allowed], 20_000 * expected[allowed]).pvalue > 1e-3
        if how == "teachers":  # the control: a uniform law would fail here
            assert scipy.stats.chisquare(counts[:3]).pvalue < 1e-12


def test_adversarial_term_is_off_before_warm_up():
    synthesiser, omega, ensemble = small_synthesis()
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(2, bool))
    totals = {}
    for on in (False, True):
        total, (terms, _, _, _, guard) = synthesiser.objective(
            synthesis.Variables(omega, drawn.latents), drawn,
            ensemble._replace(adversarial_on=jnp.asarray(on)), loss_guard.init(Dfkd()), KEY,
        )  # fmt: skip
        totals[on] = float(total)
        assert int(guard.counts[loss_guard.TERMS.index("adversarial")]) == int(on)
    assert totals[True] - totals[False] == pytest.approx(0.1 * float(terms.adversarial), abs=1e-6)
    assert float(terms.adversarial) != 0


def test_a_broken_teacher_leaves_the_generator_at_its_last_good_state():
    synthesiser, omega, ensemble = small_synthesis()
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), ensemble.params)
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(2, bool))
    result = jax.jit(synthesiser.synthesise)(
        synthesiser.init(omega), drawn, ensemble._replace(params=broken),
        loss_guard.init(Dfkd()), KEY,
    )  # fmt: skip
    for old, new in zip(*map(jax.tree.leaves, (omega, result.generator.params)), strict=True):
        np.testing.assert_array_equal(old, new)
    assert result.guard.counts.tolist() == [0, 0, 0, 0]


def test_images_of_a_rejected_step_are_not_the_best():
    """A step that lacks a spiking term has a low total only because the term is missing."""
    synthesiser, omega, ensemble = small_synthesis(latent_lr=1.0)
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(2, bool))
    row = loss_guard.TERMS.index("one_hot")

    def best(limit):
        guard = loss_guard.init(Dfkd())
        kept = guard._replace(
            values=guard.values.at[row].set(limit / 3), counts=guard.counts.at[row].set(20)
        )
        result = jax.jit(synthesiser.inner)(
            synthesis.Variables(omega, drawn.latents), drawn,
            ensemble._replace(adversarial_on=jnp.asarray(False)), kept, KEY,
        )  # fmt: skip
        return int(result.best_step), np.asarray(result.terms.one_hot)

    _, one_hot = best(1e6)
    worse = int(one_hot.argmax())
    step, _ = best(float(one_hot.mean()))  # rejects the worse step's term only
    assert step == 1 - worse


def test_rejected_terms_are_told():
    """The one-hot term in both of two steps, the adversarial one never."""
    synthesiser, omega, ensemble = small_synthesis()
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(2, bool))
    row = loss_guard.TERMS.index("one_hot")
    guard = loss_guard.init(Dfkd())
    guard = guard._replace(
        values=guard.values.at[row].set(1e-9), counts=guard.counts.at[row].set(20)
    )
    result = jax.jit(synthesiser.synthesise)(synthesiser.init(omega), drawn, ensemble, guard, KEY)
    assert result.rejected.tolist() == [0.0, 1.0, 0.0]


def test_each_step_of_a_synthesis_has_a_guard_of_its_own():
    """Of two steps the second's one-hot term is known to be tiny: it alone is rejected."""
    synthesiser, omega, ensemble = small_synthesis(loss_guard="per_step")
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(2, bool))
    guard = loss_guard.init(Dfkd(loss_guard="per_step"))
    assert guard.values.shape == (2 + 2 + 2 + 10, loss_guard.KEPT)
    second = 2 + 1  # after the two rows of the feature term
    guard = guard._replace(
        values=guard.values.at[second].set(1e-9), counts=guard.counts.at[second].set(20)
    )
    result = jax.jit(synthesiser.synthesise)(synthesiser.init(omega), drawn, ensemble, guard, KEY)
    assert result.rejected.tolist() == [0.0, 0.5, 0.0]
    assert result.guard.counts[:6].tolist() == [1, 1, 1, 21, 1, 1]
    assert result.guard.counts[6:].tolist() == [0] * 10


# --- distillation ---------------------------------------------------------------------------------

DISTIL = Dfkd(
    num_teachers=2,
    distillation_lr=0.01,
    distillation_weight_decay=0.0,
    distillation_temperature=1.0,
)


def small_distillation(num_teachers=2):
    model = make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=4)
    student = model.init(jax.random.key(0))
    params = [model.init(jax.random.key(1 + k)) for k in range(num_teachers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    inputs = jax.random.uniform(jax.random.key(7), (3, num_teachers, 6, 8, 8, 1))
    return model, student, stacked, inputs


def test_every_teacher_judges_its_own_draw():
    model, _, stacked, inputs = small_distillation()
    logits = distillation.teacher_logits(model, stacked, inputs)
    for s in range(3):
        for k in range(2):
            own = jax.tree.map(lambda leaf, k=k: leaf[k], stacked)
            expected = model.apply(own, inputs[s, k])[0]
            np.testing.assert_allclose(logits[s, k], expected, atol=1e-6)


def test_a_student_equal_to_its_teachers_gets_a_zero_update(x64):
    """Exactly zero, because the gradient is; a student that differs by 1% is the control."""
    model, student, _, inputs = small_distillation()
    student, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (student, inputs))
    same = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), student)
    targets = distillation.teacher_logits(model, same, inputs)
    moved = {}
    for name, start in (
        ("equal", student), ("other", jax.tree.map(lambda leaf: 1.01 * leaf, student)),
    ):  # fmt: skip
        result = distillation.distil(
            model, start, inputs, targets, jnp.ones(2, bool), loss_guard.init(Dfkd()), DISTIL
        )
        moved[name] = max(float(jnp.abs(d).max()) for d in jax.tree.leaves(result.delta))
    assert moved["equal"] == 0.0
    assert moved["other"] > DISTIL.distillation_lr


@pytest.mark.parametrize("width", [8, 64])
def test_equal_parameters_give_equal_logits(width):
    """In single precision, as they come from two programs, a teacher's and a student's: Adam would
    make a step of any difference."""
    shape = (28, 28, 1)
    model = make_network("convnet", input_shape=shape, num_classes=10, width=width)
    params = model.init(KEY)
    samples = jax.random.normal(KEY, (2, 2, 32, *shape))

    def delta(params, samples):
        ring = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
        targets = distillation.teacher_logits(model, ring, samples)
        present, guard = jnp.ones(2, bool), loss_guard.init(Dfkd())
        return distillation.distil(model, params, samples, targets, present, guard, DISTIL).delta

    for leaf in jax.tree.leaves(devices.jit(None, delta)(params, samples)):
        np.testing.assert_array_equal(leaf, 0)


def test_kl_derivatives_are_those_of_the_formula(x64):
    """The derivative that is written out against automatic differentiation, both arguments."""

    def plain(teacher, student, temperature):
        p = jax.nn.softmax(teacher / temperature)
        q = jax.nn.softmax(student / temperature)
        return temperature**2 * (p * (jnp.log(p) - jnp.log(q))).sum(axis=-1)

    teacher = jax.random.normal(jax.random.key(0), (3, 4, 5), jnp.float64)
    student = jax.random.normal(jax.random.key(1), (1, 4, 5), jnp.float64)
    for temperature in (1.0, 2.5):
        for argument in (0, 1):
            gradients = [
                jax.grad(lambda *a, f=f: (f(*a, temperature) ** 2).sum(), argument)(  # noqa: B023
                    teacher, student
                )
                for f in (plain, losses.kl_divergence)
            ]
            np.testing.assert_allclose(*gradients, rtol=1e-10, atol=1e-12)


def test_distillation_by_hand():
    """One step on a scalar student: Adam's first step is the rate towards the teacher.

    Weight decay is added to the gradient: with a huge one the step goes towards zero instead.
    """
    model = scalar_model()
    inputs = jnp.ones((1, 1, 4, 4, 4, 1))
    targets = distillation.teacher_logits(model, {"w": jnp.full(1, 3.0)}, inputs)
    for decay, expected in ((0.0, 0.01), (10.0, -0.01)):
        result = distillation.distil(
            model, {"w": jnp.asarray(1.0)}, inputs, targets, jnp.ones(1, bool),
            loss_guard.init(Dfkd()), dataclasses.replace(DISTIL, distillation_weight_decay=decay),
        )  # fmt: skip
        assert float(result.delta["w"]) == pytest.approx(expected, rel=1e-4)
    p = 1 / (1 + math.exp(-3.0))
    q = 1 / (1 + math.exp(-1.0))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(result.losses[0]) == pytest.approx(expected, rel=1e-5)


def test_steps_that_the_guard_rejects_move_nothing():
    """Not even by weight decay, which alone would become full steps of Adam."""
    model, student, stacked, inputs = small_distillation()
    targets = distillation.teacher_logits(model, stacked, inputs)
    guard = loss_guard.init(Dfkd())
    row = loss_guard.TERMS.index("distillation")
    strict = guard._replace(
        values=guard.values.at[row].set(1e-9), counts=guard.counts.at[row].set(20)
    )
    decay = dataclasses.replace(DISTIL, distillation_weight_decay=0.1)
    for state, counted in ((strict, 0), (guard, 3)):
        result = distillation.distil(
            model, student, inputs, targets, jnp.ones(2, bool), state, decay
        )
        assert int(result.counted) == counted
        assert (float(optax.tree.norm(result.delta)) > 0) == (counted > 0)


def test_samples_in_one_call():
    """What stays in a CPU's cache: eight teachers' digits, one teacher's 28x28 images."""
    assert per_call(8, 16, (8, 8, 1), "cpu") == 8
    assert per_call(8, 64, (8, 8, 1), "cpu") == 4
    assert per_call(6, 64, (8, 8, 1), "cpu") == 3
    assert per_call(8, 32, (28, 28, 1), "cpu") == 1
    assert per_call(8, 32, (28, 28, 1), "tpu") == 8


def test_absent_teachers_do_not_count(x64):
    model, student, stacked, inputs = small_distillation()
    targets = distillation.teacher_logits(model, stacked, inputs)
    alone = distillation.distil(
        model, student, inputs[:, :1], targets[:, :1], jnp.ones(1, bool), loss_guard.init(Dfkd()),
        DISTIL,
    )  # fmt: skip
    masked = distillation.distil(
        model, student, inputs, targets, jnp.asarray([True, False]), loss_guard.init(Dfkd()), DISTIL
    )
    np.testing.assert_allclose(masked.losses, alone.losses, rtol=1e-10)


# --- the reviver as a whole -----------------------------------------------------------------------

TINY = {
    "model_width": 4, "num_clients": 6, "concurrency": 2, "num_teachers": 3, "latent_size": 6,
    "generator_features": 4, "synthesis_batch": 8, "pool_size": 16, "distillation_steps": 2,
    "distillation_batch": 4, "proxy_samples": 8, "freeze_versions": 4, "warmup_versions": 6,
    "generation_interval": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    config = resolve("digits", "fedrevive", **TINY)
    model = make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=4)
    reviver = create(config, model, lambda images, key: images)
    params = model.init(jax.random.key(0))
    return reviver, jax.jit(reviver.revive), model, params


def upload_of(model, params, seed):
    from fedrevive_jax.messages import Upload
    from fedrevive_jax.models.model import initial_taps

    own = jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(seed), leaf.shape), params
    )
    return Upload(own, initial_taps(model), jnp.asarray(0.0))


def test_gates(tiny):
    """Synthesis at multiples of T_gen from `freeze` on, once a version; distillation after
    `warmup`, and only where beta > 0."""
    reviver, revive, model, params = tiny
    state = reviver.init(params)
    synthesised, distilled = [], []
    for i, version in enumerate([0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10]):
        before = int(state.pool.added)
        state, revival = revive(
            state,
            jnp.asarray(0.5),
            submission(
                upload_of(model, params, i),
                arrival(i, i % 6, version, 5),
                params,
                key=jax.random.key(i),
            ),
        )
        if int(state.pool.added) != before:
            synthesised.append(version)
        if bool(revival.distilled):
            distilled.append(version)
            assert np.isfinite(float(revival.metrics["distillation"]))
            assert float(optax.tree.norm(revival.delta)) > 0
        else:
            assert float(optax.tree.norm(revival.delta)) == 0
    assert synthesised == [6, 9]
    assert distilled == [7, 8, 9, 9, 10]
    _, revival = revive(
        state,
        jnp.asarray(0.0),
        submission(upload_of(model, params, 0), arrival(99, 0, 20, 0), params),
    )
    assert not bool(revival.distilled)


def test_full_maml_runs_inside_the_reviver():
    """The costliest meta-step: the generator moves by at most Adam's rate and stays finite, also
    for classes that were not drawn."""
    config = resolve("digits", "fedrevive", **{**TINY, "meta": "maml", "warmup_versions": 4})
    model = make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=4)
    reviver = create(config, model, lambda images, key: images)
    params = model.init(jax.random.key(0))
    before = reviver.init(params)
    after, revival = jax.jit(reviver.revive)(
        before,
        jnp.asarray(0.5),
        submission(upload_of(model, params, 0), arrival(0, 0, 6, 5), params),
    )
    assert bool(revival.distilled)
    pairs = zip(
        *map(jax.tree.leaves, (before.generator.params, after.generator.params)), strict=True
    )
    steps = [np.abs(np.asarray(b) - np.asarray(a)).max() for a, b in pairs]
    assert 0.5 * config.generator_lr < max(steps) <= 1.01 * config.generator_lr


def test_a_rejected_upload_changes_nothing_of_the_reviver(tiny):
    """Where an accepted one synthesises and distils."""
    reviver, revive, model, params = tiny
    state = reviver.init(params)
    for i in range(3):
        state, _ = revive(
            state,
            jnp.asarray(0.5),
            submission(
                upload_of(model, params, i),
                arrival(i, i, 9 + 3 * i, 5),
                params,
                key=jax.random.key(i),
            ),
        )
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, upload_of(model, params, 3))
    after, revival = revive(
        state, jnp.asarray(0.5), submission(broken, arrival(3, 3, 18, 5), params, accepted=False)
    )
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not bool(revival.distilled)
    control, revival = revive(
        state,
        jnp.asarray(0.5),
        submission(upload_of(model, params, 3), arrival(3, 3, 18, 5), params),
    )
    assert bool(revival.distilled)
    assert int(control.syntheses) == int(state.syntheses) + 1


def test_nothing_is_distilled_from_an_empty_pool(tiny):
    reviver, revive, model, params = tiny
    state, revival = revive(
        reviver.init(params),
        jnp.asarray(0.5),
        submission(upload_of(model, params, 0), arrival(0, 0, 100, 5), params),
    )
    assert int(state.pool.added) == 0
    assert not bool(revival.distilled)


def test_teachers_receive_no_gradient(tiny):
    """Uploads are kept unchanged, and neither the update nor the images' loss can be
    differentiated into teachers; z, the control, does get a gradient."""
    reviver, revive, model, params = tiny
    state = reviver.init(params)
    uploads = [upload_of(model, params, i) for i in range(3)]
    for i, upload in enumerate(uploads):
        state, _ = revive(
            state,
            jnp.asarray(0.5),
            submission(upload, arrival(i, i, 9 + i, 5), params, key=jax.random.key(i)),
        )
    for i, upload in enumerate(uploads):
        kept = jax.tree.map(lambda ring, i=i: ring[i], state.teachers.params)
        for a, b in zip(*map(jax.tree.leaves, (kept, upload.params)), strict=True):
            np.testing.assert_array_equal(a, b)

    _, student, stacked, inputs = small_distillation()

    def update_norm(stacked):
        targets = distillation.teacher_logits(model, stacked, inputs)
        result = distillation.distil(
            model, student, inputs, targets, jnp.ones(2, bool), loss_guard.init(Dfkd()), DISTIL
        )
        return optax.tree.norm(result.delta)

    assert float(optax.tree.norm(jax.jit(jax.grad(update_norm))(stacked))) == 0.0

    synthesiser, omega, ensemble = small_synthesis()
    drawn = synthesiser.draw(KEY, ensemble.proxies, jnp.ones(2, bool))

    def total(stacked, student, z):
        return synthesiser.objective(
            synthesis.Variables(omega, (z, drawn.latents[1])), drawn,
            ensemble._replace(params=stacked, student=student), loss_guard.init(Dfkd()), KEY,
        )[0]  # fmt: skip

    into_teachers, into_student, into_z = jax.jit(jax.grad(total, (0, 1, 2)))(
        ensemble.params, ensemble.student, drawn.latents[0]
    )
    assert float(optax.tree.norm((into_teachers, into_student))) == 0.0
    assert float(optax.tree.norm(into_z)) > 0.0
