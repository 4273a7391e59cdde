"""FedGen: clients regularise their training by features that the server makes (arXiv 2105.10056).

The server trains a small generator G of the model's last hidden features on the heads that clients
send, see `dfkd.features`, and sends it with every version. A client that starts from a version
whose G was trained t > 0 times adds to the loss of each of its first steps

    a_t (b'/b) (1/b') sum_j CE(f(G(eps_j, y_j)), y_j)
    + b_t (1/b) sum_i KL(softmax(f(G(eps_i, y_i))) || softmax(f(x_i))),

with f the head under training, of x the whole model, y_j b' classes drawn uniformly, and (x_i, y_i)
the samples of the step; the left side of the divergence is not differentiated. a_t is
max(1e-4, alpha 0.98^t), and b_t likewise of beta. A client also sends how many samples of each
class it has trained on.

The step of the global model is another method's, by `fedgen_on`: FedAvg's rounds, as published, or
that of an asynchronous method. In a round all K clients of it teach G, before it is averaged. The
asynchronous form takes the K most recent uploads, whenever versions of K arrivals were made. A job
is regularised by the G of the version that it started from.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedrevive_jax.compute.streams import Stream, jax_key
from fedrevive_jax.config import Config
from fedrevive_jax.dfkd import features, losses, teachers
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.messages import ClientPart, Submission, Upload
from fedrevive_jax.methods import fadas, fedasync, fedavg, fedbuff
from fedrevive_jax.methods.method import Ingredients, Method
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import exactly

BASES = {
    "fedavg": fedavg.base,
    "fedbuff": fedbuff.base,
    "fedasync": fedasync.base,
    "fadas": fadas.base,
}
# The least that a weight decays to.
FLOOR = 1e-4


class FedGenState(NamedTuple):
    """State of the method.

    Attributes:
      base: that of the method whose step is taken.
      heads: the K most recent accepted uploads' (head, counts of classes), in the place of whole
        models.
      generator: G and its optimiser.
      fresh: int32 [], uploads since G was trained.
    """

    base: Any
    heads: teachers.Teachers
    generator: features.FeatureGeneratorState
    fresh: jax.Array


def create(config: Config, ingredients: Ingredients) -> Method:
    """FedGen on the step that the configuration names.

    Raises:
      ConfigError: the model has no head that is known.
    """
    model = ingredients.model
    if model.head is None:
        raise ConfigError(
            "method", config.method, f"needs a model whose `head` is known; {model.name} tells none"
        )
    base = BASES[config.fedgen_on](config).over(config.buffer_size)
    return with_generator(base, config, model)


def with_generator(base: Method, config: Config, model: Model) -> Method:
    """A method whose clients are regularised by a generator that its server trains.

    Args:
      base: takes the step; its own clients do nothing beside.
      config: the fields `fedgen_...`, and the sizes.
      model: has a head.
    """
    head, classes = model.head, model.num_classes
    assert head is not None
    train = features.make_trainer(model, config)
    samples = config.local_iterations * config.batch_size

    def init(params) -> FedGenState:
        own = head.params(params)
        key = jax_key(config.seed, Stream.GENERATOR_INIT)
        nothing = (own, jnp.zeros(classes))
        return FedGenState(
            base.init(params),
            teachers.init(nothing, (), config.concurrency),
            features.start(key, classes, head.width(own), config),
            jnp.zeros((), jnp.int32),
        )

    def step(state: FedGenState, entry, submission: Submission):
        upload, arrival, accepted = submission.upload, submission.arrival, submission.accepted
        params, own, entry, metrics = base.step(state.base, entry, submission)
        # No client has trained on more samples of a class than its job has.
        counts = jnp.clip(upload.extra, 0, samples)
        teaches = Upload((head.params(upload.params), counts), (), upload.loss)
        ring = teachers.insert(state.heads, teaches, arrival.client, accepted)
        fresh = state.fresh + accepted
        layers, seen = ring.params
        heads = features.Heads(layers, seen, ring.clients >= 0)
        due = (arrival.version + 1) % config.generator_interval == 0

        def trained():
            return train(state.generator, heads, head.params(submission.params), submission.key)

        nan = jnp.asarray(jnp.nan, jnp.float32)
        nothing = jax.tree.map(lambda _: nan, jax.eval_shape(trained)[1])
        wanted = arrival.completes & due & (fresh > 0)
        generator, told = jax.lax.cond(wanted, trained, lambda: (state.generator, nothing))
        state = FedGenState(own, ring, generator, jnp.where(wanted, 0, fresh))
        return params, state, entry, {**metrics, **told}

    return base._replace(
        init=init,
        step=step,
        extra=lambda state: state.generator.generator,
        client=client_part(config, model),
    )


def client_part(config: Config, model: Model) -> ClientPart:
    """What clients do, see the module; without a term where both weights are 0."""
    head, classes = model.head, model.num_classes
    assert head is not None
    make = exactly(features.make, model.platform)
    count = config.fedgen_batch

    def term(params, logits, labels, generator: features.FeatureGenerator, step, key):
        layer = head.params(params)
        like_key, class_key, noise_key = jax.random.split(key, 3)

        like = make(generator, features.noise(like_key, len(labels), config), labels)
        target = jax.lax.stop_gradient(head.apply(layer, like))
        divergence = losses.kl_divergence(target, logits).mean()

        drawn = jax.random.randint(class_key, (count,), 0, classes)
        made = make(generator, features.noise(noise_key, count, config), drawn)
        judged = head.apply(layer, made)
        entropy = optax.softmax_cross_entropy_with_integer_labels(judged, drawn).mean()

        alpha, beta = (
            features.decayed(weight, generator.trained, config, FLOOR)
            for weight in (config.fedgen_alpha, config.fedgen_beta)
        )
        # As many as the step has samples count like these.
        whole = count / len(labels) * alpha * entropy + beta * divergence
        return jnp.where((generator.trained > 0) & (step < config.fedgen_local_steps), whole, 0.0)

    def report(labels):
        return jax.nn.one_hot(labels, classes).sum(axis=(0, 1))

    idle = not (config.fedgen_alpha or config.fedgen_beta)
    return ClientPart(None if idle else term, report)
