"""A run's own programs, compiled for chips that are not there: do they fit, what would they cost?

No data, no weights, no chip. What comes out are the compiler's numbers, and estimates made of them.
"""

import dataclasses
import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrevive_jax import data, methods
from fedrevive_jax.clients import feed as feeds
from fedrevive_jax.clients.evaluation import make_batch_judge
from fedrevive_jax.clients.local_training import make_window_trainer
from fedrevive_jax.clock import schedule
from fedrevive_jax.compute import chips, tiles
from fedrevive_jax.compute.hlo import Cost, Program
from fedrevive_jax.compute.streams import Stream, jax_key, root_key
from fedrevive_jax.compute.target import Target
from fedrevive_jax.config import Config
from fedrevive_jax.data.dataset import split_training
from fedrevive_jax.messages import Download, Upload
from fedrevive_jax.models import Model, convolutions, default_precision, judging
from fedrevive_jax.models.model import initial_taps
from fedrevive_jax.server import builder, core
from fedrevive_jax.server.shelf import USABLE
from fedrevive_jax.simulation import fitting, planning, sizing

# How far the package's estimate of a program's memory may be off before this says so.
AGREEMENT = 0.15
# Of the training samples, where a data set has no test part of its own.
TESTED = 0.15
SCOPES = ("synthesis", "distillation")


class Programs(NamedTuple):
    """A run's programs, not compiled yet, each with the shapes of its arguments on the target.

    Attributes:
      training, server_step, evaluation: (jitted function, arguments).
      jobs: that are trained in one call.
      place: where versions wait.
      client_batch: jobs that one device trains in one call at most.
      teacher_batch: teachers whose samples go through the student in one call; 0 is all.
      beside: bytes that live on a device during a call and are none of its arguments, by name of
        the program. Versions that wait there are all counted, also those that are arguments.
      estimates: the package's own estimate of what each program takes beside its arguments, by
        name.
    """

    training: tuple[jax.stages.Wrapped, tuple]
    server_step: tuple[jax.stages.Wrapped, tuple]
    evaluation: tuple[jax.stages.Wrapped, tuple]
    jobs: int
    place: str
    client_batch: int
    teacher_batch: int
    beside: dict[str, int]
    estimates: dict[str, int]


def plan(
    config: Config,
    target: Target,
    dataset: data.Dataset | None = None,
    model: Model | None = None,
) -> dict[str, Any]:
    """What a run would be on a target, as plain numbers; seconds are estimates.

    Bytes are of one device, FLOPs of the whole call. `seconds` of a program are the larger of what
    the compiler's cycles and what its FLOPs at the chip's peak take. The chip waits for nobody
    in them: neither for the host nor for versions that come from its memory.

    Args:
      config: what to run.
      target: for which devices.
      dataset, model: stand in for those that the configuration names.

    Raises:
      ConfigError: the configuration cannot be run.
    """
    config = settled(config, target)
    dataset = dataset or blank(config)
    clock = schedule.create(config)
    programs = build(config, target, dataset, clock, model)
    rows, cycles = {}, {}
    for name in ("training", "server_step", "evaluation"):
        rows[name], own = _compiled(name, programs, target)
        if own is not None:
            cycles |= {name: own.always, **(own.branches if name == "server_step" else {})}
    counted = planning.plan(config, dataset, model)
    peak = len(target.devices) * chips.peak(target.chip, config.precision)
    flops = {
        "training": counted["flops_client_job"] * programs.jobs,
        "synthesis": counted.get("flops_synthesis", 0),
        "distillation": counted.get("flops_distillation", 0),
        "evaluation": counted["flops_forward_per_sample"] * config.eval_batch,
    }
    calls = _calls(config, dataset, clock, programs.jobs)
    parts = {
        name: _part(count, cycles[name] / target.chip.hertz, flops.get(name, 0), peak)
        for name, count in calls.items()
        if count and name in cycles
    }
    # Of a program that does not fit there are no cycles, and so none of the run.
    total = sum(part["seconds_of_the_run"] for part in parts.values())
    seconds = total if all(row["fits_alone"] for row in rows.values()) else None
    return {
        "target": target.name,
        "chip": target.kind,
        "devices": len(target.devices),
        "bytes_chip": target.chip.memory,
        "flops_peak": peak,
        "fits": all(row["fits"] for row in rows.values()),
        "version_memory": programs.place,
        "jobs_in_a_call": programs.jobs,
        "programs": rows,
        "parts": parts,
        "arrivals": clock.num_arrivals,
        "flops_of_the_run": counted["flops_total"],
        "seconds_of_the_run": seconds,
        "seconds_of_an_arrival": seconds and seconds / max(clock.num_arrivals, 1),
        "flags": _flags(config, programs, target),
    }


