"""Where stale versions and uploads wait, and how many jobs fit on a device at once.

What a call needs beside the arrays that live between calls is estimated from what its way back
keeps of every sample. XLA fuses and reuses: at the paper's sizes it reserves less, on a CPU with
its own convolutions 15% (ConvNet), 29% (ResNet-18) and 48% (T5) for a server step of FedRevive, and
5%, 7% and 16% for a job.
"""

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrevive_jax import methods
from fedrevive_jax.clock.schedule import Schedule
from fedrevive_jax.clock.windows import Window, plan_windows
from fedrevive_jax.compute import tiles, trees
from fedrevive_jax.compute.streams import root_key
from fedrevive_jax.config import Config
from fedrevive_jax.dfkd import reviver, synthesis
from fedrevive_jax.methods import Ingredients
from fedrevive_jax.models import Model
from fedrevive_jax.models.model import Params, gaussian_inputs, per_call

# Copies of the parameters that a job under training needs: its start, itself, the gradient, the two
# moments of Adam, and the upload. On a TPU the start is an argument of the call, and each part of
# the gradient is used where it is made.
COPIES, COPIES_ON_TPU = 6, 4
# More jobs in one call have not been measured to be faster.
JOBS_IN_A_CALL = 32
# What a call takes beside its jobs, in jobs: an accelerator starts the same kernels for any number
# of them. An estimate, not a measurement.
CALL_COST = 2
# Arrivals by which the size of a call is chosen: of longer plans the rest is like them.
SIZED_BY = 4096


def job_bytes(model: Model, params: Any, batch_size: int) -> int:
    """Device memory of one job under training: copies of the parameters, and what a training step
    keeps for its way back.

    Args:
      model: the model.
      params: its parameters, or their shapes.
      batch_size: samples of a step.
    """
    copies = COPIES_ON_TPU if model.platform == "tpu" else COPIES
    return copies * tiles.nbytes(params, model.platform) + _kept_bytes(model, params, batch_size)


def training_bytes(upload: int, job: int, jobs: int, fast: int, devices: int = 1) -> int:
    """Device memory of a call of client training beside its arguments.

    Args:
      upload: bytes of an upload.
      job: bytes of one job under training.
      jobs: that one device trains in the call.
      fast: see `chips.Chip`; what fits there needs no other, but for the uploads.
      devices: that share the call; each holds the uploads of all of them at its end.
    """
    uploads = jobs * upload
    gathered = devices * uploads if devices > 1 else 0
    return max(jobs * job - fast, uploads) + gathered


def revival_bytes(config: Config, model: Model, params: Any) -> int:
    """Device memory of a server step that makes samples and distils, beside the arrays that live
    between calls: the larger of what a step of synthesis keeps for its way back through every
    teacher, the student and what makes the samples, and of what a step of the student needs. 0 for
    other methods.

    Args:
      config: the sizes.
      model, params: see `job_bytes`.
    """
    if not config.traits.distils:
        return 0
    size = config.teacher_batch or per_call(
        config.num_teachers, config.distillation_batch, model.input_shape, model.platform
    )
    student = job_bytes(model, params, size * config.distillation_batch)
    if not config.synthesises:
        return student
    # And the student. Of judges that are not kept one at a time does its forward pass again.
    judges = 1 if synthesis.keeps_no_judge(model) else config.judges_of_a_sample
    networks = (judges + 1) * _kept_bytes(model, params, config.samples_made)
    return max(student, networks + _making_bytes(config, model))


def _kept_bytes(model: Model, params: Any, samples: int) -> int:
    """Bytes that the forward pass of so many samples keeps for the way back."""

    def forward(batch_size, params):
        key = root_key()
        inputs = gaussian_inputs(model, key, batch_size, model.frozen(key))
        return jax.vjp(lambda p: model.apply(p, inputs)[0].sum(), params)[1]

    return _grown(model.platform, samples, forward, params)


def _making_bytes(config: Config, model: Model) -> int:
    """Bytes that making the samples of a synthesis keeps for the way back."""
    maker = reviver.make_maker(config, model)

    def make(batch_size, params):
        key, targets = root_key(), jnp.zeros(batch_size, jnp.int32)
        drawn = maker.draw(key, key, targets, model.frozen(key))
        return jax.vjp(lambda p: maker.make(p, *drawn), params)[1]

    of_maker = jax.eval_shape(maker.init, root_key())
    return _grown(model.platform, config.samples_made, make, of_maker)


def _grown(platform: str, samples: int, function: Callable, *given: Any) -> int:
    """By how many bytes a result grows with so many samples: (batch size, *given) -> pytree. What
    does not grow, such as parameters, is no working memory of its own."""

    def shapes(batch_size: int) -> Any:
        return jax.eval_shape(partial(function, batch_size), *given)

    one, two = (trees.nbytes(shapes(batch_size)) for batch_size in (1, 2))
    if platform != "tpu":
        return samples * (two - one)
    # Tiles are padded by the whole batch, and other batches are laid out in other ways. What the
    # padding of parameters adds is counted with it.
    return max(tiles.nbytes(shapes(samples), platform) - (2 * one - two), 0)


def choose_place(config: Config, working: int, used: int, memory: int | None) -> str:
    """Where versions wait, `device` or `host`; `auto` is the device while it has room.

    Args:
      config: names the place.
      working: bytes that a job under training or a server step needs.
      used: bytes that arrays take between calls if all of them live on the device.
      memory: bytes of a device that may be planned for; None is enough for everything.
    """
    if config.version_memory != "auto":
        return config.version_memory
    return "device" if memory is None or used + working <= memory else "host"


