"""When synthesis and distillation are due: said here and nowhere else.

The reviver asks inside its compiled step, a plan asks for all arrivals of a schedule at once, and
the benchmark and the profiler for what comes next. All arguments are plain numbers, arrays of NumPy
or traced. What values decide is left to the reviver: a rejected upload is no occasion for either,
and distillation needs a pool with something in it.
"""

from typing import Any

from fedrevive_jax.config import Dfkd


def synthesis(settings: Dfkd, version: Any, synthesised_version: Any = -1) -> Any:
    """Whether samples are made at an arrival.

    Args:
      settings: `freeze_versions` and `generation_interval`, T_gen, are read.
      version: v, the global version that the arrival meets.
      synthesised_version: the last version at which samples were made; each makes them once.
    """
    return (
        (version >= settings.freeze_versions)
        & (version % settings.generation_interval == 0)
        & (version != synthesised_version)
    )


def distillation(settings: Dfkd, synthesises: bool, version: Any, beta: Any) -> Any:
    """Whether the teachers are distilled at an arrival.

    Args:
      settings: see `warm_version`.
      synthesises: whether the samples are made, or real ones that are there from the start.
      version: v, the global version that the arrival meets.
      beta: weight of what is distilled; nothing is distilled for a weight of 0.
    """
    warm = version >= warm_version(settings, synthesises)
    return warm & (beta > 0)


def warming_up(settings: Dfkd, version: Any) -> Any:
    """Whether samples are made already and nothing is distilled yet: freeze <= v <= warm-up."""
    return (version >= settings.freeze_versions) & (version <= settings.warmup_versions)


def adversarial(settings: Dfkd, version: Any, syntheses: Any) -> Any:
    """Whether L_adv counts in a synthesis.

    Args:
      settings: `warmup_versions`, of what `adversarial_start` names.
      version: v, the global version that the arrival meets.
      syntheses: how many came before this one.
    """
    if settings.adversarial_start == "syntheses":
        return syntheses >= settings.warmup_versions
    return version > settings.warmup_versions


def warm_version(settings: Dfkd, synthesises: bool) -> int:
    """The first version at whose arrivals there can be a distillation: it is past the warm-up, and
    the first samples have been made by then."""
    if not synthesises:
        return settings.warmup_versions + 1 if settings.warmup_versions else 0
    interval = settings.generation_interval
    first_synthesis = -(-settings.freeze_versions // interval) * interval
    return max(settings.warmup_versions + 1, first_synthesis)


def syntheses_per_arrival(settings: Dfkd, buffer_size: int) -> float:
    """How often samples are made in the long run, for each arrival: 1 / (T_gen B)."""
    return 1 / (settings.generation_interval * buffer_size)
