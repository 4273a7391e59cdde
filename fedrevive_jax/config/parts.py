"""The parts of a configuration; each field is one command-line flag.

Symbols of the paper stand in the help texts. Each part is a frozen dataclass of its own, so that
code which reads one part asks for no more, and `Config` is all of them.
"""

from dataclasses import dataclass

from fedrevive_jax.config.fields import Part, setting
from fedrevive_jax.config.traits import METHODS, Traits
from fedrevive_jax.errors import ConfigError

DATASETS = (
    "digits", "fashion_mnist", "cifar10", "cifar100", "femnist", "newsgroups", "image_folder",
    "text_folder", "custom",
)  # fmt: skip  # custom: given to `run` from Python
MODELS = ("digitsnet", "convnet", "resnet18", "t5", "custom")
BETA_SHAPES = ("cosine", "constant", "linear", "exponential", "stepwise")
SERVER_OPTIMIZERS = (
    "sgd", "momentum", "adam", "adagrad", "yogi", "amsgrad", "rmsprop", "adabelief", "lion",
)  # fmt: skip
STALENESS_WEIGHTS = ("none", "sqrt", "polynomial", "hinge", "beta")
FAULTS = ("lost", "late", "nan")
TRACKERS = ("tensorboard", "wandb", "mlflow")
DELAYS = (
    "default", "shifted", "constant", "exponential", "uniform", "lognormal", "halfnormal", "trace",
)  # fmt: skip
# Of lognormal delays. With more, nearly all durations are 0, and no sample shows their mean.
MOST_SIGMA = 10.0


