"""Making samples that the teachers know, and learning to make them (the meta-step)."""

import functools
from collections.abc import Callable
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
from fedrevive_jax.dfkd.maker import Maker
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params, Taps, as_inputs

# Adam of the generator, its latents and the meta-step.
B1 = 0.5
# Label of a sample that no teacher judges; none is drawn with it.
UNKNOWN = -1
# Second derivatives of Adam's step are infinite where a gradient is exactly zero (a class that was
# not drawn). Only full MAML needs them, so only full MAML pays with a shift of the size of Adam's
# epsilon (its square root is 1e-8).
MAML_EPS_ROOT = 1e-16


class Draw(NamedTuple):
    """A fresh start: targets y int [b], and what the maker drew for them, see `maker.Maker`."""

    targets: jax.Array
    latents: Any
    condition: Any


class Variables(NamedTuple):
    """What the inner steps optimise: phi (a fast copy of omega) and the latents."""

    generator: Params
    latents: Any


class Ensemble(NamedTuple):
    """Who judges the samples.

    Attributes:
      params: the teachers' parameters, leaves [c, ...].
      taps: their feature statistics, leaves [c, channels].
      proxies: q, class mixes of their clients, [c, classes]; zero rows for absent teachers.
      student: the global parameters.
      adversarial_on: bool [], whether L_adv counts.
      frozen: the model's frozen arrays.
    """

    params: Params
    taps: Taps
    proxies: jax.Array
    student: Params
    adversarial_on: jax.Array
    frozen: Any = ()


class Judged(NamedTuple):
    """What the teachers say of samples.

    Where all judge every sample, n is b; where each judges its own, n is b / c.

    Attributes:
      logits: [c, n, classes].
      distances: of the features, [c].
      weights: of each answer, [c, n].
      targets: the classes asked for, int [n] or [c, n].
    """

    logits: jax.Array
    distances: jax.Array
    weights: jax.Array
    targets: jax.Array


class GeneratorState(NamedTuple):
    """The persistent generator: parameters omega and the state of the meta-step's Adam."""

    params: Params
    meta: Any


class Terms(NamedTuple):
    """Loss terms of one step, float32 [] (or [steps])."""

    feature: jax.Array
    one_hot: jax.Array
    adversarial: jax.Array
    total: jax.Array


class InnerResult(NamedTuple):
    """The inner steps' outcome.

    Attributes:
      variables: after the last step.
      gradient_sum: sum over steps of dL/dphi.
      terms: `Terms` with leaves [steps].
      samples: raw samples, leaves [b, ...], of the step with the lowest total loss.
      best_step: int32 [].
      agreement: float32 [], of these samples, see `losses.agreement`.
      guard: the loss guard afterwards.
      rejected: bool [steps, 3], where it rejected the feature, one-hot or adversarial term.
    """

    variables: Variables
    gradient_sum: Params
    terms: Terms
    samples: Any
    best_step: jax.Array
    agreement: jax.Array
    guard: LossGuard
    rejected: jax.Array


class SynthesisResult(NamedTuple):
    """Result of a synthesis.

    Attributes:
      generator: after the meta-step; as it was where the synthesis is not sound.
      guard: the loss guard afterwards.
      samples, labels: what was made, and for which classes.
      terms: loss terms of the step that made the samples.
      agreement: float32 [], the share of them that their judges recognise.
      sound: bool [], whether the samples and the new generator are finite, and any teacher has
        judged the samples; what was made is of no use otherwise.
      rejected: float32 [3], in which share of the steps the loss guard rejected the feature,
        one-hot and adversarial term.
    """

    generator: GeneratorState
    guard: LossGuard
    samples: Any
    labels: jax.Array
    terms: Terms
    agreement: jax.Array
    sound: jax.Array
    rejected: jax.Array


class Synthesiser(NamedTuple):
    """Pure functions of one synthesis; see `make_synthesiser`."""

    init: Callable[..., GeneratorState]
    draw: Callable[..., Draw]
    objective: Callable[..., tuple[jax.Array, Any]]
    inner: Callable[..., InnerResult]
    synthesise: Callable[..., SynthesisResult]


def keeps_no_judge(model: Model) -> bool:
    """Whether each judge's forward pass is done again on the way back, not kept.

    An accelerator writes what it keeps to its memory: for T5's nine networks more than a v5e has.
    A CPU has the memory, and fewer FLOPs.
    """
    return model.platform != "cpu"


