"""One setting: its type, its default, its help text and what values are allowed."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from etils import epath

from fedrevive_jax.errors import ConfigError


def setting(default: Any, help_text: str, **limits: Any) -> Any:
    """A field with its help text and limits: `choices`, `at_least`, `above`, `at_most`, `below`;
    `path` marks one that names a file or folder, `bucket` that it may lie in a bucket."""
    return dataclasses.field(default=default, metadata={"help": help_text, **limits})


class Part:
    """A frozen dataclass of settings. It converts and checks them when it is made.

    Raises:
      ConfigError: a value is outside its limits, or two values contradict each other.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = checked(field, getattr(self, field.name))
            if field.metadata.get("path") and value:
                value = whole_path(field.name, value, field.metadata.get("bucket", False))
            object.__setattr__(self, field.name, value)
        for part in reversed(type(self).__mro__):
            if "_check" in vars(part):
                part._check(self)

    def _check(self) -> None:
        """What holds between settings; each part has its own, and all of them are asked."""


# Limits of a number and their words.
LIMITS = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}

# Types of fields and their words.
KINDS = {int: "a whole number", float: "a number", str: "a text"}


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value as the field's type, or an error that names field, value and what is allowed."""
    limits = field.metadata
    kind = next(kind for kind in KINDS if field.type is kind)
    bounds = [f"{words} {limits[name]}" for name, words in LIMITS.items() if name in limits]

    def refused(*allowed: str, joined: str = ", ") -> ConfigError:
        return ConfigError(field.name, shown(value), f"must be {joined.join(allowed)}")

    try:
        given: Any = value
        if isinstance(given, os.PathLike):
            given = os.fspath(given)
        if kind is str and not isinstance(given, (str, int, float)):
            raise ValueError  # str(None) is a text
        result: Any = kind(given)
        if isinstance(value, bool) or (kind is int and float(value) != result):
            raise ValueError  # int(0.5) would pass silently
    except (TypeError, ValueError, OverflowError):
        raise refused(KINDS[kind], *bounds) from None
    if kind is int and abs(result) >= 2**31:
        raise refused(f"below {2**31}", *bounds)
    if kind is float and not math.isfinite(result):
        raise refused("finite", *bounds)
    if "choices" in limits and result not in limits["choices"]:
        raise refused("one of " + ", ".join(limits["choices"]))
    if kind is str and not all(c.isprintable() or ord(c) > 127 for c in result):
        raise refused("a text without control characters")  # no file has such a name
    if not (
        result >= limits.get("at_least", result)
        and ("above" not in limits or result > limits["above"])
        and result <= limits.get("at_most", result)
        and ("below" not in limits or result < limits["below"])
    ):
        raise refused(*bounds, joined=" and ")
    return result


# What names of folders in buckets start with; `etils.epath` knows them.
BUCKETS = ("gs://", "s3://", "az://")


def is_bucket(path: Any) -> bool:
    """Whether a path is one in a bucket."""
    return str(path).startswith(BUCKETS)


def whole_path(name: str, path: str, bucket: bool = False) -> str:
    """A path as a user gives it: see `without_tilde`; one in a bucket stays what it is.

    Raises:
      ConfigError: there is no such user, or it must be a path of this machine.
    """
    if "://" not in path:
        return without_tilde(name, path)
    if not bucket:
        raise ConfigError(name, path, "must be a path of this machine; copy it from there")
    if not is_bucket(path):
        raise ConfigError(
            name, path, f"must be a path of this machine, or start with {', '.join(BUCKETS)}"
        )
    return str(epath.Path(path))


def without_tilde(name: str, path: str) -> str:
    """The path that a flag gives, with the home of a user in the place of `~`.

    Raises:
      ConfigError: there is no such user.
    """
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ConfigError(name, path, "must not name the home of an unknown user") from None


def shown(value: Any, limit: int = 100) -> str:
    """A value in the one line of a message."""
    text = str(value)
    printable = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return printable + ("..." if len(text) > limit else "")
