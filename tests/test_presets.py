"""The preset tables: the published constants cell by cell, precedence, and the small scale."""

import dataclasses

import pytest

from fedrevive_jax.config import METHODS, PUBLISHED_METHODS
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.presets import BY_DATASET, PAPER, SMALL, TUNED_REVIVAL, resolve

# The published table, typed from the paper's experiments; a row per constant. Columns: CIFAR-10,
# CIFAR-100, FEMNIST, 20 Newsgroups. A row of one method names it after a colon.
PUBLISHED = """
client_lr                               | 3e-4 | 3e-4 | 1e-3 | 1e-3
client_lr: dd_fedrevive                 | 3e-4 | 1e-4 | 1e-3 | 1e-3
client_lr: fedavg                       | 3e-4 | 3e-4 | 1e-3 | 3e-3
server_lr: fedavg                       | 1.4  | 1.4  | 1.4  | 1
server_lr: fedbuff                      | .05  | .1   | .025 | .1
server_lr: afl_dw                       | .1   | .1   | .05  | .1
server_lr: dd_fedrevive                 | .2   | .3   | .1   | .1
server_lr: fedrevive                    | .1   | .1   | .05  | .1
buffer_size                             | 1    | 1    | 1    | 1
buffer_size: fedbuff                    | 2    | 3    | 1    | 3
buffer_size: fedavg                     | 100  | 200  | 100  | 100
concurrency                             | 100  | 100  | 100  | 100
concurrency: fedavg                     | 100  | 200  | 100  | 100
distillation_lr                         | 1e-4 | 3e-5 | 1e-4 | 3e-4
distillation_lr: dd_fedrevive           | 3e-4 | 1e-4 | 3e-4 | 1e-4
distillation_temperature                | 1    | 1    | 1    | 1
distillation_temperature: dd_fedrevive  | 2    | 1    | 2    | 2
distillation_weight_decay               | 1e-5 | 1e-5 | 1e-5 | 1e-5
distillation_weight_decay: dd_fedrevive | 0    | 0    | 0    | 0
generator_lr                            | .003 | .003 | .01  | .01
latent_lr                               | .001 | .001 | .003 | .1
feature_weight                          | .003 | .0003| .3   | .0001
one_hot_weight                          | 1    | 1    | 1    | 1
adversarial_weight                      | .1   | .1   | .1   | .1
freeze_versions                         | 50   | 50   | 400  | 50
warmup_versions                         | 100  | 100  | 500  | 100
freeze_versions: dd_fedrevive           | 0    | 0    | 0    | 0
warmup_versions: dd_fedrevive           | 0    | 0    | 0    | 0
beta_shape                              | cosine | cosine | cosine | cosine
beta_s_max                              | 75   | 75   | 75   | 75
beta_shape: dd_fedrevive                | constant | constant | constant | constant
beta_constant: dd_fedrevive             | .5   | .5   | .5   | .5
proxy_temperature                       | .8   | .8   | .8   | .8
eval_every                              | 10   | 10   | 10   | 10
eval_every: fedavg                      | 1    | 1    | 1    | 1
num_clients                             | 1000 | 1000 | 1000 | 1000
samples_per_client                      | 350  | 350  | 350  | 350
alpha                                   | .5   | .5   | .5   | .5
local_iterations                        | 25   | 25   | 25   | 25
batch_size                              | 32   | 32   | 32   | 32
num_teachers                            | 8    | 8    | 8    | 8
proxy_samples                           | 64   | 64   | 64   | 64
generation_interval                     | 10   | 10   | 10   | 10
synthesis_steps                         | 2    | 2    | 2    | 2
synthesis_batch                         | 64   | 64   | 64   | 64
latent_size                             | 256  | 256  | 256  | 256
generator_features                      | 128  | 128  | 128  | 128
pool_size                               | 16000 | 16000 | 16000 | 16000
distillation_steps                      | 10   | 10   | 10   | 10
distillation_batch                      | 32   | 32   | 32   | 32
seed                                    | 10   | 10   | 10   | 10
max_versions                            | 50000 | 50000 | 50000 | 50000
max_time                                | 200  | 200  | 200  | 200
delays                                  | default | default | default | default
model                                   | resnet18 | resnet18 | convnet | t5
model_width                             | 64   | 64   | 64   | 512
partition                               | dirichlet | dirichlet | natural | dirichlet
meta                                    | reptile | reptile | reptile | reptile
proxy                                   | estimated | estimated | estimated | estimated
proxy: dd_fedrevive                     | histogram | histogram | histogram | histogram
loss_guard                              | published | published | published | published
loss_guard: dd_fedrevive                | off | off | off | off
target_sampling                         | teachers | teachers | teachers | teachers
"""


def published(method):
    """(field, data set) -> the published cell for a method."""
    cells = {}
    for line in PUBLISHED.strip().splitlines():
        head, *columns = (part.strip() for part in line.split("|"))
        field, _, only = (part.strip() for part in head.partition(":"))
        if only in ("", method):  # a method's own row comes after the common one
            cells.update({(field, name): cell for name, cell in zip(PAPER, columns, strict=True)})
    return cells


