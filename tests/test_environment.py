"""JAX's own settings change no result: they are fixed, or refused in one line."""

import contextlib
from pathlib import Path

import flax
import jax
import pytest

import fedrevive_jax
from fedrevive_jax.compute import environment
from fedrevive_jax.compute.streams import Stream, jax_key, root_key
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import make_network
from fedrevive_jax.running import restore
from fedrevive_jax.simulation.planning import plan
from fedrevive_jax.simulation.simulator import Simulation
from tests.commands import call
from tests.toys import small

REFUSED = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_high_dynamic_range_gumbel": True,
    "flax_fix_rng_separator": True,
    "flax_return_frozendict": True,
    "jax_default_matmul_precision": "highest",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_disable_jit": True,
    "jax_transfer_guard": "disallow",
}


@contextlib.contextmanager
def setting(name, value):
    config = flax.config if name.startswith("flax") else jax.config
    before = getattr(config, name)
    config.update(name, value)
    try:
        yield
    finally:
        config.update(name, before)


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_settings_that_would_change_or_break_a_run(name, value):
    environment.check()
    message = f"^{name.upper()}={value}: must be left out or .*; [^\n]*$"
    with setting(name, value), pytest.raises(ConfigError, match=message):
        environment.check()


def test_every_entrance_looks(tmp_path):
    entrances = (
        lambda: fedrevive_jax.run(small("fedbuff")),
        lambda: Simulation(small("fedbuff")),
        lambda: plan(small("fedbuff")),
        lambda: restore.evaluate_checkpoint(tmp_path),
    )
    for enter in entrances:
        with setting("jax_random_seed_offset", 1), pytest.raises(ConfigError, match="OFFSET=1"):
            enter()


def test_another_default_generator_draws_the_same():
    """The control: keys that JAX makes by default are others."""
    key, default = jax_key(3, Stream.SERVER, 5), jax.random.key(3)
    init = make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=4).init
    params = init(root_key())
    with setting("jax_default_prng_impl", "rbg"):
        assert jax.random.key(3).dtype != default.dtype
        again = jax_key(3, Stream.SERVER, 5)
        assert again.dtype == key.dtype
        assert (jax.random.normal(again, 9) == jax.random.normal(key, 9)).all()
        for a, b in zip(*map(jax.tree.leaves, (params, init(root_key()))), strict=True):
            assert (a == b).all()


def test_keys_are_made_in_one_place():
    package = Path(fedrevive_jax.__file__).parent
    made = [path.name for path in package.rglob("*.py") if "random.key(" in path.read_text()]
    assert made == ["streams.py"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("JAX_PLATFORMS", "nonsense", "JAX_PLATFORMS=nonsense: Unable to initialize backend"),
        ("JAX_ENABLE_X64", "1", "JAX_ENABLE_X64=True: must be left out or False"),
        ("JAX_ENABLE_X64", "maybe", "invalid truth value 'maybe' for environment 'JAX_ENABLE_X64'"),
    ],
)
def test_variables_are_told_in_one_line(tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    result = call("--max_time=1", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())
