"""What a run uses where the user says nothing: tables by data set and method.

A value is looked up in the order: the user, the tuned revival, (data set, method), method, data
set, the default of `Config`. The four data sets of the paper take its published constants.
`fashion_mnist`, the folders and `custom` have none: they borrow from their nearest relative, on
populations that a laptop can simulate; divided by B, their `eval_every` means arrivals. `digits` is
tuned to finish within two minutes on two cores.
"""

import dataclasses
from typing import Any

from fedrevive_jax.config import METHODS, Config
from fedrevive_jax.errors import ConfigError

# --- the constants of arXiv 2511.00655 and its published experiments ------------------------------

PAPER = ("cifar10", "cifar100", "femnist", "newsgroups")

# field -> its value for each data set of PAPER
PUBLISHED: dict[str, tuple[Any, Any, Any, Any]] = {
    #                       cifar10     cifar100    femnist    newsgroups
    "model":               ("resnet18", "resnet18", "convnet", "t5"),
    "model_width":         (64,         64,         64,        512),
    "partition":           ("dirichlet", "dirichlet", "natural", "dirichlet"),
    "num_clients":         (1000,       1000,       1000,      1000),
    "concurrency":         (100,        100,        100,       100),
    "samples_per_client":  (350,        350,        350,       350),
    "alpha":               (0.5,        0.5,        0.5,       0.5),
    "local_iterations":    (25,         25,         25,        25),
    "batch_size":          (32,         32,         32,        32),
    "client_lr":           (3e-4,       3e-4,       1e-3,      1e-3),
    "beta_s_max":          (75.0,       75.0,       75.0,      75.0),
    "distillation_lr":     (1e-4,       3e-5,       1e-4,      3e-4),
    "generator_lr":        (3e-3,       3e-3,       0.01,      0.01),
    "latent_lr":           (1e-3,       1e-3,       3e-3,      0.1),
    "feature_weight":      (3e-3,       3e-4,       0.3,       1e-4),
    "one_hot_weight":      (1.0,        1.0,        1.0,       1.0),
    "adversarial_weight":  (0.1,        0.1,        0.1,       0.1),
    "freeze_versions":     (50,         50,         400,       50),
    "warmup_versions":     (100,        100,        500,       100),
    "proxy_temperature":   (0.8,        0.8,        0.8,       0.8),  # published for cifar10 only
    "eval_every":          (10,         10,         10,        10),
    "max_time":            (200.0,      200.0,      200.0,     200.0),
    "max_versions":        (50_000,     50_000,     50_000,    50_000),
    "seed":                (10,         10,         10,        10),
}  # fmt: skip

# What goes with the published runs on the shifted schedule: one of them made 51,325 versions, more
# than the limit of the others.
SHIFTED = {"max_time": 100.0, "max_versions": 60_000}

# method -> field -> its value for each data set of PAPER
PUBLISHED_BY_METHOD: dict[str, dict[str, tuple[Any, Any, Any, Any]]] = {
    #                                  cifar10  cifar100  femnist  newsgroups
    "fedavg": {
        "server_lr":                  (1.4,     1.4,      1.4,     1.0),
        "client_lr":                  (3e-4,    3e-4,     1e-3,    3e-3),
        "concurrency":                (100,     200,      100,     100),
    },
    "fedbuff": {
        "server_lr":                  (0.05,    0.1,      0.025,   0.1),
        "buffer_size":                (2,       3,        1,       3),
    },
    "afl_dw": {
        "server_lr":                  (0.1,     0.1,      0.05,    0.1),
    },
    "fedrevive": {
        "server_lr":                  (0.1,     0.1,      0.05,    0.1),
    },
    "dd_fedrevive": {
        "server_lr":                  (0.2,     0.3,      0.1,     0.1),
        "client_lr":                  (3e-4,    1e-4,     1e-3,    1e-3),
        "distillation_lr":            (3e-4,    1e-4,     3e-4,    1e-4),
        "distillation_temperature":   (2.0,     1.0,      2.0,     2.0),
        "beta_constant":              (0.5,     0.5,      0.5,     0.5),
    },
}  # fmt: skip


