"""What a run will be and cost, told from its configuration alone: no data, no training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax import data, methods, models
from fedrevive_jax.clock import schedule
from fedrevive_jax.clock.windows import plan_windows
from fedrevive_jax.compute import environment, trees
from fedrevive_jax.compute.streams import root_key
from fedrevive_jax.config import Config
from fedrevive_jax.dfkd import due, reviver
from fedrevive_jax.methods import Ingredients, blending
from fedrevive_jax.models import Model, judging
from fedrevive_jax.models.model import gaussian_inputs
from fedrevive_jax.simulation import sizing


def plan(
    config: Config, dataset: data.Dataset | None = None, model: Model | None = None
) -> dict[str, Any]:
    """The plan as plain numbers: the schedule, sizes in bytes, arithmetic in FLOPs.

    FLOPs are those that XLA counts for one sample's forward pass, a training step taken as three
    of them. Bytes are those of the arrays that live between calls, at their most: on the device the
    versions, the uploads under way, the method's state, frozen arrays and the data set; on the host
    the data set and the schedule; the updates of all clients, for a method that keeps them, on the
    device, the host or the disk. Of a data set that is not read, the training samples are counted.
    `bytes_job` and `bytes_server_step` are estimates of what comes on top during a call: of one job
    under training, and of a step that makes samples and distils. What XLA reserves differs, see
    `memory`.
    A data set or a model stands in for the one that the configuration names.
    """
    environment.check()
    clock = schedule.create(config)
    windows = plan_windows(clock, config.window_limit)
    sizes = _sizes(config, dataset, model)
    params, shared, entry = sizes.params, sizes.frozen, sizes.entry
    live = clock.live_versions_max()
    computing = models.with_precision(sizes.model, config.precision)
    model_bytes = trees.nbytes(params)
    forward = forward_flops(sizes.model)
    data_bytes = _blank_samples(sizes.stored, sizes.model.input_shape).nbytes
    state_bytes = trees.nbytes(sizes.method_state)
    cache_bytes = config.num_clients * trees.nbytes(entry)
    cached = {memory: 0 for memory in ("device", "host", "disk")}
    cached[config.cache_memory] = cache_bytes
    # What waits, stale versions and uploads; with `auto` on the device, as long as it has room.
    waiting = {"device": 0, "host": 0}
    place = "host" if config.version_memory == "host" else "device"
    version_bytes = trees.nbytes((params, sizes.extra))
    waiting[place] = live * version_bytes + config.concurrency * model_bytes
    device_bytes = (
        data_bytes + trees.nbytes(shared) + state_bytes + cached["device"] + waiting["device"]
    )
    return {
        "versions": clock.num_versions,
        "arrivals": clock.num_arrivals,
        "windows": len(windows),
        "mean_window": clock.num_arrivals / max(len(windows), 1),
        **schedule.staleness_summary(clock.staleness),
        "live_versions_max": live,
        "parameters": models.parameter_count(params),
        "parameters_frozen": models.parameter_count(shared),
        "flops_forward_per_sample": forward,
        **_flops(config, clock, forward, making_flops(config, sizes.model)),
        "bytes_model": model_bytes,
        "bytes_live_versions": live * version_bytes,
        "bytes_uploads_max": config.concurrency * model_bytes,
        "bytes_method_state": state_bytes,
        "bytes_client_cache": cache_bytes,
        "bytes_device": device_bytes,
        "bytes_job": sizing.job_bytes(computing, params, config.batch_size),
        "bytes_server_step": sizing.revival_bytes(config, computing, params),
        "bytes_host": data_bytes + clock.nbytes + cached["host"] + waiting["host"],
        "bytes_disk": cached["disk"],
    }


def cache_bytes(config: Config) -> int:
    """Bytes of what the method keeps of all clients; 0 where it keeps nothing of them."""
    return config.num_clients * trees.nbytes(_sizes(config).entry)


class _Sizes(NamedTuple):
    """The model, how many samples are stored, and the shapes of what lives beside them; of `extra`
    one for each version."""

    model: Model
    stored: int
    params: Any
    frozen: Any
    method_state: Any
    entry: Any
    extra: Any


def _sizes(
    config: Config, dataset: data.Dataset | None = None, model: Model | None = None
) -> _Sizes:
    if dataset is not None:
        judging.check_kind(dataset)
        shape, classes, stored = dataset.input_shape, dataset.num_classes, len(dataset.labels)
        kept = len(dataset.splits["distillation"])
    else:
        known = data.spec(config)
        shape, classes, stored = known.input_shape, known.num_classes, known.training_samples
        kept = data.split_sizes(known.training_samples)["distillation"]
    if model is None:
        # Counting is the same whatever way a convolution is computed; lax's form is counted.
        plain = dataclasses.replace(config, convolution="lax")
        model = models.create(plain, shape, classes)
    else:
        judging.check_given(config, model)
        judging.check_shapes(model, shape, classes)
    params, shared = jax.eval_shape(lambda k: (model.init(k), model.frozen(k)), root_key())

    holdings = Ingredients(
        model,
        lambda samples, key: samples,
        frozen=shared,
        class_mixes=np.zeros((config.num_clients, classes), np.float32),
        real_samples=(_blank_samples(kept, shape), np.zeros(kept, np.int32)),
    )
    return _Sizes(model, stored, params, shared, *methods.shapes(config, holdings, params))


def _blank_samples(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Byte images or token ids, as a data set stores them."""
    return np.zeros((count, *shape), np.int32 if len(shape) == 1 else np.uint8)


