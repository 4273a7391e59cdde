"""The stages of one FedRevive arrival, each timed alone, and whole arrivals of a simulation."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarking import measuring
from experiments.benchmarking.measuring import Timing
from fedrevive_jax import data, models
from fedrevive_jax.clock import schedule
from fedrevive_jax.compute import devices
from fedrevive_jax.config import Config
from fedrevive_jax.data.dataset import official_splits
from fedrevive_jax.dfkd import distillation, due, loss_guard, reviver, synthesis
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import initial_taps
from fedrevive_jax.presets import resolve
from fedrevive_jax.running.runner import settle
from fedrevive_jax.simulation import planning, sizing
from fedrevive_jax.simulation.simulator import Simulation

# What is measured under each name: the data set whose preset it takes.
WORKLOADS = {
    "resnet18": "cifar10",
    "convnet": "femnist",
    "digits": "digits",
    "fashion_mnist": "fashion_mnist",
    "t5": "newsgroups",
}
# A population that is small enough to start at once, and DFKD at every arrival but the first. None
# of this changes the work of one arrival.
STEADY = {
    "partition": "dirichlet",
    "freeze_versions": 0,
    "warmup_versions": 0,
    "beta_shape": "constant",
    "beta_constant": 0.5,
    "max_versions": 10_000,
    "max_time": 1e6,
}
SAMPLES = 2000


@dataclass(frozen=True)
class Stage:
    """One part of an arrival.

    Attributes:
      timing: seconds of one call.
      flops: of one call, counted from the model's forward pass as XLA counts it.
      times: calls for one arrival.
    """

    timing: Timing
    flops: float
    times: float = 1.0


@dataclass(frozen=True)
class Measured:
    """What a benchmark of one model found.

    Attributes:
      config: what was measured.
      stages: by name.
      arrival: seconds of a whole arrival, synthesis by its share and client training with its
        padding.
      padding: jobs that the calls of the preset's plan train for each job that is needed.
      window_ratio: how many times as fast clients are trained in such calls as one in a call.
      host: seconds of the main thread's own work at an arrival, the planning of its window by its
        share.
      schedule_rate: arrivals the clock plans in a second, over the preset's whole time.
      compile_seconds, compilations: while warming up.
      recompilations: programs compiled after that.
      peak_bytes: see `measuring.peak_bytes`.
      live_bytes: the most that arrays took between two calls.
      planned_bytes: the plan's word on that.
      live_versions: the most versions that were kept.
      jobs_in_a_call: of client training, of all devices together.
    """

    config: Config
    stages: dict[str, Stage]
    arrival: Timing
    padding: float
    window_ratio: float
    host: float
    schedule_rate: float
    compile_seconds: float
    compilations: int
    recompilations: int
    peak_bytes: int
    live_bytes: int
    planned_bytes: int
    live_versions: int
    jobs_in_a_call: int

    @property
    def flops(self) -> float:
        """Of one arrival."""
        return sum(stage.flops * stage.times for stage in self.stages.values())


def workload(name: str, **changes: Any) -> tuple[Config, data.Dataset]:
    """The configuration and random data of the preset's shapes.

    Args:
      name: a key of `WORKLOADS`.
      **changes: fields of `Config`, and of the preset; FedRevive is the published one.
    """
    own = {"preset_revival": "published", **STEADY, **_population(), **changes}
    config = settle(resolve(WORKLOADS[name], "fedrevive", **own))
    spec = data.spec(config)
    rng = np.random.default_rng(config.seed)
    count = 2 * SAMPLES
    if len(spec.input_shape) == 1:
        samples = rng.integers(1, config.vocabulary_size, (count, *spec.input_shape), np.int32)
    else:
        samples = rng.integers(0, 256, (count, *spec.input_shape), np.uint8)
    labels = rng.integers(0, spec.num_classes, count).astype(np.int32)
    dataset = data.Dataset(
        f"random {config.dataset}",
        spec.num_classes,
        samples,
        labels,
        official_splits(SAMPLES, SAMPLES, config.seed),
        data.preprocessing(config),
    )
    return config, dataset


def model_that_counts(config: Config, input_shape: tuple[int, ...], num_classes: int) -> Model:
    """The model in the form in which its FLOPs are counted, whatever way it is computed."""
    plain = dataclasses.replace(config, convolution="lax")
    return models.create(plain, input_shape, num_classes)


def _population() -> dict[str, int]:
    # Jobs in flight: on an accelerator enough to fill a usual window.
    concurrency = 8 if jax.default_backend() == "cpu" else 100
    return {"num_clients": 2 * concurrency, "concurrency": concurrency}


def measure(
    config: Config, dataset: data.Dataset, *, repeats: int, arrivals: int, say: Callable
) -> Measured:
    """Runs a simulation past its start, then times whole arrivals and the stages.

    Args:
      config, dataset: see `workload`.
      repeats: calls of each stage.
      arrivals: whole arrivals that are timed; synthesis is due at every T_gen-th of them.
      say: called with a line about what comes next.
    """
    interval = config.generation_interval
    if interval < 2:
        raise ConfigError(
            "generation_interval",
            interval,
            "must be at least 2, so that a server step can be timed with and without synthesis",
        )
    made = schedule.create(config).num_versions
    needed = interval + 2 + 2 * arrivals + config.concurrency
    if made < needed:
        raise ConfigError(
            "max_versions",
            config.max_versions,
            f"the plan makes {made} versions; at least {needed} are needed here",
        )
    say("planning the preset's whole schedule")
    plan_seconds, plan = _time_schedule(config)
    say("compiling, first arrivals")
    with measuring.compilations() as warm_up:
        simulation = Simulation(config, dataset)
        # Everything has run once when a version has been distilled and another synthesised.
        while simulation.server.version < interval + due.warm_version(config, True) + 1:
            jax.block_until_ready(simulation.advance().metrics)
    say(f"{arrivals} arrivals")
    with measuring.compilations() as steady:
        whole = _Arrivals(simulation, arrivals)
    peak = measuring.peak_bytes()
    say("stages")
    stages = _stages(simulation, whole, repeats)
    size, window_ratio = simulation.jobs_in_a_call, 1.0
    if size > 1:
        say("one job in a call")
        single = Simulation(dataclasses.replace(config, client_batch=1), dataset)
        first = np.arange(min(size, single.schedule.initial_jobs))  # all from version 0
        under_way = _jobs(simulation)
        alone, together = measuring.time_in_turn(
            [lambda: single.train_jobs(first), lambda: simulation.train_jobs(under_way)], repeats
        )
        window_ratio = (alone.median / len(first)) / (together.median / len(under_way))
    told = planning.plan(config, dataset, simulation.model)
    padding = len(sizing.plan_calls(config, plan, size)) * size / plan.num_arrivals
    shares = {
        "client training": padding,
        "server step": 1.0,
        "synthesis": due.syntheses_per_arrival(config, config.buffer_size),
    }
    arrival = Timing(
        sum(share * stages[name].timing.median for name, share in shares.items()),
        sum(share * stages[name].timing.spread for name, share in shares.items()),
    )
    return Measured(
        config=config,
        stages=stages,
        arrival=arrival,
        padding=padding,
        window_ratio=window_ratio,
        host=whole.host,
        schedule_rate=plan.num_arrivals / plan_seconds,
        compile_seconds=warm_up.seconds,
        compilations=warm_up.count,
        recompilations=steady.count,
        peak_bytes=peak,
        live_bytes=whole.live_bytes,
        planned_bytes=told["bytes_device"],
        live_versions=whole.live_versions,
        jobs_in_a_call=size,
    )


class _Arrivals:
    """Whole arrivals in turn; each waits for its device work, so that it can be timed alone.

    Attributes:
      step: seconds of a server step without synthesis.
      host: seconds that the main thread itself was busy with an arrival, the mean; of a window
        with each of its jobs by its share.
      live_bytes, live_versions: the most between two calls.
    """

    def __init__(self, simulation: Simulation, count: int):
        steps, host, jobs, windows = [], [], 0, 0.0
        self.live_bytes = self.live_versions = 0
        while len(steps) < count or not jobs:
            before, since = len(simulation.uploads), time.thread_time()
            simulation.train_ahead()
            windows += time.thread_time() - since
            jobs += len(simulation.uploads) - before
            jax.block_until_ready(simulation.uploads)
            self.live_bytes = max(self.live_bytes, measuring.live_bytes())
            synthesises = due.synthesis(simulation.config, simulation.server.version)
            start, since = time.perf_counter(), time.thread_time()
            receipt = simulation.advance()
            host.append(time.thread_time() - since)
            jax.block_until_ready((receipt.metrics, simulation.server.params))
            if not synthesises:
                steps.append(time.perf_counter() - start)
            self.live_versions = max(self.live_versions, len(simulation.server.live_versions))
        self.step, self.host = Timing.of(steps), float(np.mean(host)) + windows / jobs


def _time_schedule(config: Config) -> tuple[float, schedule.Schedule]:
    """Seconds of planning the preset's own population and time, and that plan."""
    preset = resolve(config.dataset, config.method, seed=config.seed)
    start = time.perf_counter()
    planned = schedule.create(preset)
    return time.perf_counter() - start, planned


