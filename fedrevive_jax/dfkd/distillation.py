"""Multi-teacher distillation of pool samples into the global parameters."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedrevive_jax.compute import devices, trees
from fedrevive_jax.config import Dfkd
from fedrevive_jax.dfkd import loss_guard, losses
from fedrevive_jax.dfkd.loss_guard import LossGuard
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params, as_inputs, per_call


class Distilled(NamedTuple):
    """Result of a distillation.

    Attributes:
      delta: Delta^KD = student - global.
      losses: loss of every step, [steps].
      counted: int32 [], how many of the steps the loss guard let count.
      guard: the loss guard afterwards.
    """

    delta: Params
    losses: jax.Array
    counted: jax.Array
    guard: LossGuard


def teacher_logits(
    model: Model,
    teacher_params: Params,
    samples: Any,
    frozen: Any = (),
    mesh: Mesh | None = None,
) -> jax.Array:
    """Every teacher judges its own draw.

    Args:
      model: the model.
      teacher_params: leaves [c, ...].
      samples: pytree of arrays [steps, c, b, ...].
      frozen: the model's frozen arrays.
      mesh: the devices that share the teachers.

    Returns:
      [steps, c, b, classes].
    """
    steps, num_teachers, batch = jax.tree.leaves(samples)[0].shape[:3]
    chex.assert_tree_shape_prefix(samples, (steps, num_teachers, batch))
    chex.assert_tree_shape_prefix(teacher_params, (num_teachers,))

    def of_teacher(leaf):
        return leaf.swapaxes(0, 1).reshape(num_teachers, steps * batch, *leaf.shape[3:])

    size = per_call(steps, batch, model.input_shape, model.platform) * batch

    def judge_in_turn(frozen, pairs):
        def values(params, x):
            return model.apply(params, as_inputs(x, frozen))[0]

        def judge(pair):
            params, own = pair
            calls = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), own)
            logits = jax.lax.map(functools.partial(values, params), calls)
            return logits.reshape(-1, logits.shape[-1])

        # One plain call per teacher: weights that differ per call would make grouped convolutions.
        return jax.lax.map(judge, pairs)

    pairs = (teacher_params, jax.tree.map(of_teacher, samples))
    logits = devices.split(mesh, judge_in_turn)(frozen, pairs)
    return logits.reshape(num_teachers, steps, batch, -1).swapaxes(0, 1)


def distil(
    model: Model,
    params: Params,
    samples: Any,
    targets: jax.Array,
    present: jax.Array,
    guard: LossGuard,
    settings: Dfkd,
    *,
    frozen: Any = (),
    mesh: Mesh | None = None,
) -> Distilled:
    """Trains a student that starts at the global parameters.

    Adam with a fresh state, L2 weight decay added to the gradient; the loss is the mean over all
    teachers' samples of T^2 KL(teacher || student).

    Args:
      model: the model.
      params: the global parameters.
      samples: pytree of arrays [steps, c, b, ...], each teacher's draw for each step.
      targets: the teachers' logits, [steps, c, b, classes].
      present: bool [c], which teachers exist; the samples of the others do not count.
      guard: see `loss_guard`; a step whose loss does not count is skipped altogether, since weight
        decay alone would become a full step of Adam.
      settings: the fields `distillation_*` and `loss_guard` are read. `teacher_batch` teachers'
        samples pass through the student in one call, and the gradient is summed over the calls; 0:
        see `model.per_call`.
      frozen: the model's frozen arrays.
      mesh: the devices that share the samples of a call; the gradient is summed over them.
    """
    temperature = settings.distillation_temperature
    optimizer = optax.chain(
        optax.add_decayed_weights(settings.distillation_weight_decay),
        optax.adam(settings.distillation_lr),
    )
    targets = jax.lax.stop_gradient(targets)  # teachers are data
    steps, num_teachers, batch = targets.shape[:3]
    chex.assert_shape(targets, (steps, num_teachers, batch, model.num_classes))
    chex.assert_tree_shape_prefix(samples, (steps, num_teachers, batch))
    chex.assert_shape(present, (num_teachers,))
    per_sample = jnp.broadcast_to(present[:, None] / (present.sum() * batch), (num_teachers, batch))
    size = settings.teacher_batch or per_call(
        num_teachers, batch, model.input_shape, model.platform
    )

    def apply(shared, samples):
        student, frozen = shared
        return model.apply(student, as_inputs(samples, frozen))[0]

    def loss_fn(student, x, wanted, per_sample):
        together = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)
        logits = devices.split(mesh, apply)((student, frozen), together)
        divergence = losses.kl_divergence(wanted, logits.reshape(wanted.shape), temperature)
        return (per_sample * divergence).sum()

    def loss_and_gradient(student, x, wanted):
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), (x, wanted, per_sample)
        )

        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(student, *part)), None

        zero = (jnp.zeros((), targets.dtype), jax.tree.map(jnp.zeros_like, student))
        return jax.lax.scan(add, zero, parts)[0]

    def step(carry, batch):
        student, opt_state, guard, counted = carry
        number, *batch = batch
        loss, grads = loss_and_gradient(student, *batch)
        counts, guard = loss_guard.check(guard, "distillation", number, loss, settings)
        updates, new_state = optimizer.update(grads, opt_state, student)
        moved = (optax.apply_updates(student, updates), new_state)
        student, opt_state = trees.select(counts, moved, (student, opt_state))
        return (student, opt_state, guard, counted + counts), loss

    carry = (params, optimizer.init(params), guard, jnp.zeros((), jnp.int32))
    (student, _, guard, counted), step_losses = jax.lax.scan(
        step, carry, (jnp.arange(steps), samples, targets)
    )
    delta = jax.tree.map(jnp.subtract, student, params)
    return Distilled(delta, step_losses, counted, guard)
