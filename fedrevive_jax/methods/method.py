"""The interface of all methods, and the composition that most of them are.

A method is a pair of pure functions over an explicit state. `compose` builds one from an update
rule (what becomes of a single upload's Delta), a buffer of B processed updates, and a server
optimiser from optax:

    Delta = theta' - theta_b,   Delta~ = rule(Delta),
    every B arrivals: theta <- theta + optimiser(mean of the buffered Delta~),  v <- v + 1.

With optax's plain `sgd(eta_s)` the last line is theta + eta_s * mean(Delta~).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedrevive_jax.config import Config
from fedrevive_jax.messages import Arrival, Upload
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params

Metrics = dict[str, jax.Array]


class Ingredients(NamedTuple):
    """What a method may be built from, beside its configuration.

    Attributes:
      model: the model of clients and server.
      augment: (samples, key) -> augmented samples, for samples on the server, see `feed.Feed`.
      frozen: the model's frozen arrays.
      class_mixes: true label histograms [N, classes], float32; a real federation has none.
      real_samples: held-out (byte images or token ids, labels), for the data-dependent reference.
      seed_text: labelled texts that synthesis of text starts from, see `dfkd.prompts`.
      mesh: devices that share the work, see `devices`.
    """

    model: Model
    augment: Callable[[Any, jax.Array], Any]
    frozen: Any = ()
    class_mixes: Any = None
    real_samples: tuple[Any, Any] | None = None
    seed_text: Any = None
    mesh: Mesh | None = None


class Method(NamedTuple):
    """A federated method.

    Attributes:
      buffer_size: B, arrivals that make a new version.
      init: global params -> state, any pytree.
      step: (params, base, state, upload, arrival, accepted, key) -> (params, state, metrics).
        Pure and jittable. `base` are the parameters the upload's job started from; `accepted` is
        whether the server core found the upload sound: otherwise it must leave no trace but the
        place it takes in the buffer. When `arrival.completes`, the returned parameters are the next
        version; otherwise they are `params`. Metrics are float32 [] by name, `beta` among them.
    """

    buffer_size: int
    init: Callable[[Params], Any]
    step: Callable[..., tuple[Params, Any, Metrics]]


class UpdateRule(NamedTuple):
    """What becomes of a single update.

    Attributes:
      init: global params -> state.
      apply: (state, delta, params, upload, arrival, key) -> (state, delta, metrics), pure.
    """

    init: Callable[[Params], Any]
    apply: Callable[..., tuple[Any, Params, Metrics]]


class ComposedState(NamedTuple):
    """State of a composed method.

    Attributes:
      rule: state of the update rule.
      optimizer: state of the server optimiser.
      total: sum of the processed updates in the buffer, a pytree like the parameters.
      taken: int32 [], how many updates the sum holds.
    """

    rule: Any
    optimizer: Any
    total: Params
    taken: jax.Array


def as_it_is() -> UpdateRule:
    """The plain update."""

    def apply(state, delta, params, upload, arrival, key):
        del params, upload, arrival, key
        return state, delta, {"beta": jnp.zeros((), jnp.float32)}

    return UpdateRule(lambda params: (), apply)


def weighted(weight_of: Callable[[jax.Array], jax.Array]) -> UpdateRule:
    """Delta~ = s(tau) Delta; what is taken away, 1 - s(tau), is recorded as beta."""

    def apply(state, delta, params, upload, arrival, key):
        del params, upload, key
        weight = jnp.asarray(weight_of(arrival.staleness), jnp.float32)
        delta = jax.tree.map(lambda d: weight.astype(d.dtype) * d, delta)
        return state, delta, {"beta": 1 - weight}

    return UpdateRule(lambda params: (), apply)


def server_optimizer(config: Config) -> optax.GradientTransformation:
    """The configured optimiser at rate eta_s."""
    rate = config.server_lr
    return {
        "sgd": lambda: optax.sgd(rate),
        "momentum": lambda: optax.sgd(rate, momentum=0.9),
        "adam": lambda: optax.adam(rate),
        "adagrad": lambda: optax.adagrad(rate),
        "yogi": lambda: optax.yogi(rate),
    }[config.server_optimizer]()


def compose(
    rule: UpdateRule,
    buffer_size: int,
    optimizer: optax.GradientTransformation,
) -> Method:
    """A method from an update rule, a buffer and a server optimiser; see the module."""

    def init(params: Params) -> ComposedState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ComposedState(
            rule.init(params), optimizer.init(params), zeros, jnp.zeros((), jnp.int32)
        )

    def step(params, base, state, upload: Upload, arrival: Arrival, accepted, key):
        def take(state):
            delta = jax.tree.map(jnp.subtract, upload.params, base)
            rule_state, delta, metrics = rule.apply(state.rule, delta, params, upload, arrival, key)
            total = jax.tree.map(jnp.add, state.total, delta)
            return state._replace(rule=rule_state, total=total, taken=state.taken + 1), metrics

        _, shapes = jax.eval_shape(take, state)
        nothing = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
        state, metrics = jax.lax.cond(accepted, take, lambda s: (s, nothing), state)

        def next_version(params, state):
            # optax descends; an update is already a direction to go.
            descent = jax.tree.map(lambda t: -t / state.taken, state.total)
            updates, optimizer_state = optimizer.update(descent, state.optimizer, params)
            emptied = state._replace(
                optimizer=optimizer_state,
                total=jax.tree.map(jnp.zeros_like, state.total),
                taken=jnp.zeros_like(state.taken),
            )
            return optax.apply_updates(params, updates), emptied

        # A buffer of rejected uploads alone gives no direction, not even to a momentum.
        params, state = jax.lax.cond(
            arrival.completes & (state.taken > 0), next_version, lambda p, s: (p, s), params, state
        )
        return params, state, metrics

    return Method(buffer_size, init, step)
