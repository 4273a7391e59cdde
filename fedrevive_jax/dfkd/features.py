"""A small generator of a model's features, the inputs of its last layer, and its training.

That of FedGen (arXiv 2105.10056), as its authors' code has it:

    G(eps, y) = W_2 relu(BN(W_1 [eps, onehot(y)] + b_1)) + b_2,   eps uniform in [0, 1).

It is trained on the heads f_k of c clients, with n_k(y) the samples of class y that client k has
trained on. Classes y are uniform among those that any of them has seen; of b of them

    w_k(y) = (1 + n_k(y)) / sum_j (1 + n_j(y)),
    L_teacher   = (1/b) sum_i sum_k w_k(y_i) CE(f_k(G(eps_i, y_i)), y_i),
    L_student   = 1/(b C) sum_i KL(softmax(sum_k w_k(y_i) f_k(G_i)) || softmax(f(G_i))),
    L_diversity = exp(-(1/b^2) sum_ij D(eps_i, eps_j) D'(G_i, G_j)),

with f the global head, C classes, D the mean squared and D' the mean absolute difference. Descended
is L_teacher - beta L_student + eta L_diversity.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedrevive_jax.config import FedGen
from fedrevive_jax.dfkd import losses
from fedrevive_jax.models import Model
from fedrevive_jax.models.layers import add, batch_statistics, torch_bias_init, torch_kernel_init
from fedrevive_jax.models.model import Params, exactly

EPSILON = 1e-5
# How much of a batch's statistics goes into the running ones, PyTorch's default.
MOMENTUM = 0.1


class FeatureGenerator(NamedTuple):
    """G, as it goes out to clients.

    Attributes:
      params: W_1, b_1, scale and offset of the normalisation, W_2, b_2.
      mean, variance: running statistics of the normalisation, [hidden]; clients normalise by them,
        so that a feature does not depend on those beside it.
      trained: int32 [], how often it was trained; 0 is a random start.
    """

    params: Params
    mean: jax.Array
    variance: jax.Array
    trained: jax.Array


class FeatureGeneratorState(NamedTuple):
    """The generator and the state of its optimiser."""

    generator: FeatureGenerator
    optimizer: Any


class Heads(NamedTuple):
    """Heads that a generator is trained on.

    Attributes:
      params: the heads' parameters, leaves [c, ...].
      counts: n_k(y), float32 [c, classes].
      present: bool [c], whether there is a client k.
    """

    params: Params
    counts: jax.Array
    present: jax.Array


def init(key: jax.Array, classes: int, width: int, settings: FedGen) -> FeatureGenerator:
    """A random start, PyTorch's default: uniform within 1 / sqrt(inputs of the layer).

    Args:
      key: for the draw.
      classes: number of them.
      width: d, numbers of a feature.
      settings: `fedgen_noise` and `fedgen_hidden` are read.
    """
    hidden, inputs = settings.fedgen_hidden, settings.fedgen_noise + classes
    keys = jax.random.split(key, 4)

    def dense(kernel_key, bias_key, fan_in, fan_out):
        return {
            "kernel": torch_kernel_init(kernel_key, (fan_in, fan_out), jnp.float32),
            "bias": torch_bias_init(fan_in)(bias_key, (fan_out,), jnp.float32),
        }

    params = {
        "hidden": dense(keys[0], keys[1], inputs, hidden),
        "norm": {"scale": jnp.ones(hidden), "bias": jnp.zeros(hidden)},
        "output": dense(keys[2], keys[3], hidden, width),
    }
    return FeatureGenerator(params, jnp.zeros(hidden), jnp.ones(hidden), jnp.zeros((), jnp.int32))


def noise(key: jax.Array, count: int, settings: FedGen) -> jax.Array:
    """eps, [count, noise]."""
    return jax.random.uniform(key, (count, settings.fedgen_noise))


def make(generator: FeatureGenerator, eps: jax.Array, labels: jax.Array) -> jax.Array:
    """Features [b, d] of classes int [b], normalised by the running statistics."""
    hidden = _hidden(generator.params, eps, labels)
    return _output(generator.params, hidden, generator.mean, generator.variance)


def make_in_training(
    generator: FeatureGenerator, eps: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features normalised by the batch's own statistics, and the running statistics then.

    As PyTorch does, the running variance takes the batch's times b / (b - 1).
    """
    hidden = _hidden(generator.params, eps, labels)
    mean, variance = batch_statistics(hidden)
    count = len(hidden)
    own = jax.lax.stop_gradient((mean, variance * (count / max(count - 1, 1))))
    running_mean, running_variance = (
        (1 - MOMENTUM) * old + MOMENTUM * new
        for old, new in zip((generator.mean, generator.variance), own, strict=True)
    )
    made = _output(generator.params, hidden, mean, variance)
    return made, running_mean, running_variance


def _hidden(params: Params, eps: jax.Array, labels: jax.Array) -> jax.Array:
    layer = params["hidden"]
    classes = layer["kernel"].shape[0] - eps.shape[1]
    inputs = jnp.concatenate([eps, jax.nn.one_hot(labels, classes)], axis=1)
    return add(inputs @ layer["kernel"], layer["bias"])


