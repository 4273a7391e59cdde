"""The whole of DFKD at one arrival: observe, synthesise when due, distil when due."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fedrevive_jax.compute import rows, trees
from fedrevive_jax.compute.streams import Stream, jax_key, root_key
from fedrevive_jax.config import Config
from fedrevive_jax.dfkd import distillation, due, loss_guard, pool, proxy, synthesis, teachers
from fedrevive_jax.dfkd.generator import Generator, image_maker
from fedrevive_jax.dfkd.loss_guard import LossGuard
from fedrevive_jax.dfkd.maker import Maker
from fedrevive_jax.dfkd.prompts import SeedText, prompt_maker
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.messages import Arrival, Submission
from fedrevive_jax.models import Model, convolutions
from fedrevive_jax.models.model import (
    Embedded,
    Params,
    default_precision,
    exactly,
    halved,
    initial_taps,
)


class ReviverState(NamedTuple):
    """Everything that DFKD carries from arrival to arrival.

    Attributes:
      teachers: the c most recent uploads.
      proxies: class mixes of all clients.
      generator: omega and its meta-optimiser; None where nothing is synthesised.
      guard: recent loss values.
      pool: samples to distil on.
      frozen: the model's frozen arrays.
      synthesised_version: int32 [], the last version at which samples were made; -1 before.
      syntheses: int32 [], how often samples were made.
    """

    teachers: teachers.Teachers
    proxies: proxy.Proxies
    generator: synthesis.GeneratorState | None
    guard: LossGuard
    pool: pool.Pool
    frozen: Any
    synthesised_version: jax.Array
    syntheses: jax.Array


class Revival(NamedTuple):
    """What the reviver offers for one arrival.

    Attributes:
      delta: Delta^KD, zero where nothing was distilled.
      distilled: bool [], whether `delta` may be blended in.
      metrics: float32 [] by name; NaN where a part did not run. `TERM_rejected` is the share of
        its steps in which the loss guard rejected a term. `synthesis_skipped` and
        `distillation_skipped` are 1 where a part ran in vain, because it was not finite or the
        guard rejected every step of the distillation: then generator and pool, or the update, are
        as if it had not run.
    """

    delta: Params
    distilled: jax.Array
    metrics: dict[str, jax.Array]


class Reviver(NamedTuple):
    """Pure functions.

    Attributes:
      init: global params -> ReviverState.
      revive: (state, beta, submission) -> (state, Revival). Where `submission.accepted` is false
        the state stays as it is and nothing is distilled.
    """

    init: Callable[[Params], ReviverState]
    revive: Callable[[ReviverState, jax.Array, Submission], tuple[ReviverState, Revival]]


SYNTHESIS_METRICS = (
    "feature", "one_hot", "adversarial", "synthesis", "agreement", "synthesis_skipped",
    "feature_rejected", "one_hot_rejected", "adversarial_rejected",
)  # fmt: skip
DISTILLATION_METRICS = (
    "distillation", "distillation_skipped", "distillation_rejected",
    "distilled_norm", "distilled_cosine",
)  # fmt: skip

TINY = 1e-30  # no quotient is NaN


def create(
    config: Config,
    model: Model,
    augment: Callable[[Any, jax.Array], Any],
    *,
    frozen: Any = (),
    class_mixes: Any = None,
    real_samples: tuple[Any, Any] | None = None,
    seed_text: SeedText | None = None,
    mesh: Mesh | None = None,
) -> Reviver:
    """Builds the reviver of a configuration.

    Args:
      config: the DFKD fields, `seed` and `num_clients` are read.
      model: teachers and student.
      augment: (samples, key) -> augmented samples, see `feed.Feed`.
      frozen: the model's frozen arrays.
      class_mixes: true histograms [N, classes], for `proxy=histogram`.
      real_samples: (byte images or token ids, labels) that are the pool with `samples=real`.
      seed_text: labelled texts that synthesis of text starts from.
      mesh: the devices that share teachers and samples.
    """
    if config.samples == "generator":
        synthesiser, maker = make_synthesiser(config, model, augment, seed_text, mesh)

        def start() -> tuple[synthesis.GeneratorState | None, pool.Pool]:
            omega = maker.init(jax_key(config.seed, Stream.GENERATOR_INIT))
            room = pool.empty(config.pool_size, _shapes_of_samples(maker, config, frozen))
            return synthesiser.init(omega), room

    else:
        synthesiser = maker = None

        def start() -> tuple[synthesis.GeneratorState | None, pool.Pool]:
            held = _noise(config, model) if config.samples == "noise" else real_samples
            assert held is not None, "samples=real needs real samples"
            return None, pool.filled(*held)

    def init(params: Params) -> ReviverState:
        generator_state, samples = start()
        if config.proxy == "histogram":
            mixes = proxy.known(class_mixes)
        else:
            mixes = proxy.unknown(config.num_clients, model.num_classes)
        return ReviverState(
            teachers.init(params, initial_taps(model), config.num_teachers),
            mixes,
            generator_state,
            loss_guard.init(config),
            samples,
            frozen,
            jnp.asarray(-1, jnp.int32),
            jnp.asarray(0, jnp.int32),
        )

    # What passes through a branch is copied there, so that the branches return what they change
    # alone: a pool of texts may take gigabytes.

    def synthesise(
        synthesiser: synthesis.Synthesiser,
        state: ReviverState,
        proxies,
        present,
        params,
        arrival: Arrival,
        key,
    ):
        draw_key, augment_key = jax.random.split(key)
        ensemble = synthesis.Ensemble(
            state.teachers.params,
            state.teachers.taps,
            proxies,
            params,
            due.adversarial(config, arrival.version, state.syntheses),
            state.frozen,
        )
        result = synthesiser.synthesise(
            state.generator,
            synthesiser.draw(draw_key, proxies, present, state.frozen),
            ensemble,
            state.guard,
            augment_key,
        )
        feature, one_hot, adversarial = result.rejected
        # Before the warm-up there is no adversarial term to reject.
        adversarial = jnp.where(ensemble.adversarial_on, adversarial, jnp.nan)
        values = (*result.terms, result.agreement, ~result.sound, feature, one_hot, adversarial)
        values = tuple(jnp.asarray(value, jnp.float32) for value in values)
        made = rows.padded(result.samples), result.labels.astype(jnp.int32), result.sound
        return (result.generator, result.guard, arrival.version), made, values

    def distil(state: ReviverState, proxies, present, submission: Submission, key):
        params = submission.params
        steps, batch = config.distillation_steps, config.distillation_batch
        draw_key, augment_key = jax.random.split(key)
        chosen = pool.draw(state.pool, proxies, steps * batch, draw_key)
        flat = chosen.reshape(-1, steps, batch).swapaxes(0, 1).reshape(-1)
        samples = pool.take(state.pool, flat, _a_sample(config, model))
        samples = augment(samples, augment_key)
        shape = (steps, config.num_teachers, batch)
        samples = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), samples)
        targets = distillation.teacher_logits(
            model, state.teachers.params, samples, state.frozen, mesh
        )
        result = distillation.distil(
            model,
            params,
            samples,
            targets,
            present,
            state.guard,
            config,
            frozen=state.frozen,
            mesh=mesh,
        )
        good = trees.all_finite(result.delta) & (result.counted > 0)
        zero = jax.tree.map(jnp.zeros_like, params)
        norm = optax.tree.norm(result.delta)
        raw = submission.delta
        cosine = optax.tree.vdot(result.delta, raw) / jnp.maximum(norm * optax.tree.norm(raw), TINY)
        values = (
            result.losses.mean(), ~good, (steps - result.counted) / steps, norm, cosine
        )  # fmt: skip
        delta = trees.select(good, result.delta, zero)
        values = tuple(jnp.asarray(value, jnp.float32) for value in values)
        return result.guard, delta, good, values

    def revive(state: ReviverState, beta, submission: Submission):
        upload, arrival, params = submission.upload, submission.arrival, submission.params
        accepted = submission.accepted
        probe_key, synthesis_key, distillation_key = jax.random.split(submission.key, 3)
        # The arriving upload teaches first; its client's proxy is refined before it is used.
        state = state._replace(
            teachers=teachers.insert(state.teachers, upload, arrival.client, accepted),
            proxies=proxy.observe(
                state.proxies,
                model,
                upload.params,
                submission.base,
                arrival.client,
                probe_key,
                config,
                frozen=state.frozen,
                wanted=accepted,
            ),
        )
        proxies = proxy.of_clients(state.proxies, state.teachers.clients)
        present = state.teachers.clients >= 0
        nan = jnp.asarray(jnp.nan, jnp.float32)

        terms = (nan,) * len(SYNTHESIS_METRICS)
        if synthesiser is not None and maker is not None:
            synthesise_with = functools.partial(synthesise, synthesiser)
            wanted = accepted & due.synthesis(config, arrival.version, state.synthesised_version)
            own = state.generator, state.guard, state.synthesised_version
            made = pool.empty(config.samples_made, _shapes_of_samples(maker, config, state.frozen))
            nothing = made.samples, made.labels, jnp.asarray(False)
            # The scopes' names tell in a compiled program what costs what.
            with jax.named_scope("synthesis"):
                (generator, guard, version), made, terms = jax.lax.cond(
                    wanted,
                    lambda: synthesise_with(
                        state, proxies, present, params, arrival, synthesis_key
                    ),
                    lambda: (own, nothing, terms),
                )
            state = state._replace(
                generator=generator,
                guard=guard,
                synthesised_version=version,
                syntheses=state.syntheses + wanted,
                pool=pool.add(state.pool, *made),
            )

        ready = due.distillation(config, synthesiser is not None, arrival.version, beta)
        none = jax.tree.map(jnp.zeros_like, params)
        with jax.named_scope("distillation"):
            guard, delta, distilled, values = jax.lax.cond(
                accepted & ready & (state.pool.added > 0),
                lambda: distil(state, proxies, present, submission, distillation_key),
                lambda: (state.guard, none, jnp.asarray(False), (nan,) * len(DISTILLATION_METRICS)),
            )
        state = state._replace(guard=guard)
        names: tuple[str, ...] = SYNTHESIS_METRICS + DISTILLATION_METRICS
        metrics: dict[str, Any] = dict(zip(names, (*terms, *values), strict=True))
        return state, Revival(delta, distilled, metrics)

    return Reviver(init, revive)


def make_synthesiser(
    config: Config,
    model: Model,
    augment: Callable[[Any, jax.Array], Any],
    seed_text: SeedText | None = None,
    mesh: Mesh | None = None,
) -> tuple[synthesis.Synthesiser, Maker]:
    """The synthesis of a configuration, and what it optimises; arguments as those of `create`."""
    maker = make_maker(config, model, seed_text)
    return synthesis.make_synthesiser(model, maker, augment, config, mesh), maker


def make_maker(config: Config, model: Model, seed_text: SeedText | None = None) -> Maker:
    """What makes the samples of a configuration.

    Raises:
      ConfigError: the generator cannot make images of this size.
    """
    if model.vocabulary is not None:
        return prompt_maker(model.vocabulary, model.input_shape[0], seed_text)
    height, width, channels = model.input_shape
    if height % 4 or width % 4:
        raise ConfigError(
            "method",
            config.method,
            f"the generator makes images whose sides are multiples of 4; "
            f"these are {height}x{width}",
        )
    way = convolutions.settled(config.convolution, model.platform)
    generator = Generator((height, width, channels), config.generator_features, way)
    maker = image_maker(generator, config.latent_size, model.num_classes)
    precision = config.precision
    if precision == "auto":
        precision = default_precision(model.platform)
    if precision == "float32":
        return maker._replace(make=exactly(maker.make, model.platform))

    def make(params, latents, condition):
        return maker.make(halved(params), halved(latents), condition).astype(jnp.float32)

    return maker._replace(make=make)


def _a_sample(config: Config, model: Model) -> Any:
    """Shapes of one sample of the pool."""

    def one(*shape) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    if model.vocabulary is None or not config.synthesises:
        return one(*model.input_shape)
    return Embedded(one(*model.input_shape, model.vocabulary.width), one(*model.input_shape))


def _noise(config: Config, model: Model) -> tuple[jax.Array, jax.Array]:
    """Uniform noise in the form of real samples, byte images or token ids, and uniform labels."""
    key = jax_key(config.seed, Stream.GENERATOR_INIT)
    shape = (config.pool_size, *model.input_shape)
    if model.vocabulary is None:
        samples = jax.random.bits(key, shape, jnp.uint8)
    else:
        samples = jax.random.randint(key, shape, 0, model.vocabulary.size)
    return samples, jnp.arange(config.pool_size) % model.num_classes


def _shapes_of_samples(maker: Maker, config: Config, frozen: Any) -> Any:
    """Shapes of one synthesis's samples."""

    def make():
        key, targets = root_key(), jnp.zeros(config.samples_made, jnp.int32)
        return maker.make(maker.init(key), *maker.draw(key, key, targets, frozen))

    return jax.eval_shape(make)
