"""One server step of every method by hand on a scalar model, beta, and the limits between them."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrevive_jax import methods
from fedrevive_jax.config import METHODS, PUBLISHED_METHODS, SERVER_OPTIMIZERS
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.methods import blending
from fedrevive_jax.methods import method as interface
from fedrevive_jax.methods.fedrevive import blend
from fedrevive_jax.presets import resolve
from tests.toys import (
    ONE,
    TINY_METHOD,
    arrival,
    drive,
    make,
    scalar_model,
    scalar_reviver,
    scalar_upload,
    submission,
)

NEW = [name for name in METHODS if name not in PUBLISHED_METHODS]


def test_fedavg_by_hand():
    """Cohort of 2: mean Delta = (0.5 + 1.5) / 2; w = 1 + 1.4 * 1."""
    method = make("fedavg", server_lr=1.4)
    assert method.buffer_size == 2
    history, _ = drive(
        method, ONE, [(1.5, 1.0, arrival(completes=False)), (2.5, 1.0, arrival(1, 1))]
    )
    assert history == pytest.approx([1.0, 2.4])


def test_fedbuff_by_hand():
    """Deltas 2 and -1 of different bases, then a second, empty buffer with 4 and 0."""
    method = make("fedbuff", buffer_size=2, server_lr=0.5)
    history, _ = drive(
        method,
        ONE,
        [
            (3.0, 1.0, arrival(completes=False, staleness=3)),
            (-1.0, 0.0, arrival(staleness=90)),
            (5.0, 1.0, arrival(completes=False)),
            (2.0, 2.0, arrival()),
        ],
    )
    assert history == pytest.approx([1.0, 1.25, 1.25, 2.25])


def test_afl_dw_by_hand():
    """At tau = s_max the cosine is 1/2: w = 1 + 0.1 * 0.5 * 2; at 2 s_max nothing moves."""
    method = make("afl_dw", server_lr=0.1, beta_s_max=75)
    for staleness, expected in ((0, 1.2), (75, 1.1), (150, 1.0), (400, 1.0)):
        history, seen = drive(method, ONE, [(3.0, 1.0, arrival(staleness=staleness))])
        assert history[0] == pytest.approx(expected)
        assert seen[0]["beta"] == pytest.approx(float(blending.cosine(75)(staleness)))


def test_fedrevive_before_warm_up_is_the_plain_update():
    """tau = 150 would be beta = 1, yet the update goes in unblended and beta is recorded as 0."""
    method = make("fedrevive", server_lr=0.1, beta_s_max=75)
    history, seen = drive(method, ONE, [(3.0, 1.0, arrival(version=5, staleness=150))])
    assert history == pytest.approx([1.2])
    assert seen[0]["beta"] == 0.0


def test_fedrevive_blend_by_hand():
    """Delta = 2, Delta^KD = -1, beta(75) = 1/2: w = 1 + 0.1 * (1 - 0.5)."""
    config = resolve("digits", "fedrevive", server_lr=0.1)
    optimizer = interface.server_optimizer(config)

    def run(reviver, staleness):
        rule = blend(reviver, blending.cosine(75), config)
        return drive(
            interface.compose(rule, 1, optimizer), ONE,
            [(3.0, 1.0, arrival(staleness=staleness))],
        )[0][0]  # fmt: skip

    assert run(scalar_reviver(-1.0), 75) == pytest.approx(1.05)
    assert run(scalar_reviver(-1.0), 0) == pytest.approx(1.2)
    assert run(scalar_reviver(-1.0), 500) == pytest.approx(0.9)
    assert run(scalar_reviver(-1.0, distilled=False), 500) == pytest.approx(1.2)  # unblended


@pytest.mark.parametrize(("how", "betas"), [("plain", [0, 0, 0, 0]), ("zero", [0, 0.5, 0.5, 0])])
def test_the_blend_of_the_warm_up(how, betas):
    """freeze = 2, warm-up = 3, nothing distilled: the authors' code halves the update then."""
    config = resolve("digits", "fedrevive", freeze_versions=2, warmup_versions=3, warmup_blend=how)
    rule = blend(scalar_reviver(0.0, distilled=False), blending.constant(0.5), config)
    method = interface.compose(rule, 1, optax.sgd(1.0))
    uploads = [(3.0, 1.0, arrival(version=version)) for version in (1, 2, 3, 4)]
    history, seen = drive(method, ONE, uploads)
    assert [row["beta"] for row in seen] == betas
    assert np.diff([1.0, *history]) == pytest.approx([2 * (1 - beta) for beta in betas])


def test_dd_fedrevive_by_hand():
    """Real images of ones and one teacher, the arriving model itself (w = 3), student at 1.

    Adam's first step is lr_kd towards the teacher: Delta^KD = 0.01, so with beta = 1/2
    w = 1 + 0.2 * (0.5 * 2 + 0.5 * 0.01).
    """
    method = make("dd_fedrevive", server_lr=0.2, distillation_lr=0.01)
    history, seen = drive(method, ONE, [(3.0, 1.0, arrival())])
    # Inputs are 1: a byte image of ones goes through this test's augmentation unscaled.
    assert history == pytest.approx([1 + 0.2 * (1.0 + 0.005)], rel=1e-5)
    assert seen[0]["beta"] == 0.5
    assert math.isfinite(seen[0]["distillation"])
    assert math.isnan(seen[0]["synthesis"])


def test_dd_fedrevive_needs_real_samples():
    config = resolve("digits", "dd_fedrevive", **TINY_METHOD)
    nothing = (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int32))
    for images in (None, nothing):
        with pytest.raises(ConfigError, match="distillation split"):
            methods.create(
                config, methods.Ingredients(scalar_model(), lambda x, k: x, real_samples=images)
            )