@dataclass(frozen=True)
class World(Part):
    """The simulated world: who works when. Times are in simulated units."""

    seed: int = setting(0, "seed of every random draw of the run", at_least=0)
    max_time: float = setting(40.0, "simulated time at which the run stops", above=0)
    max_versions: int = setting(50_000, "global versions at which the run stops", at_least=1)
    num_clients: int = setting(100, "N, clients in the population", at_least=1, at_most=1_000_000)
    concurrency: int = setting(20, "K, clients that work at the same time", at_least=1)
    buffer_size: int = setting(1, "B, arrivals that make one new global version", at_least=1)
    open_slots: int = setting(
        1, "free slots at which new jobs are handed out: 1 asynchronous, K synchronous", at_least=1
    )
    delays: str = setting("default", "law of the durations of a job", choices=DELAYS)
    delay_mean: float = setting(
        1.3, "mean training time of the constant ... halfnormal delays", above=0
    )
    delay_spread: float = setting(
        0.5, "half-width of uniform delays, sigma of lognormal ones", at_least=0
    )
    delay_download: float = setting(0.1, "download time of the constant ... delays", at_least=0)
    delay_upload: float = setting(0.2, "upload time of the constant ... delays", at_least=0)
    delay_trace: str = setting("", "CSV file of measured durations, for delays=trace", path=True)
    fault_rate: float = setting(
        0.0, "share of the jobs that fail, drawn from `fault_kinds`", at_least=0, at_most=1
    )
    fault_kinds: str = setting(
        ",".join(FAULTS),
        f"how jobs fail, some of {','.join(FAULTS)}: the upload never comes, takes five times the "
        "job's duration, or is not finite",
    )

    def _check(self) -> None:
        if self.concurrency > self.num_clients:
            raise ConfigError(
                "concurrency",
                self.concurrency,
                f"must be at most num_clients={self.num_clients} (K clients out of N work at the "
                "same time)",
            )
        if self.open_slots > self.concurrency:
            raise ConfigError(
                "open_slots", self.open_slots, f"must be at most concurrency={self.concurrency}"
            )
        if self.delays == "uniform" and self.delay_spread >= self.delay_mean:
            raise ConfigError(
                "delay_spread",
                self.delay_spread,
                f"must be below delay_mean={self.delay_mean} (a training time is positive)",
            )
        if self.delays == "lognormal" and self.delay_spread > MOST_SIGMA:
            raise ConfigError(
                "delay_spread",
                self.delay_spread,
                f"must be at most {MOST_SIGMA} (nearly all durations would be 0)",
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


@dataclass(frozen=True)
class Clients(Part):
    """The clients: their data, their model and their training. Rates are per step."""

    dataset: str = setting("digits", "data set", choices=DATASETS)
    data_dir: str = setting(
        "",
        "folder that holds the data set's files; bundled data need none",
        path=True,
        bucket=True,
    )
    text_length: int = setting(128, "tokens that a text is cut to", at_least=8)
    model: str = setting("digitsnet", "model of clients and server", choices=MODELS)
    model_width: int = setting(
        32, "channels of the model's first convolution; states of the t5 encoder", at_least=1
    )
    model_layers: int = setting(6, "layers of the t5 encoder", at_least=2)
    model_heads: int = setting(8, "attention heads of the t5 encoder", at_least=1)
    vocabulary_size: int = setting(32_128, "rows of the t5 encoder's token table", at_least=8)
    t5_weights: str = setting(
        "",
        "folder with a pretrained T5 (model.safetensors, config.json, tokenizer), whose sizes then "
        "hold; empty: a random start, and a tokenizer trained on the training split",
        path=True,
    )
    pretrained: str = setting(
        "", "folder of an earlier run whose newest model this run starts from", path=True
    )
    partition: str = setting(
        "dirichlet",
        "how data are handed to clients; natural: one client per group of the data set",
        choices=("dirichlet", "iid", "natural"),
    )
    alpha: float = setting(0.5, "concentration of the Dirichlet class mixes", above=0)
    samples_per_client: int = setting(350, "samples each client holds", at_least=1)
    local_iterations: int = setting(25, "training steps of one job", at_least=1)
    batch_size: int = setting(32, "samples of one training step", at_least=1)
    client_lr: float = setting(3e-4, "rate of the clients' Adam", above=0)

    def _check(self) -> None:
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
        if self.model == "t5" and not self.t5_weights and self.model_width % self.model_heads:
            raise ConfigError(
                "model_heads", self.model_heads, f"must divide model_width={self.model_width}"
            )


@dataclass(frozen=True)
class Server(Part):
    """The server's method and what it takes in."""

    method: str = setting("fedrevive", "federated method", choices=tuple(METHODS))
    server_lr: float = setting(0.1, "eta_s, rate of the server's step", above=0)
    server_optimizer: str = setting("sgd", "optimiser of the server", choices=SERVER_OPTIMIZERS)
    staleness_weight: str = setting(
        "none",
        "s(tau), weight of an update; sqrt: 1 / sqrt(1 + tau), polynomial: (1 + tau)^-a, hinge: 1 "
        "up to tau = b, then 1 / (a (tau - b) + 1), beta: 1 - beta(tau)",
        choices=STALENESS_WEIGHTS,
    )
    staleness_exponent: float = setting(0.5, "a of the polynomial staleness weight", at_least=0)
    hinge_slope: float = setting(10.0, "a of the hinge staleness weight", at_least=0)
    hinge_start: float = setting(4.0, "b of the hinge staleness weight, in versions", at_least=0)
    revive_on: str = setting(
        "fedbuff",
        "the method whose step takes the updates that fedrevive and dd_fedrevive have revived; the "
        "preset's buffer, rate and staleness weight are that method's",
        choices=("fedbuff", "fedasync", "fadas"),
    )
    fedasync_form: str = setting(
        "mixing",
        "fedasync mixes the client's model into the global one, or adds its delta",
        choices=("mixing", "delta"),
    )
    fadas_beta1: float = setting(0.9, "beta_1 of fadas", at_least=0, below=1)
    fadas_beta2: float = setting(0.99, "beta_2 of fadas", at_least=0, below=1)
    fadas_epsilon: float = setting(1e-8, "epsilon of fadas", above=0)
    fadas_bias_correction: str = setting(
        "off",
        "Adam's bias correction in fadas: on as in its authors' code, off as in the paper",
        choices=("off", "on"),
    )
    fadas_delay_rule: str = setting(
        "paper",
        "rate of fadas if tau_max > tau_c; paper: min(eta_s, 1 / tau_max), code: eta_s / tau_max",
        choices=("none", "paper", "code"),
    )
    fadas_patience: float = setting(1.0, "tau_c of fadas, in versions", at_least=0)
    fedstale_beta: float = setting(
        0.5, "beta of fedstale: 0 plain averaging, 1 variance-reduced", at_least=0, at_most=1
    )
    fedfa_queue: int = setting(10, "k, recent client models that fedfa averages", at_least=1)
    cache_memory: str = setting(
        "device",
        "where the last update of every client lives, for ca2fl, fedstale and ace",
        choices=("device", "host", "disk"),
    )
    cache_dtype: str = setting(
        "float32", "numbers in which it is kept", choices=("float32", "bfloat16")
    )
    cache_dir: str = setting(
        "",
        "folder for the file of cache_memory=disk; empty: the system's temporary folder",
        path=True,
    )
    max_update_norm: float = setting(
        0.0, "largest L2 norm of an update that is taken in; 0: any finite norm", at_least=0
    )
    reject_limit: float = setting(
        0.5,
        "the run stops when more than this share of the last 100 uploads was rejected; 1: never",
        at_least=0,
        at_most=1,
    )
    beta_shape: str = setting("cosine", "blending weight over staleness", choices=BETA_SHAPES)
    beta_s_max: float = setting(
        75.0, "s_max of the cosine: beta = 1/2 at s_max; goes with K / B", above=0
    )
    beta_constant: float = setting(0.5, "beta of the constant shape", at_least=0, at_most=1)
    beta_rate: float = setting(0.005, "gamma (linear) or lambda (exponential) of beta", at_least=0)

    @property
    def traits(self) -> Traits:
        """What is known of the method."""
        return METHODS[self.method]

    @property
    def step_method(self) -> str:
        """The method whose server step is taken; some change what goes into another's."""
        return getattr(self, self.traits.step_field) if self.traits.step_field else self.method

    @property
    def cohort(self) -> bool:
        """Whether it takes synchronous rounds."""
        return METHODS[self.step_method].cohort

    def _check(self) -> None:
        for name in dict.fromkeys((self.method, self.step_method)):
            for field, (value, why) in METHODS[name].fixed.items():
                if getattr(self, field) != value:
                    raise ConfigError(
                        field, getattr(self, field), f"must be {value} with {name}: {why}"
                    )


@dataclass(frozen=True)
class Record(Part):
    """What a run writes, where and how often."""

    workdir: str = setting(
        "",
        "folder for the record of the run; empty: runs/DATASET_METHOD_seedN",
        path=True,
        bucket=True,
    )
    eval_every: int = setting(10, "versions between two evaluations", at_least=1)
    eval_interval: float = setting(
        0.0,
        "simulated time between two evaluations, each of the first version after it, instead of "
        "`eval_every`; 0: by versions",
        at_least=0,
    )
    eval_split: str = setting("test", "split that is evaluated", choices=("test", "validation"))
    eval_batch: int = setting(512, "samples of one evaluation call", at_least=1)
    checkpoint_every: int = setting(
        200, "versions between two checkpoints; one more is written at the end", at_least=1
    )
    checkpoint_keep: int = setting(2, "newest checkpoints that are kept", at_least=1)
    checkpoint_mode: str = setting(
        "exact",
        "exact: continue bit for bit; params: smaller checkpoints without stale versions and "
        "uploads under way, whose jobs start again from the newest version",
        choices=("exact", "params"),
    )
    trackers: str = setting(
        "tensorboard",
        "where the run can be followed beside its record, separated by commas: tensorboard, wandb, "
        "mlflow; empty: nowhere",
    )

    def _check(self) -> None:
        names = self.tracker_names
        if len(set(names)) < len(names) or not set(names) <= set(TRACKERS):
            raise ConfigError(
                "trackers", self.trackers, f"must be some of {', '.join(TRACKERS)}, each once"
            )

    @property
    def tracker_names(self) -> list[str]:
        """Those of `trackers`, in their order."""
        return [name.strip() for name in self.trackers.split(",")] if self.trackers else []


@dataclass(frozen=True)
class Device(Part):
    """How and on which devices a run computes."""

    convolution: str = setting(
        "auto",
        "how convolutions are computed: auto picks mixed on CPU, lax elsewhere",
        choices=("auto", "lax", "patches", "shifted", "mixed"),
    )
    precision: str = setting(
        "auto",
        "arithmetic of the models; parameters, statistics, losses and optimisers are in float32 "
        "throughout; auto picks float32 on CPU, bfloat16 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )
    mesh: str = setting(
        "0",
        "devices that compute together: a number, or auto for all there are; 0 or 1: one. "
        "`client_batch` is for each of them",
    )
    client_batch: int = setting(
        0,
        "jobs trained at once in one call of a device; 0: 1 or 2 on CPU, elsewhere what fits",
        at_least=0,
    )
    version_memory: str = setting(
        "auto",
        "where stale versions and uploads wait; auto: on the device while it has room",
        choices=("auto", "device", "host"),
    )
    window_limit: int = setting(
        0,
        "most jobs trained ahead together; 0: as many as a call takes, 1: one at a time",
        at_least=0,
    )

    def _check(self) -> None:
        if self.mesh != "auto" and not self.mesh.isdecimal():
            raise ConfigError("mesh", self.mesh, "must be auto or a whole number of devices")
