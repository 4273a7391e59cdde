"""DFKD that is not finite: skipped for that arrival, counted, and nothing of it stays behind.

The whole method on the scalar model; NaN, infinities and numbers that overflow are put into every
part of its state in turn.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax import methods
from fedrevive_jax.config import Dfkd
from fedrevive_jax.dfkd import loss_guard, proxy
from fedrevive_jax.presets import resolve
from fedrevive_jax.record.health import Health
from tests.toys import ONE, arrival, scalar_model, scalar_upload, submission

CLIENTS, LR = 4, 0.5
HUGE = 3e38
BROKEN = (math.nan, math.inf, -math.inf, HUGE)


def tapped_apply(params, inputs, key=None):
    """The scalar model with a tap that its parameter moves, as in a network."""
    logits, _ = scalar_model().apply(params, inputs, key)
    return logits, (logits[:, :1],)


class World:
    """FedRevive at work: two teachers, a pool, a generator; due to synthesise and to distil."""

    def __init__(self):
        config = resolve(
            "digits", "fedrevive", num_clients=CLIENTS, concurrency=2, num_teachers=2,
            latent_size=4, generator_features=2, synthesis_batch=4, synthesis_steps=2, pool_size=8,
            distillation_steps=2, distillation_batch=2, proxy_samples=4, freeze_versions=0,
            warmup_versions=0, generation_interval=1, server_lr=LR, beta_s_max=10,
            preset_revival="published",
        )  # fmt: skip
        model = scalar_model()._replace(apply=tapped_apply)
        method = methods.create(
            config, methods.Ingredients(model, lambda images, key: 2 * images - 0.5)
        )
        self.params = {"w": jnp.asarray(1.0)}
        self.step = jax.jit(method.step)
        self.state = method.init(self.params)
        for version, w in ((1, 2.0), (2, -3.0), (3, 4.0)):
            self.state = self.after(self.state, version, client=version - 1, w=w)[1]

    def after(self, state, version=4, client=0, w=3.0):
        """(w, state, metrics) after an upload of theta' = w from theta_b = 1, with beta = 1/2."""
        params, state, _, metrics = self.step(
            state,
            (),
            submission(
                scalar_upload(w),
                arrival(job=version, client=client, version=version, staleness=10),
                self.params,
            ),
        )
        return float(params["w"]), state, {name: float(v) for name, v in metrics.items()}


@pytest.fixture(scope="module")
def world():
    return World()


def replaced(world, **parts):
    return world.state._replace(rule=world.state.rule._replace(**parts))


def filled(tree, value):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), tree)


def teacher_that_stays(state):
    """Of the ring of two, the place that the next upload leaves alone."""
    return 1 - int(state.rule.teachers.added)


def assert_kept(before, after):
    """Generator and pool are as they were."""
    for part in ("generator", "pool"):
        pairs = zip(*(jax.tree.leaves(getattr(s.rule, part)) for s in (before, after)), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)


PLAIN = 1.0 + LR * 2.0


def test_the_control_distils_and_synthesises(world):
    w, state, metrics = world.after(world.state)
    assert (metrics["synthesis_skipped"], metrics["distillation_skipped"]) == (0, 0)
    assert metrics["beta"] == pytest.approx(0.5)
    assert w != pytest.approx(PLAIN, abs=0.1)  # the update went in at half its size
    with pytest.raises(AssertionError):
        assert_kept(world.state, state)


def test_what_the_guard_rejects_is_told_and_counted(world):
    """Limits of almost zero for two terms: the one-hot term goes without, the distillation has
    nothing left, and the record says in what share of the steps."""
    assert [world.after(world.state)[2][f"{term}_rejected"] for term in loss_guard.TERMS] == [0] * 4
    guard = world.state.rule.guard
    for term in ("one_hot", "distillation"):
        row = loss_guard.TERMS.index(term)
        guard = guard._replace(
            values=guard.values.at[row].set(1e-9), counts=guard.counts.at[row].set(20)
        )
    w, _, metrics = world.after(replaced(world, guard=guard))
    assert (w, metrics["beta"]) == (PLAIN, 0.0)
    assert [metrics[f"{term}_rejected"] for term in loss_guard.TERMS] == [0, 1, 0, 1]
    assert (metrics["synthesis_skipped"], metrics["distillation_skipped"]) == (0, 1)

    health = Health(1.0)
    nothing = dict.fromkeys(metrics) | {"kind": "dfkd", "version": 1}
    for row in (metrics | {"kind": "dfkd"}, nothing, nothing | {"one_hot_rejected": 0.5}):
        health.metrics(row)
    assert health.rejected_terms == {
        "feature": 0.0, "one_hot": 0.75, "adversarial": 0.0, "distillation": 1.0,
    }  # fmt: skip
    assert health.skipped == {"synthesis": 0, "distillation": 1}


def with_teacher(world, w):
    """The teacher that the next upload leaves alone is another."""
    teachers = world.state.rule.teachers
    taught = teachers.params["w"].at[teacher_that_stays(world.state)].set(w)
    return replaced(world, teachers=teachers._replace(params={"w": taught}))