def _jobs(simulation: Simulation) -> np.ndarray:
    """A call of jobs that are handed out, so that the versions they start from exist."""
    simulation.train_ahead()
    return np.resize(sorted(simulation.uploads), simulation.jobs_in_a_call)


def _stages(simulation: Simulation, whole: _Arrivals, repeats: int) -> dict[str, Stage]:
    config, model = simulation.config, simulation.model
    counted = model_that_counts(config, model.input_shape, model.num_classes)
    arithmetic = planning.flops_of_an_arrival(
        config, planning.forward_flops(counted), planning.making_flops(config, counted)
    )
    params = simulation.server.params
    frozen, augment, mesh = simulation.frozen, simulation.feed.augment, simulation.mesh
    keys = (jax.random.fold_in(jax.random.key(config.seed), n) for n in itertools.count())

    # Teachers that differ: the global model with a little noise.
    def noisy(leaf):
        shape = (config.num_teachers, *leaf.shape)
        return leaf[None] + 1e-3 * jax.random.normal(next(keys), shape, leaf.dtype)

    ring = jax.tree.map(noisy, params)
    taps = jax.tree.map(
        lambda leaf: jnp.repeat(leaf[None], config.num_teachers, axis=0), initial_taps(model)
    )
    mixes = jnp.full((config.num_teachers, model.num_classes), 1 / model.num_classes)
    present = jnp.ones(config.num_teachers, bool)
    guard = loss_guard.init(config)

    synthesiser, maker = reviver.make_synthesiser(config, model, augment, mesh=mesh)
    generator = synthesiser.init(maker.init(next(keys)))
    drawn = synthesiser.draw(next(keys), mixes, present, frozen)
    ensemble = synthesis.Ensemble(ring, taps, mixes, params, jnp.asarray(True), frozen)
    synthesise = devices.jit(mesh, synthesiser.synthesise)

    made = devices.jit(mesh, maker.make)(generator.params, drawn.latents, drawn.condition)
    per_step = config.num_teachers * config.distillation_batch
    shape = (config.distillation_steps, config.num_teachers, config.distillation_batch)
    places = jnp.arange(config.distillation_steps * per_step) % config.samples_made
    samples = devices.jit(
        mesh,
        lambda made, key: jax.tree.map(
            lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]),
            augment(jax.tree.map(lambda leaf: leaf[places], made), key),
        ),
    )(made, next(keys))
    judge = devices.jit(
        mesh, lambda ring, samples: distillation.teacher_logits(model, ring, samples, frozen, mesh)
    )
    targets = judge(ring, samples)
    distil = devices.jit(
        mesh,
        lambda params, samples, targets: distillation.distil(
            model,
            params,
            samples,
            targets,
            present,
            guard,
            config,
            frozen=frozen,
            mesh=mesh,
        ),
    )
    jobs = _jobs(simulation)

    def timed(call, flops, times=1.0, share=1):
        timing = measuring.time_calls(call, repeats)
        return Stage(Timing(timing.median / share, timing.spread / share), flops, times)

    judged = arithmetic["distillation"] / 4
    return {
        "client training": timed(
            lambda: simulation.train_jobs(jobs), arithmetic["client"], share=len(jobs)
        ),
        "teacher forward": timed(lambda: judge(ring, samples), judged),
        "student distillation": timed(lambda: distil(params, samples, targets), 3 * judged),
        "synthesis": timed(
            lambda: synthesise(generator, drawn, ensemble, guard, jax.random.key(0)),
            arithmetic["synthesis"],
            due.syntheses_per_arrival(config, config.buffer_size),
        ),
        # All of the step but synthesis; teacher and student are a part of it.
        "server step": Stage(whole.step, 0.0, 0.0),
    }