def test_the_generator_needs_sides_that_are_multiples_of_four():
    model = scalar_model()._replace(input_shape=(26, 28, 1))
    config = resolve("digits", "fedrevive", **TINY_METHOD)
    with pytest.raises(ConfigError, match="multiples of 4; these are 26x28"):
        methods.create(config, methods.Ingredients(model, lambda x, k: x))


def test_server_optimisers_are_optax():
    """Adam's first step is the rate in the direction of the mean update."""
    method = make("fedbuff", buffer_size=1, server_lr=0.25, server_optimizer="adam")
    history, _ = drive(method, ONE, [(-5.0, 1.0, arrival())])
    assert history == pytest.approx([0.75], rel=1e-5)
    method = make("fedbuff", buffer_size=1, server_lr=0.5, server_optimizer="momentum")
    history, _ = drive(method, ONE, [(2.0, 1.0, arrival()), (1.0, 1.0, arrival())])
    assert history == pytest.approx([1.5, 1.95])  # 1.5 + 0.5 * 0.9


def test_fedbuff_with_its_own_staleness_weight():
    """s(3) = 1/2 and s(0) = 1, mean over B = 2: w = 1 + 0.5 * (0.5 * 2 + 1) / 2."""
    method = make("fedbuff", buffer_size=2, server_lr=0.5, staleness_weight="sqrt")
    history, seen = drive(
        method,
        ONE,
        [(3.0, 1.0, arrival(completes=False, staleness=3)), (2.0, 1.0, arrival(staleness=0))],
    )
    assert history == pytest.approx([1.0, 1.5])
    assert [s["beta"] for s in seen] == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_an_update_of_nothing_moves_nothing(optimizer):
    """No server optimiser pulls weights towards zero on its own. Yogi starts with moments of 1e-6,
    a step of less than a thousandth of the rate."""
    method = make("fedbuff", buffer_size=1, server_optimizer=optimizer)
    large = {"w": jnp.asarray(1000.0)}
    params, _, _, _ = method.step(
        method.init(large), (), submission(scalar_upload(1000.0), arrival(), large)
    )
    assert float(params["w"]) == pytest.approx(1000, abs=0.001)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        *itertools.product(PUBLISHED_METHODS, ("momentum", "adam")),
        *(("fedbuff", other) for other in SERVER_OPTIMIZERS if other not in ("momentum", "adam")),
        *((name, "sgd" if name == "fadas" else "momentum") for name in NEW),
    ],
)
def test_a_rejected_upload_leaves_no_trace(name, optimizer):
    """Whatever it holds: neither parameters nor state change, but the buffer's place is taken.

    An optimiser with a memory gets one good step first, so that it has somewhere to go.
    """
    method = make(name, buffer_size=1, open_slots=1, concurrency=1, server_optimizer=optimizer)
    step = jax.jit(method.step)
    params, state, entry, _ = step(
        method.init(ONE),
        method.entry(ONE),
        submission(scalar_upload(2.0, method=method), arrival(), ONE),
    )
    assert float(params["w"]) > 1.0
    kept = jax.tree.map(np.asarray, (state, entry))
    after, state, entry, _ = step(
        state,
        entry,
        submission(scalar_upload(math.nan, method=method), arrival(1), params, ONE, accepted=False),
    )
    assert float(after["w"]) == float(params["w"])
    for a, b in zip(*map(jax.tree.leaves, (kept, (state, entry))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_state_is_stable(name):
    """Structure, shapes and dtypes of the state survive a step, so that nothing is recompiled."""
    method = make(name)
    state = method.init(ONE)
    before = method.entry(ONE)
    params, after, entry, metrics = jax.eval_shape(
        method.step, state, before, submission(scalar_upload(2.0, method=method), arrival(), ONE)
    )

    def described(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    assert described(state) == described(after)
    assert described(before) == described(entry)
    assert described(params) == described(ONE)
    assert "beta" in metrics
    assert all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())


# --- beta -----------------------------------------------------------------------------------------


def test_beta_by_hand():
    tau = np.asarray([0, 25, 50, 75, 100, 150, 151, 1000])
    cosine = [0, 0.25 * (2 - math.sqrt(3)), 0.25, 0.5, 0.75, 1, 1, 1]
    np.testing.assert_allclose(blending.cosine(75)(tau), cosine, atol=1e-6)
    np.testing.assert_allclose(blending.linear(0.005)(tau), np.minimum(1, 0.005 * tau), rtol=1e-6)
    np.testing.assert_allclose(
        blending.exponential(0.005)(tau), 1 - np.exp(-0.005 * tau), atol=1e-6
    )
    assert blending.constant(0.3)(tau).tolist() == pytest.approx([0.3] * 8)
    steps = blending.stepwise(150.0)(np.asarray([0, 37, 38, 74, 75, 112, 113, 149, 150, 999]))
    assert steps.tolist() == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1]


@pytest.mark.parametrize("shape", ["cosine", "constant", "linear", "exponential", "stepwise"])
def test_beta_stays_in_range_and_never_decreases(shape):
    config = resolve("digits", "fedrevive", beta_shape=shape, buffer_size=2, concurrency=10)
    values = np.asarray(blending.create(config)(np.arange(1000)))
    assert (values >= 0).all()
    assert (values <= 1).all()
    assert (np.diff(values) >= 0).all()
    assert shape == "constant" or values[0] == 0


def test_stepwise_follows_concurrency_and_buffer():
    config = resolve("digits", "afl_dw", beta_shape="stepwise", concurrency=20, buffer_size=2)
    assert float(blending.create(config)(15)) == 1.0  # 1.5 * 20 / 2
    assert float(blending.create(config)(14)) == 0.75