def _output(params: Params, hidden: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    norm, layer = params["norm"], params["output"]
    factor = norm["scale"] * jax.lax.rsqrt(variance + EPSILON)
    x = add((hidden - mean[None]) * factor[None], norm["bias"])
    return add(jax.nn.relu(x) @ layer["kernel"], layer["bias"])


def class_weights(heads: Heads) -> tuple[jax.Array, jax.Array]:
    """1 + n_k(y) of clients that are there, else 0, [c, classes]; and whether any has seen y."""
    present = heads.present[:, None]
    seen = (present & (heads.counts > 0)).any(axis=0)
    return jnp.where(present, 1 + heads.counts, 0.0), seen


def teacher_loss(weights: jax.Array, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """L_teacher of weights [c, b], logits [c, b, classes] and labels int [b]."""
    return losses.one_hot_loss(weights, logits, labels)


def student_loss(weights: jax.Array, logits: jax.Array, student: jax.Array) -> jax.Array:
    """L_student; the mean is over samples and classes, as in the authors' code.

    Args:
      weights, logits: see `teacher_loss`.
      student: the global head's logits, [b, classes].
    """
    together = (weights[..., None] * logits).sum(axis=0)
    return losses.kl_divergence(together, student).mean() / student.shape[1]


def diversity_loss(eps: jax.Array, features: jax.Array) -> jax.Array:
    """L_diversity of noise [b, noise] and features [b, d]; 1 where all features are the same."""
    apart = ((eps[:, None] - eps[None]) ** 2).mean(axis=-1)
    features_apart = jnp.abs(features[:, None] - features[None]).mean(axis=-1)
    return jnp.exp(-(apart * features_apart).mean())


def make_optimizer(settings: FedGen) -> optax.GradientTransformation:
    """Adam at rate 1, with L2 weight decay added to the gradient as PyTorch does."""
    return optax.chain(
        optax.add_decayed_weights(settings.fedgen_weight_decay), optax.scale_by_adam()
    )


def start(key: jax.Array, classes: int, width: int, settings: FedGen) -> FeatureGeneratorState:
    """An untrained generator, see `init`."""
    generator = init(key, classes, width, settings)
    return FeatureGeneratorState(generator, make_optimizer(settings).init(generator.params))


def make_trainer(
    model: Model, settings: FedGen
) -> Callable[..., tuple[FeatureGeneratorState, dict[str, jax.Array]]]:
    """Training of a generator on the heads of clients.

    Args:
      model: its head is read.
      settings: the fields `fedgen_...`.

    Returns:
      A pure function (state, heads, head, key) -> (state, means of the three losses by name), where
      `heads` are the clients' and `head` is the global one. It takes `fedgen_steps` steps at the
      rate of this training, lr decay^trained.
    """
    assert model.head is not None
    optimizer, apply_head = make_optimizer(settings), model.head.apply
    batch = settings.fedgen_batch

    def loss_fn(params, generator: FeatureGenerator, heads: Heads, head, key):
        weights, seen = class_weights(heads)
        label_key, noise_key = jax.random.split(key)
        labels = jax.random.categorical(label_key, jnp.where(seen, 0.0, -jnp.inf), shape=(batch,))
        eps = noise(noise_key, batch, settings)
        made, mean, variance = make_in_training(generator._replace(params=params), eps, labels)
        judged = jax.vmap(apply_head, in_axes=(0, None))(heads.params, made)
        own = losses.teacher_weights(weights, labels)
        terms = (
            teacher_loss(own, judged, labels),
            student_loss(own, judged, apply_head(head, made)),
            diversity_loss(eps, made),
        )
        teacher, student, diversity = terms
        loss = teacher + settings.fedgen_diversity * diversity
        if settings.fedgen_student:
            loss = loss - settings.fedgen_student * student
        return loss, (jnp.stack(terms), mean, variance)

    def train(state: FeatureGeneratorState, heads: Heads, head: Params, key: jax.Array):
        rate = decayed(settings.fedgen_lr, state.generator.trained, settings)

        def step(carry: FeatureGeneratorState, number):
            generator = carry.generator
            grads, (terms, mean, variance) = jax.grad(loss_fn, has_aux=True)(
                generator.params, generator, heads, head, jax.random.fold_in(key, number)
            )
            direction, own = optimizer.update(grads, carry.optimizer, generator.params)
            params = jax.tree.map(lambda p, d: p - rate * d, generator.params, direction)
            moved = generator._replace(params=params, mean=mean, variance=variance)
            return FeatureGeneratorState(moved, own), terms

        state, terms = jax.lax.scan(step, state, jnp.arange(settings.fedgen_steps))
        generator = state.generator._replace(trained=state.generator.trained + 1)
        names = ("generator_teacher", "generator_student", "generator_diversity")
        means = dict(zip(names, terms.mean(axis=0), strict=True))
        return state._replace(generator=generator), means

    return exactly(train, model.platform)


def decayed(value: float, trained: jax.Array, settings: FedGen, floor: float = 0.0) -> jax.Array:
    """value decay^trained, at least the floor where the value is not 0; float32 []."""
    decay = jnp.float32(settings.fedgen_decay) ** trained
    return jnp.maximum(value * decay, floor if value else 0.0)
