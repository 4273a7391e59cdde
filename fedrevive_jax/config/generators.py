"""The parts of a configuration that are about generators: FedGen's, and data-free distillation."""

from dataclasses import dataclass

from fedrevive_jax.config.fields import Part, setting
from fedrevive_jax.errors import ConfigError


@dataclass(frozen=True)
class FedGen(Part):
    """FedGen: a generator of features, and how clients are regularised by it."""

    fedgen_on: str = setting(
        "fedavg",
        "the method whose step fedgen takes, in its rounds or asynchronously; the preset's buffer, "
        "rate and staleness weight are that method's",
        choices=("fedavg", "fedbuff", "fedasync", "fadas"),
    )
    fedgen_alpha: float = setting(
        10.0, "alpha of fedgen, weight of the clients' loss on made features", at_least=0
    )
    fedgen_beta: float = setting(
        10.0, "beta of fedgen, weight of the divergence from answers to made features", at_least=0
    )
    fedgen_decay: float = setting(
        0.98,
        "factor of these weights and of `fedgen_lr` at each training of fedgen's generator",
        above=0,
        at_most=1,
    )
    fedgen_local_steps: int = setting(
        20, "first steps of a job that fedgen regularises", at_least=0
    )
    fedgen_batch: int = setting(
        32, "features that fedgen makes in a step of clients and server", at_least=2
    )
    fedgen_interval: int = setting(
        0,
        "versions between two trainings of fedgen's generator; 0: as many as K arrivals make, that "
        "is one with fedavg",
        at_least=0,
    )
    fedgen_steps: int = setting(
        50,
        "steps of one training of fedgen's generator; 0 is the control, which makes features that "
        "mean nothing",
        at_least=0,
    )
    fedgen_lr: float = setting(3e-4, "rate of fedgen's generator", above=0)
    fedgen_weight_decay: float = setting(
        1e-2, "L2 weight decay added to the gradient of fedgen's generator", at_least=0
    )
    fedgen_noise: int = setting(32, "size of the noise of fedgen's generator", at_least=1)
    fedgen_hidden: int = setting(256, "hidden units of fedgen's generator", at_least=1)
    fedgen_student: float = setting(
        0.0, "weight of fedgen's adversarial loss, by which the global head disagrees", at_least=0
    )
    fedgen_diversity: float = setting(1.0, "eta of fedgen, weight of diversity", at_least=0)


