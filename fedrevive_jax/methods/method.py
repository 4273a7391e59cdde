"""The interface of all methods, and the composition that they are.

A method is a pair of pure functions over an explicit state. `compose` builds one from an update
rule (what becomes of a single upload's Delta), an aggregation (the direction in which a buffer of B
processed updates goes, by default their mean), and a server optimiser from optax:

    Delta = theta' - theta_b,   Delta~ = rule(Delta),
    every B arrivals: theta <- theta + optimiser(direction of the buffered Delta~),  v <- v + 1.

With optax's plain `sgd(eta_s)` and the mean the last line is theta + eta_s * mean(Delta~).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedrevive_jax.compute import trees
from fedrevive_jax.config import Config
from fedrevive_jax.messages import ClientPart, Submission
from fedrevive_jax.methods import staleness
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params

Metrics = dict[str, jax.Array]


class Ingredients(NamedTuple):
    """What a method may be built from, beside its configuration.

    Attributes:
      model: the model of clients and server.
      augment: (samples, key) -> augmented samples, for samples that the server makes.
      frozen: the model's frozen arrays.
      class_mixes: true label histograms [N, classes], float32; a real federation has none.
      real_samples: held-out (byte images or token ids, labels), for the data-dependent reference.
      augment_real: `augment` for these.
      seed_text: labelled texts that synthesis of text starts from, see `dfkd.prompts`.
      mesh: devices that share the work, see `devices`.
    """

    model: Model
    augment: Callable[[Any, jax.Array], Any]
    frozen: Any = ()
    class_mixes: Any = None
    real_samples: tuple[Any, Any] | None = None
    augment_real: Callable[[Any, jax.Array], Any] = lambda samples, key: samples
    seed_text: Any = None
    mesh: Mesh | None = None


class Method(NamedTuple):
    """A federated method.

    Attributes:
      buffer_size: B, arrivals that make a new version.
      init: global params -> state, any pytree.
      step: (state, entry, submission) -> (params, state, entry, metrics), pure and jittable. The
        entry is what the method keeps of the arriving client, see below. When `arrival.completes`,
        the returned parameters are the next version; otherwise they are `submission.params`.
        Metrics are float32 [] by name, `beta` among them.
      entry: global params -> what is kept of each client before its first upload, all zeros; ()
        for methods without a cache. The entries of all clients live outside the state, in a
        `client_cache.ClientCache`, because N of them may not fit on the device.
      extra: state -> what goes out to clients with the newest version, see `messages.Download`. It
        changes only where `arrival.completes`.
      client: what clients do beside their training.
    """

    buffer_size: int
    init: Callable[[Params], Any]
    step: Callable[[Any, Any, Submission], tuple[Params, Any, Any, Metrics]]
    entry: Callable[[Params], Any] = lambda params: ()
    extra: Callable[[Any], Any] = lambda state: ()
    client: ClientPart = ClientPart()


class UpdateRule(NamedTuple):
    """What becomes of a single update.

    Attributes:
      init: global params -> state.
      apply: (state, delta, submission) -> (state, delta, metrics), pure. `delta` is the update so
        far; a rule that wraps another hands it on. Where `submission.accepted` is false the state
        must stay as it is; the rest is not used then.
    """

    init: Callable[[Params], Any]
    apply: Callable[[Any, Params, Submission], tuple[Any, Params, Metrics]]


class Aggregation(NamedTuple):
    """In which direction a buffer of processed updates goes.

    Attributes:
      init: global params -> state, its buffer empty.
      take: (state, entry, delta, submission) -> (state, entry), pure: one more processed update.
      direction: (state, taken, params) -> (direction, state), pure: what the `taken` updates since
        the last version come to, a pytree like the parameters, and the state with an empty buffer.
      entry: what is kept of each client, see `Method`.
    """

    init: Callable[[Params], Any]
    take: Callable[[Any, Any, Params, Submission], tuple[Any, Any]]
    direction: Callable[[Any, jax.Array, Params], tuple[Params, Any]]
    entry: Callable[[Params], Any] = lambda params: ()


class Base(NamedTuple):
    """The step of a method that others can build on.

    Attributes:
      rule: its update rule, without state.
      optimizer: its server optimiser.
      rate_factor: see `compose`.
    """

    rule: UpdateRule
    optimizer: optax.GradientTransformation
    rate_factor: Callable[[jax.Array], jax.Array] | None = None

    def over(self, buffer_size: int) -> Method:
        """The method that takes this step with the mean of every `buffer_size` updates."""
        return compose(self.rule, buffer_size, self.optimizer, rate_factor=self.rate_factor)


class ComposedState(NamedTuple):
    """State of a composed method.

    Attributes:
      rule: state of the update rule.
      aggregation: state of the aggregation.
      optimizer: state of the server optimiser.
      taken: int32 [], how many updates the buffer holds.
      stalest: int32 [], the largest staleness among them; 0 for an empty buffer.
    """

    rule: Any
    aggregation: Any
    optimizer: Any
    taken: jax.Array
    stalest: jax.Array


def as_it_is() -> UpdateRule:
    """The plain update."""

    def apply(state, delta, submission):
        return state, delta, {"beta": jnp.zeros((), jnp.float32)}

    return UpdateRule(lambda params: (), apply)


def weighted(weight_of: Callable[[jax.Array], jax.Array]) -> UpdateRule:
    """Delta~ = s(tau) Delta; what is taken away, 1 - s(tau), is recorded as beta."""

    def apply(state, delta, submission: Submission):
        weight = jnp.asarray(weight_of(submission.arrival.staleness), jnp.float32)
        return state, trees.scale(weight, delta), {"beta": 1 - weight}

    return UpdateRule(lambda params: (), apply)


def plain(config: Config) -> UpdateRule:
    """The update under the configured staleness weight."""
    if config.staleness_weight == "none":
        return as_it_is()
    return weighted(staleness.create(config))


def mean() -> Aggregation:
    """The mean of the buffered updates, whatever their weights."""

    def take(total, entry, delta, submission):
        return jax.tree.map(jnp.add, total, delta), entry

    def direction(total, taken, params):
        return jax.tree.map(lambda t: t / taken, total), jax.tree.map(jnp.zeros_like, total)

    return Aggregation(lambda params: jax.tree.map(jnp.zeros_like, params), take, direction)


def server_optimizer(config: Config) -> optax.GradientTransformation:
    """The configured optimiser at rate eta_s."""
    rate = config.server_lr
    return {
        "sgd": lambda: optax.sgd(rate),
        "momentum": lambda: optax.sgd(rate, momentum=0.9),
        "adam": lambda: optax.adam(rate),
        "adagrad": lambda: optax.adagrad(rate),
        "yogi": lambda: optax.yogi(rate),
        "amsgrad": lambda: optax.amsgrad(rate),
        "rmsprop": lambda: optax.rmsprop(rate),
        "adabelief": lambda: optax.adabelief(rate),
        "lion": lambda: optax.lion(rate, weight_decay=0.0),
    }[config.server_optimizer]()


def compose(
    rule: UpdateRule,
    buffer_size: int,
    optimizer: optax.GradientTransformation,
    aggregation: Aggregation | None = None,
    rate_factor: Callable[[jax.Array], jax.Array] | None = None,
) -> Method:
    """A method from its parts; see the module.

    Args:
      rule: what becomes of a single update.
      buffer_size: B.
      optimizer: takes the step.
      aggregation: the direction of a buffer; the mean where None.
      rate_factor: tau_max, the largest staleness in the buffer -> factor of the server's rate; 1
        where None.
    """
    gather = mean() if aggregation is None else aggregation

    def init(params: Params) -> ComposedState:
        nothing = jnp.zeros((), jnp.int32)
        return ComposedState(
            rule.init(params), gather.init(params), optimizer.init(params), nothing, nothing
        )

    def step(state: ComposedState, entry, submission: Submission):
        arrival, accepted = submission.arrival, submission.accepted
        # What passes through a branch is copied there; the state of a rule, which may hold a pool
        # of gigabytes, passes through none.
        rule_state, delta, metrics = rule.apply(state.rule, submission.delta, submission)
        metrics = {name: jnp.where(accepted, value, jnp.nan) for name, value in metrics.items()}
        gathered, entry = jax.lax.cond(
            accepted,
            lambda aggregation, entry: gather.take(aggregation, entry, delta, submission),
            lambda aggregation, entry: (aggregation, entry),
            state.aggregation,
            entry,
        )
        taken = state.taken + accepted
        stalest = jnp.where(accepted, jnp.maximum(state.stalest, arrival.staleness), state.stalest)

        def next_version(params, aggregation, optimizer_state):
            direction, emptied = gather.direction(aggregation, taken, params)
            # optax descends; a direction is already where to go.
            descent = jax.tree.map(jnp.negative, direction)
            updates, optimizer_state = optimizer.update(descent, optimizer_state, params)
            if rate_factor is not None:
                updates = trees.scale(rate_factor(stalest), updates)
            nothing = jnp.zeros_like(taken)
            return optax.apply_updates(params, updates), emptied, optimizer_state, nothing, nothing

        # A buffer of rejected uploads alone gives no direction, not even to a momentum.
        params, gathered, optimizer_state, taken, stalest = jax.lax.cond(
            arrival.completes & (taken > 0),
            next_version,
            lambda *unchanged: (*unchanged, taken, stalest),
            submission.params,
            gathered,
            state.optimizer,
        )
        state = ComposedState(rule_state, gathered, optimizer_state, taken, stalest)
        return params, state, entry, metrics

    return Method(buffer_size, init, step, gather.entry)
