"""Networks: published sizes, taps, PyTorch's start, and the ways to convolve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax import models
from fedrevive_jax.config import ConfigError
from fedrevive_jax.models import convolutions, layers

CASES = {
    "resnet18": ((32, 32, 3), 10, 64),
    "convnet": ((28, 28, 1), 62, 64),
    "digitsnet": ((8, 8, 1), 10, 16),
}


def create(name, convolution="lax", width=None):
    shape, classes, published = CASES[name]
    return models.create(
        name,
        input_shape=shape,
        num_classes=classes,
        width=width or published,
        convolution=convolution,
    )


def test_published_sizes():
    def count(name):
        return models.parameter_count(jax.eval_shape(create(name).init, jax.random.key(0)))

    assert count("resnet18") == 11_164_352
    # 3x3 kernels and biases, then dense 1600 -> 200 -> 100 -> 62.
    convolutions = (9 * 64 + 64) + 2 * (9 * 64 * 64 + 64)
    dense = (1600 * 200 + 200) + (200 * 100 + 100) + (100 * 62 + 62)
    assert count("convnet") == convolutions + dense


@pytest.mark.parametrize(("name", "taps"), [("resnet18", 20), ("convnet", 3), ("digitsnet", 3)])
def test_convolutions_agree_in_a_network(name, taps):
    """Values, taps and gradients; float32 sums of at most 9 * 64 terms, hence 1e-5."""
    inputs = jax.random.normal(jax.random.key(1), (3, *CASES[name][0]))
    results = []
    for convolution in ("lax", "mixed"):
        model = create(name, convolution, width=8)
        params = model.init(jax.random.key(0))

        def total(params, model=model):
            logits, activations = model.apply(params, inputs)
            statistics = models.tap_statistics(activations)
            return (logits**2).sum() + sum(m.sum() + v.sum() for m, v in statistics)

        logits, activations = jax.jit(model.apply)(params, inputs)
        statistics = models.tap_statistics(activations)
        assert len(statistics) == taps
        results.append((logits, statistics, jax.jit(jax.grad(total))(params)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", convolutions.WAYS[1:])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(3, 1, 0), (3, 1, 1), (3, 1, 2), (3, 2, 1), (1, 2, 0), (5, 3, 2)],
)
def test_a_convolution_is_a_convolution(x64, way, size, stride, padding):
    """Odd and even sides, enough channels for every way; values and both gradients."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, 32))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 32, 33))

    def call(how):
        def convolve(x, kernel):
            sides = ((padding, padding), (padding, padding))
            named = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
            return convolutions.choose(how)(x, kernel, (stride, stride), sides, **named)

        outputs, pull_back = jax.vjp(convolve, x, kernel)
        gradient = jax.random.normal(jax.random.key(2), outputs.shape)
        return outputs, pull_back(gradient)

    for ours, expected in zip(*map(jax.tree.leaves, (call(way), call("lax"))), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_winograd_applies_where_it_pays():
    """Otherwise the test above would compare patches with themselves."""
    kernel = jnp.zeros((3, 3, 32, 33))

    def uses_winograd(x, strides=(1, 1)):
        call = functools.partial(convolutions.choose("winograd"), window_strides=strides)
        program = jax.make_jaxpr(lambda x: call(x, kernel, padding=((1, 1), (1, 1))))(x)
        return "custom_vjp_call" in str(program)

    assert uses_winograd(jnp.zeros((2, 9, 12, 32)))
    assert not uses_winograd(jnp.zeros((2, 9, 12, 32)), (2, 2))
    assert not uses_winograd(jnp.zeros((2, 4, 4, 32)))


def test_second_derivatives_of_winograd(x64):
    """Full MAML differentiates a gradient."""
    x = jax.random.normal(jax.random.key(0), (1, 6, 6, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 2))

    def curvature(convolve):
        def gradient_norm(kernel):
            return sum(
                (g**2).sum()
                for g in jax.grad(lambda *a: (convolve(*a) ** 3).sum(), (0, 1))(x, kernel)
            )

        return jax.grad(gradient_norm)(kernel)

    def plain(x, kernel):
        return convolutions.choose("patches")(x, kernel, (1, 1), ((1, 1), (1, 1)))

    ours = curvature(lambda x, kernel: convolutions.winograd(x, kernel, 1))
    np.testing.assert_allclose(ours, curvature(plain), rtol=1e-9)


def test_convnet_names_the_least_size():
    shape = (12, 12, 1)
    models.create("convnet", input_shape=shape, num_classes=3, width=2).init(jax.random.key(0))
    small = models.create("convnet", input_shape=(11, 12, 1), num_classes=3, width=2)
    with pytest.raises(ConfigError, match="12x12 is the least"):
        small.init(jax.random.key(0))


def test_start_is_uniform_within_one_over_root_fan_in():
    params = create("convnet").init(jax.random.key(0))
    for name, fan_in in (("conv2", 9 * 64), ("fc1", 1600)):
        bound = fan_in**-0.5
        for leaf in jax.tree.leaves(params[name]):
            assert float(jnp.abs(leaf).max()) <= bound
        kernel = params[name]["kernel"]
        # Variance of the uniform law is bound^2 / 3; 36,864 samples or more put it within 3%.
        assert float(kernel.var()) == pytest.approx(bound**2 / 3, rel=0.03)
        assert float(jnp.abs(params[name]["bias"]).max()) > 0.8 * bound


def test_taps_are_statistics_of_the_batch_before_the_relu():
    model = create("digitsnet", "patches")
    params = model.init(jax.random.key(0))
    inputs = jax.random.normal(jax.random.key(1), (5, 8, 8, 1))
    kernel, bias = params["conv1"]["kernel"], params["conv1"]["bias"]
    first = jax.lax.conv_general_dilated(
        inputs, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    first = first + bias[None, None, None]
    mean, variance = models.tap_statistics(model.apply(params, inputs)[1])[0]
    np.testing.assert_allclose(mean, first.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance, first.var((0, 1, 2)), rtol=1e-4)


def test_max_pool():
    x = jnp.asarray([[1.0, 5, 2], [3, 4, 9], [7, 8, 0]]).reshape(1, 3, 3, 1)
    assert layers.max_pool_2x2(x).reshape(-1).tolist() == [5.0]


@pytest.mark.parametrize("name", ["convnet", "digitsnet"])
def test_half_precision_is_in_the_arithmetic_alone(name):
    """Everything that comes out is float32. bfloat16 keeps eight bits, so each layer rounds by up
    to 0.4% on the way and on the way back. Sums of gradients in bfloat16 would lose a fifth.
    """
    single = create(name, "auto", width=8)
    half = models.with_precision(single, "bfloat16")
    params = jax.tree.map(lambda leaf: 2 * leaf, single.init(jax.random.key(0)))
    inputs = jax.random.normal(jax.random.key(1), (16, *CASES[name][0]))

    def outcome(model):
        def total(params):
            logits, activations = model.apply(params, inputs)
            return (logits**2).sum(), (logits, models.tap_statistics(activations))

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

    (ours, (logits, taps)), gradient = outcome(half)
    (theirs, _), expected = outcome(single)
    for leaf in jax.tree.leaves((ours, logits, taps, gradient)):
        assert leaf.dtype == jnp.float32
    assert ours != theirs  # it is not the same arithmetic
    for a, b in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 0.1
    assert models.with_precision(single, "float32") is single
