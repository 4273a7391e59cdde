"""The loss terms of synthesis and distillation.

Symbols: k counts teachers (c of them), i counts samples (b), y_i is the target class of sample i,
q_k the class mix of teacher k's client, m_k teacher k.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from fedrevive_jax.models.model import Taps

WEIGHT_FLOOR = 1e-8


def teacher_weights(proxies: jax.Array, targets: jax.Array) -> jax.Array:
    """w_k(y_i) = q_k(y_i) / sum_j q_j(y_i), the denominator at least 1e-8.

    Args:
      proxies: q, [c, classes]; rows of absent teachers are zero.
      targets: y, int [b].

    Returns:
      [c, b].
    """
    share = proxies[:, targets]
    return share / jnp.maximum(share.sum(axis=0, keepdims=True), WEIGHT_FLOOR)


def statistics_distance(taps: Taps, reference: Taps) -> jax.Array:
    """sum over taps of ||mu - mu'||_2 + ||sigma^2 - sigma'^2||_2; the norms are not squared.

    The gradient of a norm at zero is taken as zero. Without taps the distance is zero.
    """
    distances = [
        optax.safe_norm(mean_k - mean, 0.0) + optax.safe_norm(variance_k - variance, 0.0)
        for (mean, variance), (mean_k, variance_k) in zip(taps, reference, strict=True)
    ]
    return functools.reduce(jnp.add, distances, jnp.zeros(()))


def feature_loss(weights: jax.Array, distances: jax.Array) -> jax.Array:
    """L_feat = (1/b) sum_k [sum_i w_k(y_i)] distance_k.

    Args:
      weights: w, [c, b].
      distances: `statistics_distance` inside each teacher, [c].
    """
    return (weights.sum(axis=1) * distances).sum() / weights.shape[1]


def one_hot_loss(weights: jax.Array, teacher_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """L_ce = (1/b) sum_i sum_k w_k(y_i) CE(m_k(x_i), y_i).

    Args:
      weights: w, [c, b].
      teacher_logits: [c, b, classes].
      targets: y, int [b]; or [c, b], where each teacher judges samples of its own.
    """
    entropy = optax.softmax_cross_entropy_with_integer_labels(
        teacher_logits, jnp.broadcast_to(targets, teacher_logits.shape[:2])
    )
    return (weights * entropy).sum() / weights.shape[1]


def agreement(weights: jax.Array, teacher_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The share of samples of whose classes their judges are convinced, float32 [].

    A sample counts where sum_k w_k(y) softmax(m_k(x)) is largest at y. Arguments as those of
    `one_hot_loss`; samples without a judge count for nothing.
    """
    answers = jax.lax.stop_gradient(weights[..., None] * jax.nn.softmax(teacher_logits))
    if targets.ndim == 1:
        answers, weights = answers.sum(axis=0), weights.sum(axis=0)
    right = (answers.argmax(axis=-1) == targets) & (weights > 0)
    judged = jnp.maximum((weights > 0).sum(), 1)
    return right.sum().astype(jnp.float32) / judged.astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def kl_divergence(
    teacher_logits: jax.Array, student_logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """T^2 KL(p || q) per sample, p = softmax(teacher / T), q = softmax(student / T).

    The derivative is written out: with respect to the student it is T (q - p), exactly zero where
    the logits are equal. Rounding noise in its place would be blown up to full steps by Adam;
    without weight decay, a student that agrees with its teachers stays where it is.
    """
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(axis=-1)


@kl_divergence.defjvp
def _kl_divergence_jvp(temperature, primals, tangents):
    teacher_logits, student_logits = primals
    teacher_tangent, student_tangent = tangents
    log_p = jax.nn.log_softmax(teacher_logits / temperature)
    log_q = jax.nn.log_softmax(student_logits / temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    excess = log_p - log_q
    divergence = (p * excess).sum(axis=-1, keepdims=True)
    tangent = (q - p) * student_tangent + p * (excess - divergence) * teacher_tangent
    return temperature**2 * divergence[..., 0], temperature * tangent.sum(axis=-1)


def adversarial_loss(
    weights: jax.Array, teacher_logits: jax.Array, student_logits: jax.Array
) -> jax.Array:
    """L_adv = -(1/b) sum_i sum_k w_k(y_i) 1[argmax student = argmax m_k] KL(m_k || student).

    Args:
      weights: w, [c, b].
      teacher_logits: [c, b, classes].
      student_logits: [b, classes]; or [c, b, classes], see `one_hot_loss`.
    """
    if student_logits.ndim < teacher_logits.ndim:
        student_logits = student_logits[None]
    agree = student_logits.argmax(axis=-1) == teacher_logits.argmax(axis=-1)
    divergence = kl_divergence(teacher_logits, student_logits)
    return -(weights * agree * divergence).sum() / weights.shape[1]
