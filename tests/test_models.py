"""Networks: published sizes, taps, PyTorch's start, and the ways to convolve."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrevive_jax import models
from fedrevive_jax.compute import devices
from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import convolutions, layers

CASES = {
    "resnet18": ((32, 32, 3), 10, 64),
    "convnet": ((28, 28, 1), 62, 64),
    "digitsnet": ((8, 8, 1), 10, 16),
}


def create(name, convolution="lax", width=None):
    shape, classes, published = CASES[name]
    return models.make_network(
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
    """Odd and even sides; values and both gradients."""
    x = jax.random.normal(jax.random.key(0), (2, 9, 12, 5))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 5, 6))

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


@pytest.mark.parametrize(("channels", "stride", "padding"), [(2, 1, 1), (5, 1, 0), (5, 2, 1)])
def test_mixed_is_one_function(x64, channels, stride, padding):
    """Small patches and large ones: values alone, values under a gradient, and jobs with kernels of
    their own, which are mapped together."""
    sides = (6, 7)
    x = jax.random.normal(jax.random.key(0), (3, 2, *sides, channels))
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, channels, channels))

    def convolve(how):
        sides = ((padding, padding),) * 2
        named = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return lambda x, k: convolutions.choose(how)(x, k, (stride, stride), sides, **named)

    def under_a_gradient(how):
        def both(x, k):
            outputs, pull_back = jax.vjp(convolve(how), x, k)
            return outputs, *pull_back(jnp.cos(outputs))

        return both

    same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    same(convolve("mixed")(x[0], kernels[0]), convolve("lax")(x[0], kernels[0]))
    for mapped in (convolve, under_a_gradient):
        ours, expected = (jax.vmap(mapped(how))(x, kernels) for how in ("mixed", "lax"))
        jax.tree.map(same, ours, expected)
    shared = [jax.vmap(convolve(how), (0, None))(x, kernels[0]) for how in ("mixed", "lax")]
    same(*shared)
    shared = [jax.vmap(convolve(how), (None, 0))(x[0], kernels) for how in ("mixed", "lax")]
    same(*shared)


def test_which_way_mixed_goes():
    """Otherwise the tests would compare a way with itself."""

    def program(channels, stride=1, padding=1, gradient=True):
        x, kernel = jnp.zeros((2, 9, 12, channels)), jnp.zeros((3, 3, channels, 32))
        sides = ((padding, padding),) * 2

        def convolve(x, kernel):
            return convolutions.choose("mixed")(x, kernel, (stride, stride), sides)

        def pulled(x, kernel):
            outputs, pull_back = jax.vjp(convolve, x, kernel)
            return outputs, pull_back(outputs)

        # Before compilation a gradient of patches has their values beside it.
        text = str(jax.make_jaxpr(pulled if gradient else convolve)(x, kernel))
        return text.count("conv_general_dilated["), text.count("dot_general[")

    assert program(5, gradient=False) == (1, 0)
    assert program(5) == program(5, padding=0) == (3, 0)  # the values and both gradients
    assert program(5, padding=3) == (1, 4)  # wider than the kernel: gradients of patches
    assert program(5, stride=2) == (1, 4)
    assert program(2, gradient=False) == (0, 1)  # small patches
    assert program(2) == (1, 3)  # but the gradient of the kernel


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the compiler for CPUs")
def test_no_convolution_of_a_loop_is_left_to_plain_code():
    """On a CPU XLA has fast convolutions, but not for all orders of axes, and not in the library to
    which it would hand them."""
    x, kernel = jnp.zeros((32, 12, 12, 16)), jnp.zeros((3, 3, 16, 16))

    def step(kernel, x, how):
        convolve = convolutions.choose(how)
        named = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

        def loss(kernel, x):
            return (convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), **named) ** 2).sum()

        by_kernel, by_inputs = jax.grad(loss, (0, 1))(kernel, x)
        return kernel - by_kernel, by_inputs

    def orders(how, jit):
        def loop(kernel, x):
            return jax.lax.fori_loop(0, 3, lambda i, both: step(*both, how), (kernel, x))

        text = jit(loop).lower(kernel, x).compile().as_text()
        assert how != "mixed" or " call(" in text  # what must not be fused was not
        handed_over = "ynn" in text
        return set(re.findall(r" convolution\(.*dim_labels=(\S+?)[,\s]", text)), handed_over

    fast = "b01f_01io->b01f"
    ours = functools.partial(devices.jit, None)
    assert orders("mixed", ours) == ({fast}, False)
    assert orders("lax", ours)[0] - {fast}  # negative control
    assert orders("mixed", jax.jit)[1]


@pytest.mark.parametrize("channels", [2, 5])
def test_second_derivatives_of_mixed(x64, channels):
    """Full MAML differentiates a gradient; small patches and large ones."""
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, channels))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, channels, channels))

    def curvature(how):
        def convolve(x, kernel):
            return convolutions.choose(how)(x, kernel, (1, 1), ((1, 1), (1, 1)))

        def gradient_norm(kernel):
            return sum(
                (g**2).sum()
                for g in jax.grad(lambda *a: (convolve(*a) ** 3).sum(), (0, 1))(x, kernel)
            )

        return jax.grad(gradient_norm)(kernel)

    np.testing.assert_allclose(curvature("mixed"), curvature("patches"), rtol=1e-8)


def test_convnet_names_the_least_size():
    shape = (12, 12, 1)
    models.make_network("convnet", input_shape=shape, num_classes=3, width=2).init(
        jax.random.key(0)
    )
    small = models.make_network("convnet", input_shape=(11, 12, 1), num_classes=3, width=2)
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


@pytest.mark.parametrize(
    ("platform", "images", "channels", "columns", "beside"),
    [
        ("tpu", 32, 64, 32, 2),
        ("tpu", 128, 64, 32, 1),
        ("tpu", 320, 64, 32, 2),
        ("tpu", 384, 64, 32, 1),
        ("tpu", 32, 64, 31, 1),
        ("tpu", 32, 65, 32, 1),
        ("tpu", 32, 8, 32, 16),
        ("tpu", 32, 8, 24, 8),
        ("gpu", 32, 8, 32, 1),
        ("cpu", 32, 8, 32, 1),
    ],
)
def test_how_many_pixels_lie_side_by_side(platform, images, channels, columns, beside):
    assert convolutions.pixels_beside(platform, images, channels, columns) == beside


def test_a_kernel_for_pixels_side_by_side():
    """By hand: outputs 0 and 1 of a pair read pixels -1, 0, 1 and 0, 1, 2, of three pairs."""
    kernel = jnp.asarray([1.0, 2, 3]).reshape(1, 3, 1, 1)
    wide, stride, sides = convolutions.for_pixels_beside(kernel, 1, 1, 8, 2, 2)
    assert (stride, sides) == (1, (1, 1))
    # [pair, pixel of the pair, output of the pair]
    assert wide[0].tolist() == [[[0, 0], [1, 0]], [[2, 1], [3, 2]], [[0, 3], [0, 0]]]
    # Every second output, alone: pixels 2 j - 1, 2 j, 2 j + 1, of two pairs.
    wide, stride, sides = convolutions.for_pixels_beside(kernel, 2, 1, 8, 2, 1)
    assert (stride, sides) == (1, (1, 0))
    assert wide[0].tolist() == [[[0], [1]], [[2], [3]]]
    # Every second output, in pairs, which read pixels -1, 0, 1 and 1, 2, 3, of two fours.
    wide, stride, sides = convolutions.for_pixels_beside(kernel, 2, 1, 8, 4, 2)
    assert (stride, sides) == (1, (1, 0))
    assert wide[0].tolist() == [
        [[0, 0], [0, 0], [0, 0], [1, 0]],
        [[2, 0], [3, 1], [0, 2], [0, 3]],
    ]


@pytest.mark.parametrize(
    ("name", "shape", "width"),
    [
        ("resnet18", (8, 14, 3), 32),
        ("convnet", (12, 28, 1), 64),
        ("convnet", (14, 28, 1), 8),
        ("digitsnet", (8, 8, 1), 32),
    ],
)
def test_a_network_with_pixels_side_by_side_is_the_same(x64, name, shape, width):
    """Logits, statistics and gradients, also through statistics to the images; the control: a
    kernel whose columns are turned is another network."""

    def outcome(platform, turned=False):
        model = models.make_network(
            name,
            input_shape=shape,
            num_classes=7,
            width=width,
            convolution="lax",
            platform=platform,
        )
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0)))
        if turned:
            params = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 4 else x, params)

        def total(params, images):
            logits, activations = model.apply(params, images)
            statistics = models.tap_statistics(activations)
            loss = (logits**2).sum() + sum((m**2 + v).sum() for m, v in statistics)
            return loss, (logits, statistics, max(own.ndim for own in activations))

        images = jax.random.normal(jax.random.key(1), (2, *shape))
        gradients, (logits, statistics, rank) = jax.grad(total, (0, 1), has_aux=True)(
            params, images
        )
        assert rank == (5 if platform == "tpu" else 4)
        return logits, statistics, gradients

    ours, expected, other = outcome("tpu"), outcome("cpu"), outcome("cpu", turned=True)
    for one, two in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-9)
    assert not np.allclose(ours[0], other[0], rtol=1e-3, atol=1e-6)


def test_max_pool():
    x = jnp.asarray([[1.0, 5, 2], [3, 4, 9], [7, 8, 0]]).reshape(1, 3, 3, 1)
    assert layers.max_pool_2x2(layers.Images(x), "cpu").values.reshape(-1).tolist() == [5.0]


@pytest.mark.parametrize(
    ("shape", "beside"),
    [((2, 6, 8, 3), 1), ((1, 5, 7, 2), 1), ((2, 5, 8, 3), 2), ((2, 6, 8, 3), 4)],
)
def test_both_ways_to_pool_agree(shape, beside):
    """A window's, which a TPU takes, also of pixels side by side, and the reshape's; also in their
    gradients and those of these, where no two of four are equal."""
    key, other = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key, shape)
    pooled = (shape[0], shape[1] // 2, shape[2] // 2, shape[3])
    weights = jax.random.normal(other, pooled)

    def outcome(platform, beside=1):
        def pool(x):
            images = layers.Images(x.reshape(*shape[:2], shape[2] // beside, -1), beside)
            result = layers.max_pool_2x2(images, platform)
            assert result.beside == max(beside // 2, 1)
            return result.values.reshape(pooled)

        def loss(x):
            return (weights * pool(x) ** 3).sum()

        def slope(x):
            return (jax.grad(loss)(x) ** 2).sum()

        return pool(x), jax.grad(loss)(x), jax.grad(slope)(x)

    ours, theirs = outcome("tpu", beside), outcome("cpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


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
    assert models.with_precision(single, "float32").apply is single.apply


@pytest.mark.parametrize("convolution", convolutions.WAYS)
def test_float32_is_float32_on_accelerators(convolution):
    """Every product, on the way back too, asks for all digits; without it none does."""
    plain = models.make_network(
        "convnet", input_shape=(28, 28, 1), num_classes=10, width=8, convolution=convolution
    )
    params = plain.init(jax.random.key(0))

    def products(model):
        def loss(params):
            return model.apply(params, jnp.ones((2, 28, 28, 1)))[0].sum()

        # As another platform's compiler gets it, which need not be here.
        platform = {"cpu": "cpu", "gpu": "cuda"}[model.platform]
        traced = jax.jit(jax.grad(loss)).trace(params)
        lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
        found = [line for line in lines if re.search(r"stablehlo\.(dot_general|convolution)", line)]
        return len(found), sum(line.count("HIGHEST") == 2 for line in found)

    count, exact = products(models.with_precision(plain, "float32"))  # on a CPU
    assert (count > 12, exact) == (True, 0)
    plain = plain._replace(platform="gpu")
    count, exact = products(models.with_precision(plain, "float32"))
    assert exact == count > 12
    assert products(models.with_precision(plain, "bfloat16"))[1] == 0


def test_statistics_of_many_rows_keep_their_digits():
    """346,112 rows: in units of the standard deviation and relative to the variance. Sums of random
    rounding errors stay below 1e-6; one long product of ones loses 1e-5."""
    x = np.random.default_rng(0).normal(1, 2, (512, 26, 26, 8)).astype(np.float32)
    rows = x.reshape(-1, 8).astype(np.float64)
    mean, variance = jax.jit(layers.batch_statistics)(x)
    assert np.abs(mean - rows.mean(0)).max() < 1e-6 * rows.std()
    assert np.abs(variance / rows.var(0) - 1).max() < 1e-6


@pytest.mark.parametrize(("mean", "error"), [(0, 1e-5), (3, 1e-4), (30, 1e-2)])
def test_one_pass_in_half_precision_loses_less_than_rounding_did(mean, error):
    """bfloat16 keeps eight bits, an error of 2e-3 of each number; here against the variance of the
    rounded numbers themselves. A mean of thirty deviations costs a thousand times what a sum of
    43,264 numbers loses in single precision, up to 1e-5."""
    x = np.random.default_rng(0).normal(mean, 1, (64, 26, 26, 8))
    half = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(half, np.float64).reshape(-1, 8)
    ours = jax.jit(layers.batch_statistics)(half)
    assert np.abs(ours[0] / exact.mean(0) - 1).max() < 1e-5 if mean else True
    assert np.abs(ours[1] / exact.var(0) - 1).max() < error
    assert jax.jit(layers.batch_statistics)(jnp.full((8, 4), 3.3, jnp.bfloat16))[1].min() >= 0
