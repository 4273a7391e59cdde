"""The one configuration of a run: frozen, validated, one field per command-line flag.

The metadata of a field is the single source for its flag's help text and for what values are
allowed. A `Config` is always complete; `fedrevive_jax.presets.resolve` fills in what a user left
open from the preset of (dataset, method).
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrevive_jax.errors import ConfigError

# The comparison of arXiv 2511.00655, and methods of other papers.
PUBLISHED_METHODS = ("fedavg", "fedbuff", "afl_dw", "fedrevive", "dd_fedrevive")
METHODS = (*PUBLISHED_METHODS, "fedasync", "ca2fl", "fadas", "fedstale", "ace", "fedfa")
# Those that distil teachers into the global model.
REVIVING = ("fedrevive", "dd_fedrevive")
DATASETS = (
    "digits", "fashion_mnist", "cifar10", "cifar100", "femnist", "newsgroups", "image_folder",
    "text_folder", "custom",
)  # fmt: skip  # custom: given from Python, see runner.run
MODELS = ("digitsnet", "convnet", "resnet18", "t5", "custom")
BETA_SHAPES = ("cosine", "constant", "linear", "exponential", "stepwise")
SERVER_OPTIMIZERS = (
    "sgd", "momentum", "adam", "adagrad", "yogi", "amsgrad", "rmsprop", "adabelief", "lion",
)  # fmt: skip
STALENESS_WEIGHTS = ("none", "sqrt", "polynomial", "hinge", "beta")
FAULTS = ("lost", "late", "nan")
DELAYS = (
    "default", "shifted", "constant", "exponential", "uniform", "lognormal", "halfnormal", "trace",
)  # fmt: skip


def _field(default: Any, help_text: str, **limits: Any) -> Any:
    """A field with its help text and limits: `choices`, `at_least`, `above`, `at_most`, `below`."""
    return dataclasses.field(default=default, metadata={"help": help_text, **limits})


@dataclass(frozen=True)
class Config:
    """Everything that determines a run, and where it is written.

    Symbols of the paper stand in the help texts. Times are in simulated units, rates are per step.

    Raises:
      ConfigError: when a value is outside its limits or two values contradict each other.
    """

    # What is run
    dataset: str = _field("digits", "data set", choices=DATASETS)
    method: str = _field("fedrevive", "federated method", choices=METHODS)
    model: str = _field("digitsnet", "model of clients and server", choices=MODELS)
    seed: int = _field(0, "seed of every random draw of the run", at_least=0)
    workdir: str = _field("", "folder for the record of the run; empty: runs/DATASET_METHOD_seedN")
    data_dir: str = _field("", "folder that holds the data set's files; bundled data need none")
    model_width: int = _field(
        32, "channels of the model's first convolution; states of the t5 encoder", at_least=1
    )
    model_layers: int = _field(6, "layers of the t5 encoder", at_least=2)
    model_heads: int = _field(8, "attention heads of the t5 encoder", at_least=1)
    vocabulary_size: int = _field(32_128, "rows of the t5 encoder's token table", at_least=8)
    text_length: int = _field(128, "tokens that a text is cut to", at_least=8)
    t5_weights: str = _field(
        "",
        "folder with a pretrained T5 (model.safetensors, config.json, tokenizer), whose sizes then "
        "hold; empty: a random start, and a tokenizer trained on the training split",
    )
    pretrained: str = _field("", "folder of an earlier run whose newest model this run starts from")
    seed_text: str = _field(
        "", "JSONL file (label, text) that text synthesis starts from; empty: random tokens"
    )
    convolution: str = _field(
        "auto",
        "how convolutions are computed: auto picks mixed on CPU, lax elsewhere",
        choices=("auto", "lax", "patches", "shifted", "mixed"),
    )
    precision: str = _field(
        "auto",
        "arithmetic of the models; parameters, statistics, losses and optimisers are in float32 "
        "throughout; auto picks float32 on CPU, bfloat16 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )

    mesh: str = _field(
        "0",
        "devices that compute together: a number, or auto for all there are; 0 or 1: one. "
        "`client_batch` is for each of them",
    )

    # The simulated world
    max_time: float = _field(40.0, "simulated time at which the run stops", above=0)
    max_versions: int = _field(50_000, "global versions at which the run stops", at_least=1)
    num_clients: int = _field(100, "N, clients in the population", at_least=1, at_most=1_000_000)
    concurrency: int = _field(20, "K, clients that work at the same time", at_least=1)
    buffer_size: int = _field(1, "B, arrivals that make one new global version", at_least=1)
    open_slots: int = _field(
        1, "free slots at which new jobs are handed out: 1 asynchronous, K synchronous", at_least=1
    )
    delays: str = _field("default", "law of the durations of a job", choices=DELAYS)
    delay_mean: float = _field(
        1.3, "mean training time of the constant ... halfnormal delays", above=0
    )
    delay_spread: float = _field(
        0.5, "half-width of uniform delays, sigma of lognormal ones", at_least=0
    )
    delay_download: float = _field(0.1, "download time of the constant ... delays", at_least=0)
    delay_upload: float = _field(0.2, "upload time of the constant ... delays", at_least=0)
    delay_trace: str = _field("", "CSV file of measured durations, for delays=trace")
    fault_rate: float = _field(
        0.0, "share of the jobs that fail, drawn from `fault_kinds`", at_least=0, at_most=1
    )
    fault_kinds: str = _field(
        ",".join(FAULTS),
        f"how jobs fail, some of {','.join(FAULTS)}: the upload never comes, takes five times the "
        "job's duration, or is not finite",
    )

    # Clients and their data
    partition: str = _field(
        "dirichlet",
        "how data are handed to clients; natural: one client per group of the data set",
        choices=("dirichlet", "iid", "natural"),
    )
    alpha: float = _field(0.5, "concentration of the Dirichlet class mixes", above=0)
    samples_per_client: int = _field(350, "samples each client holds", at_least=1)
    local_iterations: int = _field(25, "training steps of one job", at_least=1)
    batch_size: int = _field(32, "samples of one training step", at_least=1)
    client_lr: float = _field(3e-4, "rate of the clients' Adam", above=0)
    client_batch: int = _field(
        0,
        "jobs trained at once in one call of a device; 0: 1 or 2 on CPU, elsewhere what fits",
        at_least=0,
    )
    version_memory: str = _field(
        "auto",
        "where stale versions and uploads wait; auto: on the device while it has room",
        choices=("auto", "device", "host"),
    )
    window_limit: int = _field(
        0, "most jobs trained ahead together; 0: all that can be, 1: one at a time", at_least=0
    )

    # Server
    server_lr: float = _field(0.1, "eta_s, rate of the server's step", above=0)
    server_optimizer: str = _field("sgd", "optimiser of the server", choices=SERVER_OPTIMIZERS)
    staleness_weight: str = _field(
        "none",
        "s(tau), weight of an update; sqrt: 1 / sqrt(1 + tau), polynomial: (1 + tau)^-a, hinge: 1 "
        "up to tau = b, then 1 / (a (tau - b) + 1), beta: 1 - beta(tau)",
        choices=STALENESS_WEIGHTS,
    )
    staleness_exponent: float = _field(0.5, "a of the polynomial staleness weight", at_least=0)
    hinge_slope: float = _field(10.0, "a of the hinge staleness weight", at_least=0)
    hinge_start: float = _field(4.0, "b of the hinge staleness weight, in versions", at_least=0)
    revive_on: str = _field(
        "fedbuff",
        "the method whose step takes the updates that fedrevive and dd_fedrevive have revived; the "
        "preset's buffer, rate and staleness weight are that method's",
        choices=("fedbuff", "fedasync", "fadas"),
    )
    fedasync_form: str = _field(
        "mixing",
        "fedasync mixes the client's model into the global one, or adds its delta",
        choices=("mixing", "delta"),
    )
    fadas_beta1: float = _field(0.9, "beta_1 of fadas", at_least=0, below=1)
    fadas_beta2: float = _field(0.99, "beta_2 of fadas", at_least=0, below=1)
    fadas_epsilon: float = _field(1e-8, "epsilon of fadas", above=0)
    fadas_bias_correction: str = _field(
        "off",
        "Adam's bias correction in fadas: on as in its authors' code, off as in the paper",
        choices=("off", "on"),
    )
    fadas_delay_rule: str = _field(
        "paper",
        "rate of fadas if tau_max > tau_c; paper: min(eta_s, 1 / tau_max), code: eta_s / tau_max",
        choices=("none", "paper", "code"),
    )
    fadas_patience: float = _field(1.0, "tau_c of fadas, in versions", at_least=0)
    fedstale_beta: float = _field(
        0.5, "beta of fedstale: 0 plain averaging, 1 variance-reduced", at_least=0, at_most=1
    )
    fedfa_queue: int = _field(10, "k, recent client models that fedfa averages", at_least=1)
    cache_memory: str = _field(
        "device",
        "where the last update of every client lives, for ca2fl, fedstale and ace",
        choices=("device", "host", "disk"),
    )
    cache_dtype: str = _field(
        "float32", "numbers in which it is kept", choices=("float32", "bfloat16")
    )
    cache_dir: str = _field(
        "", "folder for the file of cache_memory=disk; empty: the system's temporary folder"
    )
    max_update_norm: float = _field(
        0.0, "largest L2 norm of an update that is taken in; 0: any finite norm", at_least=0
    )
    reject_limit: float = _field(
        0.5,
        "the run stops when more than this share of the last 100 uploads was rejected; 1: never",
        at_least=0,
        at_most=1,
    )
    beta_shape: str = _field("cosine", "blending weight over staleness", choices=BETA_SHAPES)
    beta_s_max: float = _field(
        75.0, "s_max of the cosine: beta = 1/2 at s_max; goes with K / B", above=0
    )
    beta_constant: float = _field(0.5, "beta of the constant shape", at_least=0, at_most=1)
    beta_rate: float = _field(0.005, "gamma (linear) or lambda (exponential) of beta", at_least=0)

    # Data-free knowledge distillation
    num_teachers: int = _field(8, "c, most recent uploads that teach", at_least=1)
    proxy: str = _field(
        "estimated", "class mix of a client: probed, or its true labels",
        choices=("estimated", "histogram"),
    )  # fmt: skip
    proxy_samples: int = _field(64, "Gaussian inputs of one probe", at_least=1)
    proxy_temperature: float = _field(0.8, "T_probe", above=0)
    generation_interval: int = _field(
        10, "T_gen, versions between two generator updates", at_least=1
    )
    synthesis_steps: int = _field(2, "K_synth, inner steps of one synthesis", at_least=1)
    synthesis_batch: int = _field(64, "images made by one synthesis", at_least=1)
    latent_size: int = _field(256, "size of z and of a class embedding", at_least=1)
    generator_features: int = _field(128, "f, channels of the generator", at_least=1)
    generator_lr: float = _field(3e-3, "lr_g, rate of the generator and its meta-step", above=0)
    latent_lr: float = _field(1e-3, "lr_z, rate of z and of the class embeddings", above=0)
    feature_weight: float = _field(3e-3, "bn, weight of the feature statistics loss", at_least=0)
    one_hot_weight: float = _field(1.0, "oh, weight of the cross-entropy loss", at_least=0)
    adversarial_weight: float = _field(0.1, "adv, weight of the adversarial loss", at_least=0)
    meta: str = _field(
        "reptile", "meta-step of the generator", choices=("reptile", "fomaml", "maml")
    )
    loss_guard: str = _field(
        "published",
        "a loss term above 3 times its mean counts as zero; published: such a value is not kept, "
        "so that a term whose level has risen stays off; following: it is, cut to the limit, and "
        "the mean follows the new level",
        choices=("published", "following"),
    )
    target_sampling: str = _field(
        "teachers", "classes to synthesise: mean of the teachers' mixes, or uniform",
        choices=("teachers", "uniform"),
    )  # fmt: skip
    pool_size: int = _field(16_000, "images in the first-in first-out pool", at_least=1)
    distillation_steps: int = _field(10, "K_KD, student steps at one arrival", at_least=1)
    distillation_batch: int = _field(32, "images per teacher and student step", at_least=1)
    teacher_batch: int = _field(
        0, "teachers whose images pass through the student in one call, a divisor of "
        "`num_teachers`; 0: few on CPU, all elsewhere", at_least=0,
    )  # fmt: skip
    distillation_lr: float = _field(1e-4, "lr_kd, rate of the student", above=0)
    distillation_temperature: float = _field(1.0, "temperature of the distillation", above=0)
    distillation_weight_decay: float = _field(
        1e-5, "L2 weight decay added to the student's gradient", at_least=0
    )
    freeze_versions: int = _field(50, "versions before the first synthesis", at_least=0)
    warmup_versions: int = _field(
        100, "versions up to which uploads go in unblended and L_adv is off", at_least=0
    )

    # The record
    eval_every: int = _field(10, "versions between two evaluations", at_least=1)
    eval_split: str = _field("test", "split that is evaluated", choices=("test", "validation"))
    eval_batch: int = _field(512, "samples of one evaluation call", at_least=1)
    checkpoint_every: int = _field(
        200, "versions between two checkpoints; one more is written at the end", at_least=1
    )
    checkpoint_keep: int = _field(2, "newest checkpoints that are kept", at_least=1)
    checkpoint_mode: str = _field(
        "exact",
        "exact: continue bit for bit; params: smaller checkpoints without stale versions and "
        "uploads under way, whose jobs start again from the newest version",
        choices=("exact", "params"),
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name in (*LOCATION_FIELDS, *INPUT_FIELDS):
            if getattr(self, name):
                object.__setattr__(self, name, without_tilde(name, getattr(self, name)))
        if self.mesh != "auto" and not self.mesh.isdecimal():
            raise ConfigError("mesh", self.mesh, "must be auto or a whole number of devices")
        if self.t5_weights and self.model != "t5":
            raise ConfigError(
                "t5_weights", self.t5_weights, f"needs model=t5, not model={self.model}"
            )
        if self.pretrained and self.model == "t5":
            raise ConfigError(
                "pretrained",
                self.pretrained,
                "starts models of images; a model of text can start from `t5_weights`",
            )
        if self.concurrency > self.num_clients:
            raise ConfigError(
                "concurrency",
                self.concurrency,
                f"must be at most num_clients="
                f"{self.num_clients} (K clients out of N work at the same time)",
            )
        if self.open_slots > self.concurrency:
            raise ConfigError(
                "open_slots", self.open_slots, f"must be at most concurrency={self.concurrency}"
            )
        for name in ("buffer_size", "open_slots") if self.method == "fedavg" else ():
            if getattr(self, name) != self.concurrency:
                raise ConfigError(
                    name,
                    getattr(self, name),
                    f"must be concurrency={self.concurrency} "
                    "with method=fedavg, whose round waits for all; method=fedbuff takes others",
                )
        if self.warmup_versions < self.freeze_versions:
            raise ConfigError(
                "warmup_versions",
                self.warmup_versions,
                f"must be at least freeze_versions="
                f"{self.freeze_versions} (distillation needs a synthesised pool)",
            )
        if self.teacher_batch and self.num_teachers % self.teacher_batch:
            raise ConfigError(
                "teacher_batch",
                self.teacher_batch,
                f"must divide num_teachers={self.num_teachers}",
            )
        if self.pool_size < self.synthesis_batch:
            raise ConfigError(
                "pool_size",
                self.pool_size,
                f"must be at least synthesis_batch={self.synthesis_batch}",
            )
        if self.model == "t5" and not self.t5_weights and self.model_width % self.model_heads:
            raise ConfigError(
                "model_heads", self.model_heads, f"must divide model_width={self.model_width}"
            )
        if self.staleness_weight != "none" and self.method in ("afl_dw", "fedfa"):
            raise ConfigError(
                "staleness_weight",
                self.staleness_weight,
                f"must be none with method="
                f"{self.method}, which "
                + ("weighs by beta" if self.method == "afl_dw" else "averages whole models"),
            )
        if self.step_method == "fadas" and self.server_optimizer != "sgd":
            raise ConfigError(
                "server_optimizer",
                self.server_optimizer,
                "must be left out with fadas, which is an optimiser of its own",
            )
        if self.delays == "uniform" and self.delay_spread >= self.delay_mean:
            raise ConfigError(
                "delay_spread",
                self.delay_spread,
                f"must be below delay_mean={self.delay_mean} (a training time is positive)",
            )
        kinds = self.fault_kinds.split(",")
        if len(set(kinds)) < len(kinds) or not set(kinds) <= set(FAULTS):
            raise ConfigError(
                "fault_kinds",
                self.fault_kinds,
                f"must be some of {','.join(FAULTS)}, each once, separated by commas",
            )
        if self.delays == "trace" and not self.delay_trace:
            raise ConfigError("delay_trace", "", "must name a CSV file with delays=trace")

    @property
    def step_method(self) -> str:
        """The method whose server step is taken; fedrevive revives what another method takes."""
        return self.revive_on if self.method in REVIVING else self.method

    @property
    def run_dir(self) -> Path:
        """The folder for the record of this run."""
        return Path(self.workdir or f"runs/{self.dataset}_{self.method}_seed{self.seed}")

    @property
    def data_place(self) -> Path | None:
        """The folder that says which data these are; None where the data set's name says it."""
        return Path(self.data_dir).absolute() if self.dataset in FOLDER_DATASETS else None

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# Data sets that are whatever their folder holds.
FOLDER_DATASETS = ("image_folder", "text_folder")
# Where a run is written and where its data lie do not change what it computes.
LOCATION_FIELDS = ("workdir", "data_dir", "cache_dir")
# Nor do the devices, up to the rounding of sums.
DEVICE_FIELDS = ("mesh", "version_memory")
# Files and folders that a run reads beside its data; recorded with their whole path.
INPUT_FIELDS = ("t5_weights", "pretrained", "seed_text", "delay_trace")


