"""FedAsync: every arrival is mixed into the model (arXiv 1903.03934).

Two forms, with alpha_tau = alpha s(tau) and alpha the server's rate:

    mixing, as published:  theta <- (1 - alpha_tau) theta + alpha_tau theta'
    delta:                 theta <- theta + alpha_tau Delta

Mixing is delta with a pull back to the version the job started from, of strength alpha_tau:
theta' - theta = Delta - (theta - theta_b). The client's proximal term of the paper is not built.
"""

import jax
import jax.numpy as jnp

from fedrevive_jax.config import Config
from fedrevive_jax.messages import Submission
from fedrevive_jax.methods.method import (
    Base,
    Ingredients,
    Method,
    UpdateRule,
    plain,
    server_optimizer,
)


def mixing(rule: UpdateRule) -> UpdateRule:
    """The rule applied to theta' - theta instead of Delta."""

    def apply(state, delta, submission: Submission):
        towards = jax.tree.map(jnp.subtract, submission.upload.params, submission.params)
        return rule.apply(state, towards, submission)

    return UpdateRule(rule.init, apply)


def base(config: Config) -> Base:
    rule = plain(config)
    if config.fedasync_form == "mixing":
        rule = mixing(rule)
    return Base(rule, server_optimizer(config))


def create(config: Config, ingredients: Ingredients) -> Method:
    del ingredients
    return base(config).over(config.buffer_size)