@dataclass(frozen=True)
class Dfkd(Part):
    """Data-free knowledge distillation: teachers, synthesis, pool, distillation."""

    num_teachers: int = setting(8, "c, most recent uploads that teach", at_least=1)
    samples: str = setting(
        "generator",
        "what the teachers are asked about; noise and real are the controls: uniform noise, what "
        "the generator is worth beside; held-out samples with their labels, what it could be",
        choices=("generator", "noise", "real"),
    )
    proxy: str = setting(
        "estimated",
        "class mix of a client; estimated: what its first two models say of noise; change: what "
        "all its jobs changed in that; histogram: of its true labels",
        choices=("estimated", "change", "histogram"),
    )
    proxy_samples: int = setting(64, "Gaussian inputs of one probe", at_least=1)
    proxy_temperature: float = setting(0.8, "T_probe", above=0)
    seed_text: str = setting(
        "",
        "JSONL file (label, text) that text synthesis starts from; empty: random tokens",
        path=True,
    )
    generation_interval: int = setting(
        10, "T_gen, versions between two generator updates", at_least=1
    )
    synthesis_steps: int = setting(2, "K_synth, inner steps of one synthesis", at_least=1)
    synthesis_batch: int = setting(64, "images made by one synthesis", at_least=1)
    latent_size: int = setting(256, "size of z and of a class embedding", at_least=1)
    generator_features: int = setting(128, "f, channels of the generator", at_least=1)
    generator_lr: float = setting(3e-3, "lr_g, rate of the generator and its meta-step", above=0)
    latent_lr: float = setting(1e-3, "lr_z, rate of z and of the class embeddings", above=0)
    feature_weight: float = setting(3e-3, "bn, weight of the feature statistics loss", at_least=0)
    one_hot_weight: float = setting(1.0, "oh, weight of the cross-entropy loss", at_least=0)
    adversarial_weight: float = setting(0.1, "adv, weight of the adversarial loss", at_least=0)
    meta: str = setting(
        "reptile", "meta-step of the generator", choices=("reptile", "fomaml", "maml")
    )
    judges: str = setting(
        "all",
        "who judges a synthetic sample; all: every teacher, weighted by how well its client knows "
        "the class; own: the one teacher from whose client's mix the class was drawn",
        choices=("all", "own"),
    )
    loss_guard: str = setting(
        "published",
        "a loss term above 3 times the mean of its last values counts as zero; published: such a "
        "value is not kept, so that a term whose level has risen stays off; per_step: it is, cut "
        "to the limit, and a step is compared with the same step of earlier syntheses or "
        "distillations; off: only what is not finite counts as zero",
        choices=("published", "per_step", "off"),
    )
    target_sampling: str = setting(
        "teachers", "classes to synthesise: mean of the teachers' mixes, or uniform",
        choices=("teachers", "uniform"),
    )  # fmt: skip
    pool_size: int = setting(16_000, "images in the first-in first-out pool", at_least=1)
    distillation_steps: int = setting(10, "K_KD, student steps at one arrival", at_least=1)
    distillation_batch: int = setting(32, "images per teacher and student step", at_least=1)
    teacher_batch: int = setting(
        0, "teachers whose images pass through the student in one call, a divisor of "
        "`num_teachers`; 0: few on CPU, all elsewhere", at_least=0,
    )  # fmt: skip
    distillation_lr: float = setting(1e-4, "lr_kd, rate of the student", above=0)
    distillation_temperature: float = setting(1.0, "temperature of the distillation", above=0)
    distillation_weight_decay: float = setting(
        1e-5, "L2 weight decay added to the student's gradient", at_least=0
    )
    freeze_versions: int = setting(50, "versions before the first synthesis", at_least=0)
    warmup_versions: int = setting(
        100, "versions up to which uploads go in unblended and L_adv is off", at_least=0
    )
    warmup_blend: str = setting(
        "plain",
        "what goes in between `freeze_versions` and the end of the warm-up; plain: the raw update; "
        "zero: a blend with a distilled update of zero, as in the authors' code",
        choices=("plain", "zero"),
    )
    adversarial_start: str = setting(
        "versions",
        "what `warmup_versions` counts for L_adv; syntheses: as in the authors' code",
        choices=("versions", "syntheses"),
    )

    @property
    def judges_of_a_sample(self) -> int:
        """How many teachers judge each synthetic sample."""
        return 1 if self.judges == "own" else self.num_teachers

    @property
    def samples_made(self) -> int:
        """Samples of one synthesis: `synthesis_batch`, or the most below it of which all teachers
        have as many."""
        if self.judges == "own":
            return self.synthesis_batch // self.num_teachers * self.num_teachers
        return self.synthesis_batch

    def _check(self) -> None:
        if self.teacher_batch and self.num_teachers % self.teacher_batch:
            raise ConfigError(
                "teacher_batch", self.teacher_batch, f"must divide num_teachers={self.num_teachers}"
            )
        if self.judges == "own" and self.target_sampling != "teachers":
            raise ConfigError(
                "target_sampling",
                self.target_sampling,
                "must be teachers with judges=own, each of which draws from its own mix",
            )
        if not self.samples_made:
            raise ConfigError(
                "synthesis_batch",
                self.synthesis_batch,
                f"must be at least num_teachers={self.num_teachers} with judges=own",
            )
        if self.pool_size < self.synthesis_batch:
            raise ConfigError(
                "pool_size",
                self.pool_size,
                f"must be at least synthesis_batch={self.synthesis_batch}",
            )
