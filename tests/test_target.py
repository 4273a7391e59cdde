"""Programs compiled for TPUs that are not there. Skipped where their compiler is not installed."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments import main
from fedrevive_jax.clock import schedule
from fedrevive_jax.clock.windows import plan_windows
from fedrevive_jax.compute import target as targets
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import resolve
from fedrevive_jax.simulation import compiling

needs_compiler = pytest.mark.skipif(
    not targets.has_compiler(), reason="python -m pip install -e '.[tpu]'"
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "must be a topology like v5e:1x1"),
        ("v9:1x1", "must be a topology like v5e:1x1"),
        ("v5e:0x1", "must be a topology like v5e:1x1"),
        ("v5p:2x2", "must have 3 sides"),
    ],
)
def test_an_unknown_target_is_one_line(name, words):
    with pytest.raises(ConfigError, match=f"target={name}: {words}"):
        targets.described(name)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(targets, "has_compiler", lambda: False)
    with pytest.raises(ConfigError, match="target=v5e:1x1: needs the compiler of TPUs"):
        targets.described("v5e:1x1")
