"""A thousand configurations as a command line gives them: each plans a run or is refused in a line.

One process, no training. `python -m tests.test_flags` prints how many were refused and how long the
slowest took.
"""

import dataclasses
import re
import time
from pathlib import Path

import numpy as np
import pytest

from fedrevive_jax.clock import schedule
from fedrevive_jax.clock.windows import plan_windows
from fedrevive_jax.config import FAULTS, LIMITS, METHODS, Config
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import BY_DATASET, OF_PRESETS, REVIVALS, SCALES, resolve
from tests.commands import call

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
# The world stays small enough to plan at once; all else may be as large as it likes.
TINY = {
    "num_clients": (1, 40), "concurrency": (1, 20), "buffer_size": (1, 20), "open_slots": (1, 20),
    "max_versions": (1, 200),
}  # fmt: skip
TINY_REAL = {"max_time": (0.5, 20.0), "delay_mean": (0.1, 3.0)}
NONSENSE = ("", "abc", "1e", "0x10", "1,5", "NaN", "-inf", "1e999", "--", "½", "1\n2", "None",
            "True", "\x00", "x" * 300)  # fmt: skip
REFUSED = re.compile(r"(?P<flag>[a-z0-9_]+)=(?P<value>.*): (must|needs|plans|starts|cannot) \S.*")


def valid(generator, field):
    """A text that the field allows by itself."""
    limits = field.metadata
    if field.name == "fault_kinds":
        kinds = generator.permutation(FAULTS)
        return ",".join(kinds[: generator.integers(1, 4)])
    if field.name == "mesh":
        return str(generator.choice(["auto", "1"]))
    if "choices" in limits:
        return str(generator.choice(limits["choices"]))
    if field.type is str:
        return str(generator.choice(["", "here", "~/there", "/tmp/a b", "naïve/ü"]))
    low = limits.get("at_least", limits.get("above"))
    if field.type is int:
        low, high = TINY.get(field.name, (low, limits.get("at_most", 2**31 - 1)))
        return str(int(generator.integers(low, min(high, low + 1000) + 1)))
    high = limits.get("at_most", limits.get("below", 1e6))
    low, high = TINY_REAL.get(field.name, (low, high))
    value = high if "above" in limits else low
    return repr(float(generator.choice([value, generator.uniform(low, high)])))


def invalid(generator, field):
    """A text that the field does not allow, whatever the others are."""
    limits = field.metadata
    if field.name == "fault_kinds":
        return str(generator.choice(["", "lost,", "lost,lost", "dropped", "LOST", "lost;nan"]))
    if field.name == "mesh":
        return str(generator.choice(["-1", "two", "1.5", "AUTO"]))
    if "choices" in limits:
        return str(generator.choice([*NONSENSE, str(limits["choices"][0]).upper()]))
    if field.type is str:
        return str(generator.choice(["a\nb", "a\x00b", "\x1b[2J", "a\rb"]))
    outside = [str(2**31), str(-(2**31)), "1e300"] if field.type is int else ["inf", "nan"]
    low = limits.get("at_least", limits.get("above"))
    outside.append(str(low - 1 if "at_least" in limits else low))
    if "at_most" in limits:
        outside.append(str(limits["at_most"] * 2))
    if "below" in limits:
        outside.append(str(limits["below"]))
    return str(generator.choice([*NONSENSE, *outside, "1.5" if field.type is int else "-1e-9"]))


def draw(generator):
    """(values by flag, those that no configuration may have)."""
    names = generator.choice([*FIELDS, *OF_PRESETS], generator.integers(0, 9), replace=False)
    wrong = set(names[: generator.integers(0, 2) * generator.integers(0, 3)])
    values = {"num_clients": "40", "concurrency": "20", "max_time": "10.0"}
    for name in map(str, names):
        if name in OF_PRESETS:
            choices = SCALES if name == "preset_scale" else REVIVALS
            values[name] = "huge" if name in wrong else str(generator.choice(choices))
        else:
            values[name] = (invalid if name in wrong else valid)(generator, FIELDS[name])
    return values, wrong


def outcome(values):
    """The number of planned windows, or the message of the refusal."""
    try:
        config = resolve(**values)
        plan = schedule.create(config)
    except ConfigError as error:
        return str(error)
    windows = plan_windows(plan, config.window_limit)
    assert sum(len(window.jobs) for window in windows) == plan.num_arrivals
    return len(windows)


def check(values, wrong):
    """How it came out: planned or refused."""
    came = outcome(values)
    if isinstance(came, int):
        assert not wrong, f"{values} was planned"
        return "planned"
    assert len(came.splitlines()) == 1
    assert len(came) < 500
    told = REFUSED.fullmatch(came)
    assert told, came
    assert told["flag"] in {*FIELDS, *OF_PRESETS}
    # What contradicts another value is blamed only where nothing is wrong by itself.
    assert not wrong or told["flag"] in wrong
    return "refused"


def test_a_thousand_configurations():
    generator = np.random.default_rng(0)
    counts = {"planned": 0, "refused": 0}
    for _ in range(1000):
        counts[check(*draw(generator))] += 1
    assert min(counts.values()) > 200


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_tells_what_is_allowed(name):
    """The whole range, whichever end was left: bounds, choices, kind."""
    field, limits = FIELDS[name], FIELDS[name].metadata
    generator = np.random.default_rng(1)
    for value in {invalid(generator, field) for _ in range(20)}:
        with pytest.raises(ConfigError) as caught:
            resolve(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"{name}=")
        assert all(choice in message for choice in limits.get("choices", ()))
        for bound in LIMITS:
            assert bound not in limits or f" {limits[bound]}" in message


def test_what_is_no_text_is_not_taken_for_its_name():
    for given in (None, b"runs", ("runs",)):
        with pytest.raises(ConfigError, match=r"^workdir=.*: must be a text"):
            Config(workdir=given)
    assert Config(workdir=Path("runs")).workdir == "runs"  # the control


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_an_empty_command_line_plans(method, scale):
    assert outcome({"method": method, "preset_scale": scale, "max_time": "30"}) > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_small_scale_makes_several_versions_of_every_method(method):
    for dataset in BY_DATASET:
        for seed in (None, *range(5)):
            config = resolve(dataset, method, preset_scale="small", seed=seed)
            assert schedule.create(config).num_versions >= 3


def test_some_of_them_as_commands():
    """The same words come out of the command, as one line and a status of 1."""
    generator, seen = np.random.default_rng(2), []
    while len(seen) < 3:
        values, wrong = draw(generator)
        if wrong and not any("\x00" in value for value in values.values()):
            seen.append(values)  # no command line can hold a NUL
    for values in seen:
        result = call(*(f"--{name}={value}" for name, value in values.items()), "--dry_run")
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr == f"error: --{outcome(values)}\n"


def main() -> None:
    generator, slowest = np.random.default_rng(0), 0.0
    counts = {"planned": 0, "refused": 0}
    for _ in range(1000):
        drawn = draw(generator)
        began = time.perf_counter()
        counts[check(*drawn)] += 1
        slowest = max(slowest, time.perf_counter() - began)
    print(f"1000 configurations: {counts}; the slowest took {slowest:.3f} s")


if __name__ == "__main__":
    main()