def _column(table: dict[str, tuple], dataset: str) -> dict[str, Any]:
    return {field: row[PAPER.index(dataset)] for field, row in table.items()}


# --- data sets that the paper does not have -------------------------------------------------------

BY_DATASET: dict[str, dict[str, Any]] = {
    **{dataset: _column(PUBLISHED, dataset) for dataset in PAPER},
    "digits": {
        "model": "digitsnet",
        "model_width": 16,
        "num_clients": 100,
        "concurrency": 20,
        "samples_per_client": 50,
        "max_time": 40.0,
        "alpha": 0.3,
        "local_iterations": 20,
        "client_lr": 3e-3,
        "server_lr": 0.3,
        "beta_s_max": 15.0,
        "num_teachers": 8,
        "synthesis_batch": 64,
        "pool_size": 2000,
        "latent_size": 64,
        "generator_features": 16,
        "generator_lr": 0.01,
        "latent_lr": 0.1,
        "synthesis_steps": 8,
        "feature_weight": 0.03,
        "distillation_steps": 5,
        "distillation_batch": 16,
        "distillation_lr": 1e-3,
        "generation_interval": 4,
        "freeze_versions": 20,
        "warmup_versions": 60,
        "eval_every": 10,
        "checkpoint_every": 200,
    },
    "fashion_mnist": {
        "model": "convnet",
        "model_width": 16,
        "num_clients": 500,
        "concurrency": 100,
        "max_time": 20.0,
        "alpha": 0.1,
        "local_iterations": 10,
        "client_lr": 1e-3,
        "server_lr": 0.05,
        "generator_features": 32,
        "generator_lr": 0.01,
        "latent_lr": 0.003,
        "feature_weight": 0.3,
        "freeze_versions": 100,
        "warmup_versions": 150,
        "eval_every": 25,
    },
    "image_folder": {
        "model": "resnet18",
        "model_width": 16,
        "num_clients": 100,
        "concurrency": 20,
        "max_time": 40.0,
        "server_lr": 0.1,
        "beta_s_max": 15.0,
    },
    "text_folder": {
        "model": "t5",
        "model_width": 64,
        "model_layers": 2,
        "model_heads": 4,
        "vocabulary_size": 8000,
        "text_length": 64,
        "num_clients": 100,
        "concurrency": 20,
        "samples_per_client": 60,
        "max_time": 40.0,
        "local_iterations": 10,
        "client_lr": 3e-3,
        "server_lr": 0.15,
        "beta_s_max": 15.0,
        "generator_lr": 0.01,
        "latent_lr": 0.1,
        "feature_weight": 1e-4,
        "generation_interval": 4,
        "pool_size": 2000,
        "distillation_steps": 5,
        "distillation_batch": 16,
        "distillation_lr": 3e-4,
        "freeze_versions": 20,
        "warmup_versions": 60,
    },
    "custom": {
        "model": "custom",
        "num_clients": 1000,
        "concurrency": 100,
        "max_time": 200.0,
    },
}