def make_synthesiser(
    model: Model,
    maker: Maker,
    augment: Callable[[Any, jax.Array], Any],
    settings: Dfkd,
    mesh: Mesh | None = None,
) -> Synthesiser:
    """Builds the synthesis of arXiv 2511.00655: L = bn L_feat + oh L_ce + adv L_adv.

    Args:
      model: teachers and student.
      maker: what makes the samples, from what.
      augment: (raw samples, key) -> model inputs; differentiable.
      settings: `synthesis_batch` b, `synthesis_steps` K_synth, `generator_lr` lr_g, `latent_lr`
        lr_z, `feature_weight`, `one_hot_weight`, `adversarial_weight` bn, oh, adv, `loss_guard`,
        `judges`, and two choices. `meta` is the gradient given to the persistent Adam of omega:
        `reptile` omega - phi_K, `fomaml` sum_s dL/dphi at phi_s, `maml` d(sum_s L(phi_s))/d omega
        through the inner steps. `target_sampling` draws targets from the mean of the `teachers`'
        proxies, or `uniform` over the classes; where teachers judge their `own` samples, each has
        its share of them, drawn from its own proxy.
      mesh: the devices that share the teachers.
    """
    batch = settings.samples_made
    eps_root = MAML_EPS_ROOT if settings.meta == "maml" else 0.0
    fast_adam = optax.adam(settings.generator_lr, b1=B1, eps_root=eps_root)
    latent_adam = optax.adam(settings.latent_lr, b1=B1, eps_root=eps_root)
    # The prompts' published rate covers all inner steps at once.
    at_once = settings.synthesis_steps if model.vocabulary else 1
    meta_adam = optax.adam(settings.generator_lr * at_once, b1=B1)

    def init(params: Params) -> GeneratorState:
        return GeneratorState(params, meta_adam.init(params))

    def draw(key, proxies, present, frozen=()) -> Draw:
        """Targets, latents and condition of a fresh synthesis."""
        target_key, latent_key, condition_key = jax.random.split(key, 3)
        if settings.judges == "own":
            share = batch // len(proxies)
            known = jax.random.categorical(
                target_key, jnp.log(proxies)[:, None, :], shape=(len(proxies), share)
            )
            # Neither an absent teacher nor one whose client is not known yet has a class to judge.
            knows = proxies.sum(axis=1, keepdims=True) > 0
            targets = jnp.where(knows, known, UNKNOWN).reshape(-1)
        elif settings.target_sampling == "uniform":
            targets = jax.random.randint(target_key, (batch,), 0, model.num_classes)
        else:
            mix = proxies.sum(axis=0) / present.sum()
            targets = jax.random.categorical(target_key, jnp.log(mix), shape=(batch,))
        return Draw(targets, *maker.draw(latent_key, condition_key, targets, frozen))

    def objective(
        variables: Variables, drawn: Draw, ensemble: Ensemble, guard: LossGuard, key, number=0
    ):
        """L of an inner step -> (total, (Terms, raw samples, agreement, rejected terms bool [3],
        guard))."""
        chex.assert_shape(ensemble.proxies, (None, model.num_classes))
        judges = (ensemble.params, ensemble.taps)
        chex.assert_tree_shape_prefix(judges, ensemble.proxies.shape[:1])
        samples = maker.make(variables.generator, variables.latents, drawn.condition)
        inputs = augment(samples, key)
        logits, distances, weights, targets = judge(inputs, drawn, ensemble)
        student = jax.lax.stop_gradient(ensemble.student)
        student_logits = model.apply(student, as_inputs(inputs, ensemble.frozen))[0]
        if settings.judges == "own":
            student_logits = student_logits.reshape(logits.shape)
        feature = losses.feature_loss(weights, distances)
        one_hot = losses.one_hot_loss(weights, logits, targets)
        adversarial = losses.adversarial_loss(weights, logits, student_logits)
        agreement = losses.agreement(weights, logits, targets)

        check = functools.partial(loss_guard.check, settings=settings)
        feature_counts, guard = check(guard, "feature", number, feature)
        one_hot_counts, guard = check(guard, "one_hot", number, one_hot)
        adversarial_counts, checked = check(guard, "adversarial", number, adversarial)
        guard = trees.select(ensemble.adversarial_on, checked, guard)
        adversarial_applies = adversarial_counts & ensemble.adversarial_on
        total = (
            jnp.where(feature_counts, settings.feature_weight * feature, 0.0)
            + jnp.where(one_hot_counts, settings.one_hot_weight * one_hot, 0.0)
            + jnp.where(adversarial_applies, settings.adversarial_weight * adversarial, 0.0)
        )
        adversarial_rejected = ensemble.adversarial_on & ~adversarial_counts
        rejected = jnp.stack([~feature_counts, ~one_hot_counts, adversarial_rejected])
        terms = Terms(feature, one_hot, adversarial, total)
        return total, (terms, samples, agreement, rejected, guard)

    def judge(samples, drawn: Draw, ensemble: Ensemble) -> Judged:
        """What the teachers say of samples: all of them of each, or one of each."""
        # Gradients pass through the teachers to the samples, never into them.
        teachers = (jax.lax.stop_gradient(ensemble.params), ensemble.taps)
        count = len(ensemble.proxies)

        def judge_one(teacher, samples, frozen):
            params, reference = teacher
            logits, activations = model.apply(params, as_inputs(samples, frozen))
            return logits, maker.distance(activations, reference)

        if keeps_no_judge(model):
            judge_one = jax.checkpoint(judge_one)

        # One plain call per teacher, see `distillation.teacher_logits`.
        if settings.judges == "all":

            def in_turn(shared, teachers):
                return jax.lax.map(lambda teacher: judge_one(teacher, *shared), teachers)

            shared = (samples, ensemble.frozen)
            logits, distances = devices.split(mesh, in_turn)(shared, teachers)
            weights = losses.teacher_weights(ensemble.proxies, drawn.targets)
            return Judged(logits, distances, weights, drawn.targets)

        def own_in_turn(frozen, pairs):
            return jax.lax.map(lambda pair: judge_one(pair[0], pair[1], frozen), pairs)

        own = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), samples)
        logits, distances = devices.split(mesh, own_in_turn)(ensemble.frozen, (teachers, own))
        targets = drawn.targets.reshape(count, -1)
        known = targets != UNKNOWN
        weights = known / jnp.maximum(known.any(axis=1).sum(), 1)
        return Judged(logits, distances, weights, jnp.where(known, targets, 0))

    def inner(
        variables: Variables, drawn: Draw, ensemble: Ensemble, guard: LossGuard, key
    ) -> InnerResult:
        """K_synth steps of Adam with fresh states on phi and the latents."""

        def step(carry, number):
            variables, fast_state, latent_state, guard, gradient_sum, best = carry
            (total, (terms, samples, agreement, rejected, guard)), grads = jax.value_and_grad(
                objective, has_aux=True
            )(variables, drawn, ensemble, guard, jax.random.fold_in(key, number), number)
            # A broken term has a zero weight, but 0 * inf on the way back would still be NaN.
            grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
            fast_update, fast_state = fast_adam.update(grads.generator, fast_state)
            latent_update, latent_state = latent_adam.update(grads.latents, latent_state)
            new = Variables(
                optax.apply_updates(variables.generator, fast_update),
                optax.apply_updates(variables.latents, latent_update),
            )
            gradient_sum = jax.tree.map(jnp.add, gradient_sum, grads.generator)
            # A total that lacks a rejected term is no low total; without any better step the
            # last one is taken.
            cost = jnp.where(~rejected.any() & jnp.isfinite(total), total, jnp.inf)
            best = trees.select(cost <= best[0], (cost, number, agreement, samples), best)
            new = (new, fast_state, latent_state, guard, gradient_sum, best)
            return new, (terms, rejected)

        cost, (_, shapes, *_) = jax.eval_shape(objective, variables, drawn, ensemble, guard, key)
        best = (
            jnp.asarray(jnp.inf, cost.dtype),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.float32),
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        )
        carry = (
            variables,
            fast_adam.init(variables.generator),
            latent_adam.init(variables.latents),
            guard,
            jax.tree.map(jnp.zeros_like, variables.generator),
            best,
        )
        steps_taken = jnp.arange(settings.synthesis_steps, dtype=jnp.int32)
        carry, (terms, rejected) = jax.lax.scan(step, carry, steps_taken)
        variables, _, _, guard, gradient_sum, (_, best_step, agreement, samples) = carry
        return InnerResult(
            variables, gradient_sum, terms, samples, best_step, agreement, guard, rejected
        )

    def synthesise(
        state: GeneratorState, drawn: Draw, ensemble: Ensemble, guard: LossGuard, key
    ) -> SynthesisResult:
        """Inner steps from omega and fresh latents, then the meta-step on omega."""

        def run(omega):
            result = inner(Variables(omega, drawn.latents), drawn, ensemble, guard, key)
            return result.terms.total.sum(), result

        if settings.meta == "maml":
            gradient, result = jax.grad(run, has_aux=True)(state.params)
        else:
            _, result = run(state.params)
            gradient = result.gradient_sum
        if settings.meta == "reptile":
            gradient = jax.tree.map(jnp.subtract, state.params, result.variables.generator)
        update, meta_state = meta_adam.update(gradient, state.meta)
        new = GeneratorState(optax.apply_updates(state.params, update), meta_state)
        best = jax.tree.map(lambda term: term[result.best_step], result.terms)
        # A single broken term is the guard's business; without any, nothing was learned.
        terms = jnp.stack([best.feature, best.one_hot, best.adversarial])
        active = jnp.stack([True, True, ensemble.adversarial_on])
        judged = (jnp.isfinite(terms) & active).any() & (ensemble.proxies.sum() > 0)
        sound = judged & trees.all_finite((new, result.samples))
        # The generator keeps its last good state.
        new = trees.select(sound, new, state)
        rejected = result.rejected.mean(axis=0, dtype=jnp.float32)
        return SynthesisResult(
            new,
            result.guard,
            result.samples,
            drawn.targets,
            best,
            result.agreement,
            sound,
            rejected,
        )

    return Synthesiser(init, draw, objective, inner, synthesise)
