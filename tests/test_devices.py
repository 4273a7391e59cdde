"""Several devices: a process of its own, because their number is fixed once JAX is in use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedrevive_jax.errors import ConfigError
from fedrevive_jax.record import files
from tests.toys import small


@pytest.mark.slow
def test_on_eight_devices():
    settings = {"JAX_NUM_CPU_DEVICES": "8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    tests = Path(__file__).with_name("eight_devices.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_mesh_is_no_part_of_what_a_run_is(tmp_path):
    files.write_json(tmp_path / files.CONFIG, small("fedbuff").as_dict())
    assert files.configured_differently(tmp_path, small("fedbuff", mesh="auto")) == []
    assert files.configured_differently(tmp_path, small("fedbuff", seed=1)) != []


@pytest.mark.parametrize("value", ["all", "-1", "1.5", ""])
def test_a_mesh_is_a_number_or_auto(value):
    with pytest.raises(ConfigError, match=f"mesh={value}: must be auto or a whole number"):
        small("fedbuff", mesh=value)