BY_METHOD: dict[str, dict[str, Any]] = {
    "fedavg": {"eval_every": 1, "server_lr": 1.4},
    "fedbuff": {"buffer_size": 2},
    "afl_dw": {},
    "fedrevive": {},
    # Papers' settings where they were found, for clients that send Delta; else the step per arrival
    # of a published relative. Tune them (experiments.compare --tune) before comparing.
    "fedasync": {
        # arXiv 1903.03934: alpha 0.6 or 0.9 on images, polynomial a = 0.5, tested up to tau = 50.
        # With tau near 100 that is alpha_tau = 0.06.
        "server_lr": 0.6,
        "staleness_weight": "polynomial",
        "staleness_exponent": 0.5,
    },
    # ICLR 2024: buffers of 10, as FedBuff's. Others found 0.1 to 0.5 stable and 1 not on images
    # (github.com/CyberStaZJU/dirbridge-response, five seeds). 0.25 of the mean of ten is 0.025 per
    # arrival, as FedBuff's published 0.05 of the mean of two.
    "ca2fl": {"buffer_size": 10, "server_lr": 0.25},
    "fadas": {
        # arXiv 2407.18365 and its code: buffers of 5, 1e-3 with the code's delay rule, else 1e-4.
        # The paper's rule, min(eta, 1/tau_max), does nothing to 1e-3 below tau_max = 1000.
        "buffer_size": 5,
        "server_lr": 1e-3,
        "fadas_delay_rule": "code",
    },
    # arXiv 2405.04171: beta 0.5; its server rate of 1 is for rounds of half of all clients. Like
    # ca2fl here, so that the two differ in beta alone.
    "fedstale": {"buffer_size": 10, "server_lr": 0.25, "fedstale_beta": 0.5},
    # arXiv 2511.19066 steps at every arrival, along a direction that stays for N arrivals; its rate
    # was not found. FedBuff's published step per arrival.
    "ace": {"buffer_size": 1, "server_lr": 0.025},
    # arXiv 2404.11015: the model is the mean of the queue. Its length was not found.
    "fedfa": {"buffer_size": 1, "server_lr": 1.0},
    # arXiv 2105.10056 and its code: plain averages; all else is the defaults of its fields, those
    # for MNIST.
    "fedgen": {"server_lr": 1.0, "eval_every": 1},
    # No guard and true histograms as in the authors' code.
    "dd_fedrevive": {
        "samples": "real",
        "loss_guard": "off",
        "proxy": "histogram",
        "beta_shape": "constant",
        "beta_constant": 0.5,
        "distillation_lr": 3e-4,
        "distillation_temperature": 2.0,
        "distillation_weight_decay": 0.0,
        "freeze_versions": 0,
        "warmup_versions": 0,
    },
}

BY_PAIR: dict[tuple[str, str], dict[str, Any]] = {
    **{
        (dataset, method): _column(PUBLISHED_BY_METHOD[method], dataset)
        for dataset in PAPER
        for method in PUBLISHED_BY_METHOD
    },
    # Rates chosen among 0.1, 0.3 and 0.6 by the mean of the last ten evaluations on the
    # validation split of seed 100; fedavg among 0.7 and 1.4.
    ("digits", "afl_dw"): {"server_lr": 0.1},
    ("custom", "fedbuff"): {"server_lr": 0.05},
    ("custom", "dd_fedrevive"): {"server_lr": 0.2},
    # FEMNIST's published rates.
    ("fashion_mnist", "fedbuff"): {"buffer_size": 1, "server_lr": 0.025},
    ("fashion_mnist", "dd_fedrevive"): {"server_lr": 0.1},
}

# --- what is worth more than noise ----------------------------------------------------------------

# What a preset may be asked for, beside a data set and a method; each is a flag.
OF_PRESETS = ("preset_scale", "preset_revival")

REVIVALS = ("tuned", "published")

# What FedRevive does on a data set instead of the published form, see docs/results.md. Each sample
# has one judge, so that a synthesis of many steps costs no more than the published one of two.
SINGLE_JUDGE = {"judges": "own", "proxy": "change", "loss_guard": "per_step"}
TUNED_REVIVAL: dict[str, dict[str, Any]] = {
    "digits": {**SINGLE_JUDGE, "generation_interval": 8, "synthesis_steps": 15},
    "fashion_mnist": {
        **SINGLE_JUDGE,
        "server_lr": 0.1,
        "generator_features": 8,
        "generation_interval": 20,
        "synthesis_steps": 15,
        "distillation_lr": 3e-3,
        "distillation_temperature": 2.0,
        "distillation_weight_decay": 0.0,
        "freeze_versions": 30,
        "warmup_versions": 60,
    },
}

# --- small versions of all of them ----------------------------------------------------------------

SCALES = ("full", "small")

# The most that a field may be at scale `small`: every part of a method runs, and a laptop is done
# in a minute or two.
SMALL: dict[str, Any] = {
    "max_time": 4.0,
    "num_clients": 20,
    "concurrency": 5,
    "buffer_size": 2,
    "samples_per_client": 24,
    "local_iterations": 2,
    "batch_size": 8,
    "model_layers": 2,
    "model_heads": 4,
    "vocabulary_size": 512,
    "text_length": 32,
    "beta_s_max": 4.0,
    "num_teachers": 2,
    "proxy_samples": 8,
    "generation_interval": 2,
    "synthesis_batch": 16,
    "latent_size": 16,
    "generator_features": 8,
    "pool_size": 64,
    "distillation_steps": 2,
    "distillation_batch": 8,
    "freeze_versions": 4,
    "warmup_versions": 6,
    "eval_every": 5,
    "eval_batch": 128,
}
# A round waits for its slowest client.
SMALL_TIME_OF_ROUNDS = 16.0
SMALL_WIDTH = {"t5": 32}
SMALL_IMAGE_WIDTH = 8


