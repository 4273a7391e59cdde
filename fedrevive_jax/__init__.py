"""Asynchronous federated learning with data-free revival of stale updates, in JAX.

The public names; each is imported when it is first used, so that planning a run does not pay for
what only training needs.
"""

import importlib

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

__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
