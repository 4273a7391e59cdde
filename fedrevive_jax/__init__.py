"""Asynchronous federated learning with data-free revival of stale updates, in JAX.

The public names; each is imported when it is first used, so that planning a run does not pay for
what only training needs.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees; `tests/test_rooms.py` keeps both lists equal
    from fedrevive_jax.config import Config
    from fedrevive_jax.data.dataset import Dataset, Preprocessing, split_training
    from fedrevive_jax.errors import ConfigError
    from fedrevive_jax.models.model import Model, from_flax
    from fedrevive_jax.presets import resolve
    from fedrevive_jax.running.recorder import Result
    from fedrevive_jax.running.restore import evaluate_checkpoint
    from fedrevive_jax.running.runner import run
    from fedrevive_jax.server.core import Server
    from fedrevive_jax.simulation.planning import plan
    from fedrevive_jax.simulation.simulator import Simulation

__all__ = [
    "Config",
    "ConfigError",
    "Dataset",
    "Model",
    "Preprocessing",
    "Result",
    "Server",
    "Simulation",
    "evaluate_checkpoint",
    "from_flax",
    "plan",
    "resolve",
    "run",
    "split_training",
]

_WHERE = {
    "Config": "config",
    "ConfigError": "errors",
    "Dataset": "data.dataset",
    "Model": "models.model",
    "Preprocessing": "data.dataset",
    "Result": "running.recorder",
    "Server": "server.core",
    "Simulation": "simulation.simulator",
    "evaluate_checkpoint": "running.restore",
    "from_flax": "models.model",
    "plan": "simulation.planning",
    "resolve": "presets",
    "run": "running.runner",
    "split_training": "data.dataset",
}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