def default_client_batch(
    model: Model, config: Config, job: int, used: int, memory: int | None, fast: int = 0
) -> int:
    """Jobs trained in one call of a device where the configuration leaves it open.

    On a CPU one job of texts or large images already fills the cores and the caches; of small
    images two are a tenth faster. An accelerator takes as many as fit beside what lives there.

    Of a chip with fast memory it takes those that this holds, and two at least, since a job alone
    is computed in slower ways. On a v5e a step of CIFAR-10 takes 2.5 million cycles alone, 1.8 for
    each of two jobs, 2.1 for each of twelve; FEMNIST's 0.38 alone, 0.23 for each of six and of
    eight, 0.24 for each of thirteen. On a v6e CIFAR-10's takes 0.81 of two, 0.93 of eight. On a v5p
    eight are faster than two, 1.02 and 1.22.

    Args:
      model: the model.
      config: tells the batch size.
      job: bytes of one job under training.
      used: bytes that arrays take between calls.
      memory: see `choose_place`.
      fast: see `chips.Chip`.
    """
    if model.platform == "cpu":
        if model.vocabulary is not None:
            return 1
        return per_call(2, config.batch_size, model.input_shape, model.platform)
    free = (memory or 0) - used
    most = min(max(free // max(job, 1), 1), JOBS_IN_A_CALL)
    return min(most, max(fast // max(job, 1), 2)) if fast else most


def jobs_in_a_call(plan: Schedule, limit: int, devices: int = 1) -> int:
    """Jobs that all devices together train in one call, such that the calls of a plan, those that
    are not full padded, take the least time.

    Args:
      plan: the virtual clock's plan.
      limit: the most jobs of one device.
      devices: how many share a call.
    """

    def windows(size: int) -> list[int]:
        return [len(window.jobs) for window in plan_windows(plan, size, end=SIZED_BY)]

    def cost(each: int) -> float:
        calls = windows(each * devices)
        return len(calls) * (each + CALL_COST) / max(sum(calls), 1)

    most = -(-max(windows(0), default=1) // devices)
    return devices * min(range(1, min(limit, most) + 1), key=cost)


def plan_calls(
    config: Config, plan: Schedule, jobs: int, start: int = 0, trained: Collection[int] = ()
) -> list[Window]:
    """Windows of one call each.

    Of the jobs that can be trained a call takes those that arrive first. The others wait for the
    next call, and fill it: a call is padded only where fewer jobs are in flight than it takes. And
    few uploads wait for their arrival.

    Args:
      config: may limit the jobs of a window.
      plan: the virtual clock's plan.
      jobs: see `jobs_in_a_call`.
      start, trained: see `plan_windows`.
    """
    return plan_windows(plan, min(config.window_limit or jobs, jobs), start, trained=trained)


class Room(NamedTuple):
    """How the memory of the devices is used.

    Attributes:
      place: where stale versions and uploads wait, `device` or `host`.
      client_batch: jobs that one device trains in one call at most.
      teacher_batch: see `Dfkd`; 0 where all teachers' samples fit into a call.
      beside: bytes that live on the device beside the method's memory of the clients.
    """

    place: str
    client_batch: int
    teacher_batch: int
    beside: int


def room(
    config: Config,
    holdings: Ingredients,
    params: Params,
    *,
    stored: Any,
    waiting: int,
    memory: int | None,
    fast: int = 0,
) -> Room:
    """Plans the use of memory, by what the arrays of a run take between calls and during one.

    Args:
      config: the sizes, and what it leaves open.
      holdings: what the server holds, see `server.builder`.
      params: the global parameters.
      stored: the samples on the device.
      waiting: models that wait at most, stale versions and uploads.
      memory: see `choose_place`.
      fast: see `chips.Chip`.
    """
    size = partial(tiles.nbytes, platform=holdings.model.platform)
    state, entry, extra = methods.shapes(config, holdings, params)
    waiting_bytes = waiting * size((params, extra))
    used = waiting_bytes + size((state, stored, holdings.frozen))
    if config.cache_memory == "device":
        used += config.num_clients * size(entry)
    job = job_bytes(holdings.model, params, config.batch_size)
    working = max(job, revival_bytes(config, holdings.model, params))
    place = choose_place(config, working, used, memory)
    if place == "host":
        used -= waiting_bytes
    batch = config.client_batch or default_client_batch(
        holdings.model, config, job, used, memory, fast
    )
    teachers = teachers_in_a_call(config, holdings.model, params, used, memory)
    return Room(place, batch, teachers, waiting_bytes if place == "device" else 0)


def teachers_in_a_call(
    config: Config, model: Model, params: Any, used: int, memory: int | None
) -> int:
    """`teacher_batch` where the configuration leaves it open: as many as fit, or 0 for all.

    Args:
      config: the sizes.
      model, params: see `job_bytes`.
      used, memory: see `choose_place`.
    """
    if config.teacher_batch or memory is None or not config.traits.distils:
        return config.teacher_batch
    for size in range(config.num_teachers, 0, -1):
        if config.num_teachers % size == 0:
            own = dataclasses.replace(config, teacher_batch=size)
            if used + revival_bytes(own, model, params) <= memory:
                return 0 if size == config.num_teachers else size
    return 1
