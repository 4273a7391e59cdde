"""Where arrays cross from one room to another, a wrong shape is an error before anything runs."""

import jax
import jax.numpy as jnp
import pytest

from fedrevive_jax.clients.evaluation import make_evaluator
from fedrevive_jax.clients.local_training import make_window_trainer, train
from fedrevive_jax.config import Dfkd
from fedrevive_jax.dfkd import distillation, loss_guard, pool
from fedrevive_jax.messages import Download
from tests.toys import KEY, scalar_model

MODEL = scalar_model()
ONE = {"w": jnp.asarray(1.0)}
BASE = Download(ONE)
IMAGES = jnp.ones((6, 4, 4, 1))
LABELS = jnp.zeros(6, jnp.int32)


def shapes(function, *given):
    """Traces alone: nothing is compiled, nothing runs."""
    return jax.eval_shape(function, *given)


def trained(labels):
    batches = (IMAGES[None], labels[None])
    return shapes(lambda b: train(MODEL, ONE, b, lambda one: (*one, None), 0.1), batches)


def trained_together(indices, jobs, bases=(BASE, BASE)):
    trainer = make_window_trainer(
        MODEL, lambda store, positions, key: store[positions], 0.1, lambda job, step: KEY
    )
    return shapes(trainer, bases, IMAGES, LABELS, indices, jobs)


def distilled(samples=(3, 2, 5), targets=(3, 2, 5, 2), present=2):
    given = jnp.ones((*samples, 4, 4, 1)), jnp.ones(targets), jnp.ones(present, bool)
    return shapes(
        lambda x, y, here: distillation.distil(
            MODEL, ONE, x, y, here, loss_guard.init(Dfkd()), Dfkd(num_teachers=2)
        ),
        *given,
    )


def judged(teachers=2):
    ring = {"w": jnp.ones(teachers)}
    return shapes(
        lambda r, x: distillation.teacher_logits(MODEL, r, x), ring, jnp.ones((3, 2, 5, 4, 4, 1))
    )


def pooled(labels=6, mixes=(2, 2)):
    ring = pool.empty(8, IMAGES)
    shapes(lambda: pool.add(ring, IMAGES, jnp.zeros(labels, jnp.int32)))
    return shapes(lambda m: pool.draw(ring, m, 3, KEY), jnp.ones(mixes))


def evaluated(model=MODEL):
    evaluate = make_evaluator(model, lambda store, positions: store[positions], 3)
    return evaluate(ONE, IMAGES, LABELS, jnp.arange(6))


def indices(*shape):
    return jnp.zeros(shape, jnp.int32)


def test_right_shapes_pass():
    """The control of all below."""
    assert trained(LABELS).losses.shape == (1,)
    assert len(trained_together(indices(2, 1, 6), indices(2))) == 2
    assert distilled().losses.shape == (3,)
    assert judged().shape == (3, 2, 5, 2)
    assert pooled().shape == (2, 3)
    assert evaluated().accuracy in (0.0, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: trained(LABELS[:, None]),
        lambda: trained_together(indices(2, 6), indices(2)),
        lambda: trained_together(indices(3, 1, 6), indices(2)),
        lambda: trained_together(indices(2, 1, 6), indices(2), (BASE,)),
        lambda: trained_together(
            indices(2, 1, 6), indices(2), (BASE, Download({"w": jnp.ones(3)}))
        ),
        lambda: distilled(samples=(3, 1, 5)),
        lambda: distilled(targets=(3, 2, 5, 4)),
        lambda: distilled(present=3),
        lambda: judged(teachers=3),
        lambda: pooled(labels=5),
        lambda: pooled(mixes=(2,)),
        lambda: evaluated(MODEL._replace(num_classes=3)),
    ],
)
def test_wrong_shapes_are_told(wrong):
    with pytest.raises(AssertionError, match=r"Assertion assert_\w+ failed"):
        wrong()