# What a method takes from the preset of another whose step it takes.
BASE_FIELDS = (
    "buffer_size", "server_lr", "staleness_weight", "staleness_exponent", "fadas_delay_rule",
    "eval_every",
)  # fmt: skip


def _preset(dataset: str, method: str, revival: str) -> dict[str, Any]:
    tuned = method == "fedrevive" and revival == "tuned"
    return {
        **BY_DATASET.get(dataset, {}),
        **BY_METHOD.get(method, {}),
        **BY_PAIR.get((dataset, method), {}),
        **(TUNED_REVIVAL.get(dataset, {}) if tuned else {}),
    }


def _chosen(name: str, value: str | None, choices: tuple[str, ...]) -> str:
    """One of some choices; the first where nothing is said."""
    if value is not None and value not in choices:
        raise ConfigError(name, value, f"must be one of {', '.join(choices)}")
    return value or choices[0]


def _shrink(
    values: dict[str, Any], known: dict[str, dataclasses.Field], cohort: bool
) -> dict[str, Any]:
    """Every sized field at most what `SMALL` says; a cohort gets time for its rounds."""

    def value(name):
        return values.get(name, known[name].default)

    caps = {**SMALL, "model_width": SMALL_WIDTH.get(value("model"), SMALL_IMAGE_WIDTH)}
    if cohort:
        caps["max_time"] = SMALL_TIME_OF_ROUNDS
    return {**values, **{name: min(value(name), cap) for name, cap in caps.items()}}


def resolve(
    dataset: str | None = None,
    method: str | None = None,
    preset_scale: str | None = None,
    preset_revival: str | None = None,
    **overrides: Any,
) -> Config:
    """The complete configuration of a run.

    Args:
      dataset, method: default to those of `Config`.
      preset_scale: `full`, the default, or `small`, which shrinks the preset.
      preset_revival: `tuned`, the default, or `published`, the form of the paper on data sets that
        it does not have, too.
      **overrides: fields of `Config`; None means the preset's value.

    Raises:
      ConfigError: a value is not allowed; the message names flag, value and what is.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    known = {field.name: field for field in dataclasses.fields(Config)}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(unknown[0], None, "there is no such field")
    scale = _chosen("preset_scale", preset_scale, SCALES)
    revival = _chosen("preset_revival", preset_revival, REVIVALS)
    dataset = Config.dataset if dataset is None else dataset
    method = Config.method if method is None else method
    preset = _preset(dataset, method, revival)
    step_field = METHODS[method].step_field if method in METHODS else ""
    step_method = given.get(step_field, known[step_field].default) if step_field else method
    if step_field and step_method != known[step_field].default:
        # The step is another method's, and so are its buffer, its rate and its staleness weight.
        base = _preset(dataset, step_method, revival)
        preset = {field: value for field, value in preset.items() if field not in BASE_FIELDS}
        preset.update({field: base[field] for field in BASE_FIELDS if field in base})
    if dataset in PAPER and given.get("delays") == "shifted":
        preset.update(SHIFTED)
    cohort = step_method in METHODS and METHODS[step_method].cohort
    if scale == "small":
        preset = _shrink(preset, known, cohort)
    values = {**preset, **given, "dataset": dataset, "method": method}
    if cohort:
        # A synchronous cohort: everybody who works is waited for.
        all_of_them = values.get("concurrency", known["concurrency"].default)
        together = {"buffer_size": all_of_them, "open_slots": all_of_them}
        values = {**values, **together, **given}
    config = Config(**values)
    if dataset in PAPER or "eval_every" in given:
        return config
    # Versions of B arrivals: all methods are evaluated about equally often in simulated time.
    often = max(1, config.eval_every // config.buffer_size)
    return dataclasses.replace(config, eval_every=often)