# Limits of a number and their words.
LIMITS = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value as the field's type, or an error that names flag, value and what is allowed."""
    limits = field.metadata
    bounds = [f"{words} {limits[name]}" for name, words in LIMITS.items() if name in limits]

    def refused(*allowed: str, joined: str = ", ") -> ConfigError:
        return ConfigError(field.name, _shown(value), f"must be {joined.join(allowed)}")

    try:
        result = field.type(value)
        if isinstance(value, bool) or (field.type is int and float(value) != result):
            raise ValueError  # int(0.5) would pass silently
    except (TypeError, ValueError, OverflowError):
        kind = {int: "a whole number", float: "a number", str: "a text"}[field.type]
        raise refused(kind, *bounds) from None
    if field.type is int and abs(result) >= 2**31:
        raise refused(f"below {2**31}", *bounds)
    if field.type is float and not math.isfinite(result):
        raise refused("finite", *bounds)
    if "choices" in limits and result not in limits["choices"]:
        raise refused("one of " + ", ".join(limits["choices"]))
    if field.type is str and not all(c.isprintable() or ord(c) > 127 for c in result):
        raise refused("a text without control characters")  # no file has such a name
    if not (
        result >= limits.get("at_least", result)
        and ("above" not in limits or result > limits["above"])
        and result <= limits.get("at_most", result)
        and ("below" not in limits or result < limits["below"])
    ):
        raise refused(*bounds, joined=" and ")
    return result


def without_tilde(name: str, path: str) -> str:
    """The path that a flag gives, with the home of a user in the place of `~`.

    Raises:
      ConfigError: there is no such user.
    """
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ConfigError(name, path, "must not name the home of an unknown user") from None


def _shown(value: Any, limit: int = 100) -> str:
    """A value in the one line of a message."""
    text = str(value)
    printable = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return printable + ("..." if len(text) > limit else "")