def test_a_teacher_at_the_end_of_float32(world):
    """Where it overflows it is skipped; where it does not it moves things by bounded steps."""
    w, state, _ = world.after(with_teacher(world, HUGE))
    assert 1.0 < w <= PLAIN
    for leaf in jax.tree.leaves((state.rule.generator, state.rule.pool)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("value", BROKEN[:3])
def test_a_broken_teacher(world, value):
    """It spoils every loss: plain update, unblended, and nothing is made or learned."""
    sick = with_teacher(world, value)
    w, state, metrics = world.after(sick)
    assert w == PLAIN
    assert metrics["beta"] == 0.0
    assert (metrics["synthesis_skipped"], metrics["distillation_skipped"]) == (1, 1)
    assert_kept(sick, state)
    assert all(map(np.isfinite, np.asarray(state.rule.guard.values).flat))

    # It teaches until two more uploads have come; then all is as before.
    w, state, metrics = world.after(state, version=5, client=1)
    assert (metrics["synthesis_skipped"], metrics["distillation_skipped"]) == (0, 0)
    assert metrics["beta"] == pytest.approx(0.5)


@pytest.mark.parametrize("value", BROKEN[:3])
def test_broken_statistics_cost_one_loss_term(world, value):
    """The guard's rule: the term counts zero, the others go on."""
    sick = replaced(
        world,
        teachers=world.state.rule.teachers._replace(
            taps=filled(world.state.rule.teachers.taps, value)
        ),
    )
    _, state, metrics = world.after(sick)
    assert not math.isfinite(metrics["feature"])
    assert math.isfinite(metrics["synthesis"])
    assert (metrics["synthesis_skipped"], metrics["distillation_skipped"]) == (0, 0)
    for leaf in jax.tree.leaves((state.rule.generator, state.rule.pool)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("value", BROKEN[:3])
def test_a_broken_generator_fills_no_pool(world, value):
    generator = world.state.rule.generator
    sick = replaced(world, generator=generator._replace(params=filled(generator.params, value)))
    w, state, metrics = world.after(sick)
    assert metrics["synthesis_skipped"] == 1
    assert_kept(sick, state)
    assert metrics["distillation_skipped"] == 0  # the pool is as good as ever
    assert math.isfinite(w)


def test_a_meta_step_that_would_break_the_generator_is_not_taken(world):
    """A second moment at the end of float32: the step's result is judged, not its gradient."""
    generator = world.state.rule.generator
    meta = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, math.inf) if leaf.ndim else leaf, generator.meta
    )
    sick = replaced(world, generator=generator._replace(meta=meta))
    _, state, metrics = world.after(sick)
    assert metrics["synthesis_skipped"] == 1
    assert_kept(sick, state)


@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_pool(world, value):
    """What is drawn from it is spoiled: the update goes in plain."""
    pool = world.state.rule.pool
    sick = replaced(world, pool=pool._replace(samples=filled(pool.samples, value)))
    sick = sick._replace(  # every drawn image is a broken one: new ones are not made
        rule=sick.rule._replace(synthesised_version=jnp.asarray(4, jnp.int32))
    )
    w, state, metrics = world.after(sick)
    assert w == PLAIN
    assert (metrics["beta"], metrics["distillation_skipped"]) == (0.0, 1)
    assert math.isnan(metrics["synthesis_skipped"])  # was not due
    assert_kept(sick, state)


def test_broken_class_mixes(world):
    """No teacher knows a class: nothing is made, and distillation draws from the whole pool."""
    for value in (math.nan, 0.0):
        mixes = world.state.rule.proxies
        sick = replaced(
            world,
            proxies=proxy.Proxies(
                jnp.full_like(mixes.total, value), jnp.full_like(mixes.probes, proxy.UPLOADS)
            ),
        )
        w, state, metrics = world.after(sick)
        assert (metrics["synthesis_skipped"], metrics["distillation_skipped"]) == (1, 0)
        assert_kept(sick, state)
        assert math.isfinite(w)


@jax.jit
def observe(proxies, w, seed):
    return proxy.observe(
        proxies, scalar_model(), {"w": w}, ONE, jnp.asarray(1), jax.random.key(seed),
        Dfkd(proxy_samples=4, proxy_temperature=1e-3),
    )  # fmt: skip


@pytest.mark.parametrize("value", BROKEN)
def test_an_upload_that_overflows_in_the_probe_tells_nothing(value):
    """A client's mix is that of the uploads that could be probed, whichever come first."""
    clean = proxy.unknown(CLIENTS, 2)
    for w, seed in ((1.0, 0), (2.0, 1)):
        clean = observe(clean, w, seed)
    sick = proxy.unknown(CLIENTS, 2)
    for w, seed in ((value, 7), (1.0, 0), (value, 8), (2.0, 1), (value, 9), (3.0, 5)):
        sick = observe(sick, w, seed)
    np.testing.assert_array_equal(sick.total, clean.total)
    assert sick.probes.tolist() == clean.probes.tolist() == [0, 2, 0, 0]
    assert float(proxy.of_clients(sick, jnp.asarray([1])).sum()) == pytest.approx(1.0)