@pytest.mark.parametrize("method", PUBLISHED_METHODS)
def test_published_cells(method):
    cells = published(method)
    assert len(cells) >= 4 * 43
    configs = {dataset: resolve(dataset, method).as_dict() for dataset in PAPER}
    for (field, dataset), cell in cells.items():
        value = configs[dataset][field]
        assert value == type(value)(cell), (field, dataset, value, cell)


def test_what_the_table_leaves_open_is_the_users():
    assert resolve("cifar10", "fedbuff", buffer_size=5, server_lr="0.3").buffer_size == 5
    cohort = resolve("cifar100", "fedavg", concurrency=7)
    assert (cohort.buffer_size, cohort.open_slots) == (7, 7)


@pytest.mark.parametrize("dataset", sorted(set(BY_DATASET)))
@pytest.mark.parametrize("method", METHODS)
def test_small_never_exceeds_full_and_keeps_what_is_no_size(dataset, method):
    full, small = resolve(dataset, method), resolve(dataset, method, preset_scale="small")
    sizes = {*SMALL, "model_width", "buffer_size", "open_slots"}
    for field in dataclasses.fields(full):
        before, after = getattr(full, field.name), getattr(small, field.name)
        if field.name == "eval_every":  # in versions, of fewer arrivals at the small scale
            before, after = before * full.buffer_size, after * small.buffer_size
        if field.name in sizes:
            assert after <= before
        else:
            assert after == before, field.name
    assert small.num_clients <= 20


def test_the_shifted_schedule_ends_sooner():
    """Published at t = 100, with up to 51,325 versions."""
    shifted = resolve("cifar10", "fedrevive", delays="shifted")
    assert shifted.max_time == 100
    assert shifted.max_versions > 51_325
    assert resolve("cifar10", delays="shifted", max_time=7).max_time == 7
    assert resolve("digits", delays="shifted").max_time == resolve("digits").max_time


@pytest.mark.parametrize("dataset", sorted(BY_DATASET))
def test_the_tuned_revival_is_of_fedrevive_where_the_paper_has_no_constants(dataset):
    """Nothing of it reaches the paper's data sets, another method, or what a user says."""
    for method in METHODS:
        tuned, published = (
            resolve(dataset, method, preset_revival=form) for form in ("tuned", "published")
        )
        assert (tuned != published) == (method == "fedrevive" and dataset in TUNED_REVIVAL)
        assert resolve(dataset, method) == tuned
        assert (published.judges, published.proxy) in (("all", "estimated"), ("all", "histogram"))
    assert not set(TUNED_REVIVAL) & set(PAPER)
    assert resolve(dataset, judges="all", synthesis_steps=3).synthesis_steps == 3


def test_a_flag_beats_the_small_scale():
    assert resolve("cifar10", preset_scale="small", num_clients=300).num_clients == 300


def test_only_a_generator_needs_the_time_before_the_warm_up_ends():
    now = {"warmup_versions": 0, "freeze_versions": 30}
    for method, samples in (("fedbuff", None), ("dd_fedrevive", None), ("fedrevive", "noise")):
        resolve("digits", method, samples=samples, **now)
    with pytest.raises(ConfigError, match="warmup_versions=0: must be at least freeze_versions=30"):
        resolve("digits", "fedrevive", **now)


def test_an_unknown_scale_is_named():
    with pytest.raises(ConfigError, match="preset_revival=best: must be one of tuned, published"):
        resolve("digits", preset_revival="best")
    with pytest.raises(ConfigError, match="preset_scale=tiny: must be one of full, small"):
        resolve("digits", preset_scale="tiny")


def test_a_method_that_is_revived_brings_the_rule_that_its_rate_is_for():
    for method, settings in (("fadas", {}), ("fedrevive", {"revive_on": "fadas"})):
        config = resolve("digits", method, **settings)
        assert (config.server_lr, config.fadas_delay_rule) == (1e-3, "code")


def test_methods_are_evaluated_equally_often_in_arrivals():
    """10 versions of one arrival, 5 of two, 1 of ten; else as the paper or the user says."""

    def versions(*args, **given):
        return resolve(*args, **given).eval_every

    told = [versions("digits", m) for m in ("fedrevive", "fedbuff", "fadas", "ca2fl", "fedavg")]
    assert told == [10, 5, 2, 1, 1]
    assert versions("image_folder", "fedbuff") == 5  # without a value of its own
    assert versions("digits", "fedbuff", buffer_size="3") == 3
    assert versions("digits", "fedbuff", eval_every="10") == 10
    assert versions("cifar10", "fedbuff") == 10


def test_one_step_per_arrival():
    """FedBuff's published rate of the mean of B, per arrival: 0.05 / 2."""
    for method in ("fedbuff", "ca2fl", "fedstale", "ace"):
        config = resolve("cifar10", method)
        assert config.server_lr / config.buffer_size == 0.025, method