def forward_flops(model: Model) -> int:
    """FLOPs of the forward pass of one sample, as XLA counts them."""
    params = jax.eval_shape(model.init, root_key())
    inputs = jax.eval_shape(
        lambda key: gaussian_inputs(model, key, 1, model.frozen(key)), root_key()
    )
    return _flops_of(lambda p, x: model.apply(p, x)[0], params, inputs)


def making_flops(config: Config, model: Model) -> int:
    """FLOPs of making one sample of a synthesis, as XLA counts them: the generator's forward pass
    over a whole batch, divided. 0 for methods that make none."""
    if not config.synthesises:
        return 0
    plain = dataclasses.replace(config, convolution="lax")
    maker = reviver.make_maker(plain, model)

    def start(key):
        targets = jnp.zeros(config.samples_made, jnp.int32)
        return maker.init(key), *maker.draw(key, key, targets, model.frozen(key))

    shapes = jax.eval_shape(start, root_key())
    return _flops_of(maker.make, *shapes) // config.samples_made


def _flops_of(function: Callable, *shapes: Any) -> int:
    """FLOPs of a call as XLA counts them; 0 where it counts none."""
    analysis = jax.jit(function).lower(*shapes).cost_analysis() or {}
    return int(analysis.get("flops", 0))


def flops_of_an_arrival(config: Config, forward: int, making: int) -> dict[str, int]:
    """FLOPs of a client's job, and of a distillation and a synthesis of FedRevive.

    Args:
      config: the sizes.
      forward: FLOPs of one sample's forward pass.
      making: FLOPs of making one sample.
    """
    samples = config.distillation_steps * config.distillation_batch * config.num_teachers
    made = config.samples_made * config.synthesis_steps
    return {
        "client": 3 * forward * config.local_iterations * config.batch_size,
        # A teacher's forward pass, a student's training step.
        "distillation": samples * 4 * forward,
        # Each judge and the student: forward, and back to the samples; a training step of what
        # makes the samples.
        "synthesis": made * (2 * forward * (config.judges_of_a_sample + 1) + 3 * making),
    }


def revivals(config: Config, clock: schedule.Schedule) -> dict[str, int]:
    """How many distillations and syntheses a schedule leads to, if no upload is rejected."""
    if not config.traits.distils:
        return {}
    versions = clock.base_version[clock.job] + clock.staleness  # at the arrivals
    beta = np.asarray(blending.create(config)(jnp.asarray(clock.staleness)))
    synthesises = config.synthesises
    counts = {"distillations": due.distillation(config, synthesises, versions, beta).sum()}
    if synthesises:
        counts["syntheses"] = due.synthesis(config, np.unique(versions)).sum()
    return {name: int(count) for name, count in counts.items()}


def _flops(config: Config, clock: schedule.Schedule, forward: int, making: int) -> dict[str, int]:
    parts = flops_of_an_arrival(config, forward, making)
    counts = revivals(config, clock)
    told = {"flops_client_job": parts["client"]}
    total = parts["client"] * clock.num_arrivals
    if counts:
        synthesis = parts["synthesis"] if "syntheses" in counts else 0
        told |= {"flops_distillation": parts["distillation"], "flops_synthesis": synthesis}
        total += parts["distillation"] * counts["distillations"]
        total += synthesis * counts.get("syntheses", 0)
    return {**told, "flops_total": total}