def _calls(
    config: Config, dataset: data.Dataset, clock: schedule.Schedule, jobs: int
) -> dict[str, int]:
    """How often each part of a run is called."""
    # An evaluation of the start and one of the end are among them.
    if config.eval_interval:
        evaluations = int(config.max_time / config.eval_interval) + 2
    else:
        evaluations = clock.num_versions // config.eval_every + 2
    evaluated = len(dataset.splits[config.eval_split]) or round(TESTED * len(dataset.labels))
    revivals = planning.revivals(config, clock)
    return {
        "training": len(sizing.plan_calls(config, clock, jobs)),
        "server_step": clock.num_arrivals,
        "synthesis": revivals.get("syntheses", 0),
        "distillation": revivals.get("distillations", 0),
        "evaluation": evaluations * -(-evaluated // config.eval_batch),
    }


def _part(calls: int, modelled: float, flops: int, peak: float) -> dict[str, Any]:
    """What a part takes, from the seconds that its cycles take and its FLOPs."""
    seconds = max(modelled, flops / peak)
    return {
        "calls": calls,
        "flops": flops,
        "seconds": seconds,
        "share_of_peak": flops / peak / seconds if seconds else 0.0,
        "seconds_of_the_run": seconds * calls,
    }


def settled(config: Config, target: Target) -> Config:
    """The configuration with what `auto` stands for on a target."""
    precision = config.precision
    return dataclasses.replace(
        config,
        convolution=convolutions.settled(config.convolution, target.platform),
        precision=default_precision(target.platform) if precision == "auto" else precision,
    )


def build(
    config: Config,
    target: Target,
    dataset: data.Dataset,
    clock: schedule.Schedule,
    model: Model | None = None,
) -> Programs:
    """The programs of a settled configuration, for a target.

    Args:
      config: see `settled`.
      target: for which devices.
      dataset: tells shapes and preprocessing; its samples are not looked at.
      clock: the plan of the run.
      model: stands in for the one that the configuration names.
    """
    # Texts that synthesis starts from move no size, and blank data have no tokenizer to read them.
    config = dataclasses.replace(config, seed_text="")
    model = judging.fitting(config, dataset, model, target.platform)
    params, frozen = jax.eval_shape(lambda k: (model.init(k), model.frozen(k)), root_key())
    feed = feeds.make_feed(dataset, frozen)
    holdings = builder.holdings(
        config,
        model,
        dataset,
        feed.augment,
        feed.augment_real,
        frozen,
        class_mixes=np.zeros((config.num_clients, dataset.num_classes), np.float32),
        mesh=target.mesh,
    )
    room = sizing.room(
        config,
        holdings,
        params,
        stored=dataset.samples,
        waiting=clock.live_versions_max() + config.concurrency,
        memory=int(USABLE * target.chip.memory) if target.chip.memory else None,
        fast=target.chip.fast,
    )
    jobs = sizing.jobs_in_a_call(clock, room.client_batch, len(target.devices))
    state, entry, extra = methods.shapes(config, holdings, params)
    taps = jax.eval_shape(lambda: initial_taps(model))
    store, labels = feed.store, dataset.labels.astype(np.int32)
    number, flag = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    steps = (jobs, config.local_iterations, config.batch_size)
    shapes = target.shapes

    config = dataclasses.replace(config, teacher_batch=room.teacher_batch)
    method = methods.create(config, holdings)
    trainer = make_window_trainer(
        model,
        feed.training,
        config.client_lr,
        lambda job, step: jax_key(config.seed, Stream.AUGMENTATION, job, step),
        target.mesh,
        method.client,
    )
    step = core.make_step(
        method,
        config.seed,
        config.max_update_norm,
        target.mesh,
        target.platform,
    )
    judge = make_batch_judge(model, feed.evaluation, config.eval_batch, target.mesh)
    report = jax.eval_shape(method.client.report, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    upload = jax.eval_shape(Upload, params, taps, jax.ShapeDtypeStruct((), jnp.float32), report)
    positions = jax.ShapeDtypeStruct((config.eval_batch,), jnp.int32)
    valid = jax.ShapeDtypeStruct((config.eval_batch,), bool)
    params, extra, state, entry, upload, store, labels = (
        shapes(tree) for tree in (params, extra, state, entry, upload, store, labels)
    )
    indices = shapes(jax.ShapeDtypeStruct(steps, jnp.int32))
    numbers = shapes(jax.ShapeDtypeStruct((jobs,), jnp.int32))
    facts = shapes((number,) * 4 + (flag,))
    size = functools.partial(tiles.nbytes, platform=target.platform)
    waiting = 0
    if room.place == "device":
        waiting = (clock.live_versions_max() + config.concurrency) * size((params, extra))
    if config.cache_memory == "device":
        waiting += config.num_clients * size(entry)
    of_a_job = sizing.job_bytes(model, params, config.batch_size)
    each = -(-jobs // len(target.devices))
    return Programs(
        (trainer, ((Download(params, extra),) * jobs, store, labels, indices, numbers)),
        (step, (params, params, state, entry, upload, facts)),
        (judge, (params, store, labels, shapes(positions), shapes(valid))),
        jobs,
        room.place,
        room.client_batch,
        room.teacher_batch,
        {
            "training": waiting + size(state),
            "server_step": waiting + size((store, labels)),
            "evaluation": waiting + size(state),
        },
        {
            "training": sizing.training_bytes(
                size(params), of_a_job, each, target.chip.fast, len(target.devices)
            ),
            "server_step": sizing.revival_bytes(config, model, params) + size(params),
        },
    )


def _compiled(name: str, programs: Programs, target: Target) -> tuple[dict[str, Any], Cost | None]:
    """What the compiler says of a program, and its cycles where it fits."""
    function, arguments = getattr(programs, name)
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[Uu]sed ([\d.]+)([KMGT])|\(([\d.]+)([KMGT])\)", str(error))
        needed = None
        if used is not None:
            size, unit = (used[1], used[2]) if used[1] else (used[3], used[4])
            needed = int(float(size) * 1024 ** ("KMGT".index(unit) + 1))
        row = {
            "compile_seconds": time.perf_counter() - began,
            "fits": False,
            "fits_alone": False,
            "bytes_peak": needed,
        }
        return row, None
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    # A TPU's compiler tells both.
    assert memory is not None
    assert text is not None
    # What is given back in place of an argument takes no room of its own.
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + fitting.new_bytes(compiled)
    beside = programs.beside[name]
    read = Program(text)
    cost = read.cost(SCOPES)
    row = {
        "compile_seconds": seconds,
        "bytes_arguments": memory.argument_size_in_bytes,
        "bytes_temporaries": memory.temp_size_in_bytes,
        "bytes_results": new,
        "bytes_peak": peak,
        "bytes_beside": beside,
        "fits": target.chip.memory is None or peak + beside <= target.chip.memory,
        "fits_alone": True,
        "collectives": read.collectives(),
        "loops_of_unknown_length": cost.unknown_loops,
    }
    if name in programs.estimates:
        estimated = memory.argument_size_in_bytes + programs.estimates[name]
        agrees = abs(peak / estimated - 1) <= AGREEMENT
        row |= {"bytes_estimated": estimated, "estimate_agrees": agrees}
    return row, cost


def blank(config: Config) -> data.Dataset:
    """A data set of the shapes of the one that a configuration names, all zeros."""
    known = data.spec(config)
    count = known.training_samples + known.test_samples
    kind = np.int32 if len(known.input_shape) == 1 else np.uint8
    splits = split_training(known.training_samples, config.seed)
    splits["test"] = np.arange(known.training_samples, count, dtype=np.int32)
    return data.Dataset(
        config.dataset,
        known.num_classes,
        np.zeros((count, *known.input_shape), kind),
        np.zeros(count, np.int32),
        splits,
        data.preprocessing(config),
    )


def _flags(config: Config, programs: Programs, target: Target) -> str:
    """What the run chose for itself, as flags that would say the same."""
    chosen = {
        "precision": config.precision,
        "convolution": config.convolution,
        "version_memory": programs.place,
        "client_batch": programs.client_batch,
    }
    if programs.teacher_batch:
        chosen["teacher_batch"] = programs.teacher_batch
    if target.mesh is not None:
        chosen["mesh"] = len(target.devices)
    return " ".join(f"--{name}={value}" for name, value in chosen.items())
