"""A user's own model is judged by its shapes: one line says what it gives and what is wanted."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax.compute.streams import root_key
from fedrevive_jax.data import digits
from fedrevive_jax.dfkd.prompts import tap_distance
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import Model, from_flax, make_network, t5
from fedrevive_jax.models.judging import fitting, judge
from fedrevive_jax.models.model import Head
from fedrevive_jax.simulation.planning import plan
from fedrevive_jax.simulation.simulator import Simulation
from tests.toys import scalar_model, small


class Net(nn.Module):
    """One convolution and a head; `kind` says what is wrong with it."""

    kind: str = ""

    @nn.compact
    def __call__(self, x, train=False):
        taps = nn.Conv(4, (3, 3))(x)
        x = nn.relu(taps).reshape(len(x), -1)
        if self.kind == "BatchNorm":
            x = nn.BatchNorm(use_running_average=not train)(x)
        if self.kind == "Dropout":
            x = nn.Dropout(0.5, deterministic=not train)(x)
        if self.kind == "Dropout without an argument":
            x = nn.Dropout(0.5)(x)
        if self.kind == "dropout in evaluation":
            x = nn.Dropout(0.5, deterministic=False)(x)
        if self.kind == "integers":
            self.param("steps", lambda key: jnp.zeros(3, jnp.int32))
        parameters = jnp.bfloat16 if self.kind == "bfloat16 parameters" else jnp.float32
        computed = jnp.bfloat16 if self.kind == "bfloat16 logits" else jnp.float32
        classes = 7 if self.kind == "another head" else 10
        logits = nn.Dense(classes, param_dtype=parameters, dtype=computed)(x)
        if self.kind == "logits alone":
            return logits
        if self.kind == "logits of a batch":
            return logits.mean(axis=0), (taps,)
        if self.kind == "classes":
            return logits.argmax(axis=-1), (taps,)
        if self.kind == "one tap without a tuple":
            return logits, taps
        if self.kind == "a tap of the whole batch":
            return logits, (taps.mean(axis=0),)
        if self.kind == "no taps":
            return logits, ()
        return logits, (taps,)


def network(kind="", head=None):
    return from_flax("net", Net(kind), (8, 8, 1), 10, head=head)


FAULTY = {
    "another head": "logits of 2 samples must be float32 [2, 10]; are float32 [2, 7]",
    "logits of a batch": "logits of 2 samples must be float32 [2, 10]; are float32 [10]",
    "classes": "logits of 2 samples must be float32 [2, 10]; are int32 [2]",
    "bfloat16 logits": "logits of 2 samples must be float32 [2, 10]; are bfloat16 [2, 10]",
    "logits alone": "`apply` must give (logits, activations); gives float32 [2, 10]",
    "one tap without a tuple": "activations must be a tuple, an array a tap; "
    "are float32 [2, 8, 8, 4]",
    "a tap of the whole batch": "activations of 2 samples must be float [2, ..., channels]; "
    "those at tap 0 are float32 [8, 8, 4]",
    "no taps": "has no taps, whose statistics synthesis matches; must have some, or "
    "feature_weight=0",
    "integers": "parameters must be arrays of float32, `precision` says how models compute; "
    "steps is int32 [3]",
    "bfloat16 parameters": "parameters must be arrays of float32, `precision` says how models "
    "compute; Dense_0/bias is bfloat16 [10]",
    "BatchNorm": "must have parameters alone; has batch_stats, too (instead of BatchNorm, use "
    "GroupNorm)",
    "Dropout without an argument": '`init` fails: Parameter "deterministic" must be passed',
    "dropout in evaluation": "`apply` fails on float32 [2, 8, 8, 1] without a key: Dropout_0 needs",
}


def one_line(error):
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.fixture(scope="module")
def dataset():
    return digits.load("", 0)


@pytest.mark.parametrize(("kind", "message"), FAULTY.items(), ids=FAULTY)
def test_a_network_that_is_no_model(dataset, kind, message):
    with pytest.raises(ConfigError) as error:
        fitting(small("fedrevive"), dataset, network(kind))
    assert one_line(error).startswith(f"model=net: {message}")


def test_networks_that_are_models(dataset):
    """The controls: without a fault, without taps where none are asked for, and our own."""
    assert judge(network()) == 1
    assert fitting(small("fedrevive"), dataset, network()).name == "net"
    fitting(small("fedbuff"), dataset, network("no taps"))
    fitting(small("fedrevive", feature_weight=0), dataset, network("no taps"))
    assert judge(make_network("digitsnet", input_shape=(8, 8, 1), num_classes=10, width=4)) == 3
    assert judge(scalar_model()) == 1
    shape = t5.T5Shape(30, 8, 8, 2, 2, 4, 8, 16, 1e-6)
    assert judge(t5.make_classifier(shape, 6, 3, None)) == 2


def test_dropout_is_on_where_there_is_a_key():
    model, inputs = network("Dropout"), jnp.ones((3, 8, 8, 1))
    params = model.init(root_key())

    def logits(key):
        return np.asarray(model.apply(params, inputs, key)[0])

    plain = Net().apply({"params": params}, inputs)[0]
    np.testing.assert_array_equal(logits(None), plain)
    np.testing.assert_array_equal(logits(root_key(1)), logits(root_key(1)))
    assert (logits(root_key(1)) != logits(root_key(2))).any()
    assert (logits(root_key(1)) != plain).any()


class Bare(nn.Module):
    """What the given names tell of the mode: {name: value}."""

    name_of_mode: str = ""

    @nn.compact
    def __call__(self, x, deterministic=None):
        return self.param("w", nn.initializers.ones, ()) * x, deterministic


def test_the_mode_is_told_by_any_of_the_usual_names():
    model = from_flax("bare", Bare(), (2,), 2)
    params = model.init(root_key())
    assert model.apply(params, jnp.ones((1, 2)))[1] is True
    assert model.apply(params, jnp.ones((1, 2)), root_key())[1] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": lambda key: {}}, "has no parameters"),
        (
            {"init": lambda key: {"w": 1.0}},
            "parameters must be .*; w is a plain number",
        ),
        ({"init": lambda: {}}, "`init` fails: .* takes 0 positional arguments"),
        (
            {"apply": lambda params, inputs: (inputs, ())},
            r"`apply` fails on float32 \[2, 4, 4, 1\] without a key: .* takes 2 positional",
        ),
        ({"apply": lambda params, inputs, key: inputs @ jnp.ones((3, 2))}, "`apply` fails on "),
        ({"apply": lambda params, inputs, key: None}, "`apply` must give .*; gives a NoneType"),
        (
            {"apply": lambda params, inputs, key: (inputs, ["tap"])},
            "`apply` fails on .* a value of type <class 'str'>",
        ),
    ],
)
def test_functions_that_are_no_model(change, message):
    with pytest.raises(ConfigError, match=f"^model=scalar: {message}") as error:
        judge(scalar_model()._replace(**change))
    one_line(error)


def test_what_is_no_model_or_no_data_set_at_all(dataset):
    config = small("fedbuff")
    for wrong, message in (
        (
            lambda: fitting(config, dataset, Net()),
            "model: must be a `Model`, see `from_flax`; ",
        ),
        (lambda: fitting(config, dataset.samples), "dataset: must be a `Dataset`; is a numpy.nda"),
        (lambda: from_flax("net", jax.nn.relu, (8, 8, 1), 10), "model=net: must be made of a mod"),
        (
            lambda: fitting(config, dataset, scalar_model()),
            "model=scalar: takes (4, 4, 1) and tells 2 classes; the data set has (8, 8, 1) and 10",
        ),
        (lambda: plan(config, model=Net()), "model: must be a `Model`, see `from_flax`; "),
        (lambda: plan(config, dataset.samples), "dataset: must be a `Dataset`; is a numpy.nda"),
        (
            lambda: plan(config, model=scalar_model()),
            "model=scalar: takes (4, 4, 1) and tells 2 classes; the data set has (8, 8, 1) and 10",
        ),
    ):
        with pytest.raises(ConfigError, match="^" + re.escape(message)) as error:
            wrong()
        one_line(error)


def test_a_head_that_is_no_layer_of_the_model(dataset):
    config = small("fedgen")
    with pytest.raises(ConfigError, match=r"^model=net: `head` is no layer .*: 'nope'"):
        fitting(config, dataset, network(head="nope"))
    own = network()._replace(head=Head(lambda p: p, lambda p: 7, lambda p, x: x))
    with pytest.raises(ConfigError, match=r"^model=net: `head` must make 10 logits; .* \[2, 7\]"):
        fitting(config, dataset, own)
    assert fitting(config, dataset, network(head="Dense_0")).head is not None  # the control


def test_a_model_without_taps_is_revived_without_their_statistics(dataset):
    config = small("fedrevive", feature_weight=0, max_time=3.0)
    run = Simulation(config, dataset=dataset, model=network("no taps"))
    assert all(receipt.accepted for receipt in run.arrivals())
    assert run.server.version > config.warmup_versions
    assert tap_distance((), ()) == 0  # of texts


def test_an_error_of_the_users_own_code_stays_beside(dataset):
    """In Python its traceback is what the user needs."""

    def apply(params, inputs, key=None):
        raise ZeroDivisionError("my own\nmistake")

    mine = Model("mine", (8, 8, 1), 10, lambda key: {"w": jnp.zeros(3)}, apply)
    with pytest.raises(ConfigError, match=r"^model=mine: `apply` fails on .*: my own$") as error:
        fitting(small("fedbuff"), dataset, mine)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
