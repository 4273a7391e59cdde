"""Federated methods: one file each, all composed over the interface of `methods.method`."""

import importlib

from fedrevive_jax.config import Config
from fedrevive_jax.methods.method import Ingredients, Method, UpdateRule, compose

__all__ = ["Ingredients", "Method", "UpdateRule", "compose", "create"]


def create(config: Config, ingredients: Ingredients) -> Method:
    """The method that a configuration names; its module is called like it."""
    module = importlib.import_module(f"fedrevive_jax.methods.{config.method}")
    return module.create(config, ingredients)
