"""The golden values: one small case of everything, computed independently in float64.

Compared to 1e-9 relative (with an absolute floor of 1e-12 for entries that are exactly zero); the
remaining difference is the order of sums in double precision.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrevive_jax.clients.local_training import train
from fedrevive_jax.config import Dfkd
from fedrevive_jax.dfkd import distillation, loss_guard, losses, proxy, synthesis
from fedrevive_jax.dfkd.generator import Generator, image_maker
from fedrevive_jax.methods import blending
from fedrevive_jax.models import from_flax
from fedrevive_jax.models.convnet import ConvNet

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "dfkd_convnet.npz") as archive:
        return {name: archive[name] for name in archive.files}


def tree(golden, prefix):
    """The entries below a prefix as a nested dict, without taps."""
    result = {}
    for name, value in golden.items():
        if name.startswith(prefix + "/") and "/tap" not in name:
            *path, leaf = name[len(prefix) + 1 :].split("/")
            node = result
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = jnp.asarray(value)
    return result


def taps(golden, prefix):
    return tuple(
        (jnp.asarray(golden[f"{prefix}/tap{i}/mean"]), jnp.asarray(golden[f"{prefix}/tap{i}/var"]))
        for i in (1, 2, 3)
    )


def close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-12)


def setting(golden, name):
    return golden[f"settings/{name}"].item()


@pytest.fixture(params=["patches", "lax"])
def convolution(request):
    return request.param


@pytest.fixture
def model(golden, convolution):
    hidden = (setting(golden, "hidden1"), setting(golden, "hidden2"))
    net = ConvNet(setting(golden, "classes"), setting(golden, "width"), hidden, convolution)
    return from_flax("convnet", net, (28, 28, 1), setting(golden, "classes"))


@pytest.fixture
def teachers(golden):
    names = [f"teacher{k}" for k in range(setting(golden, "teachers"))]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree(golden, n) for n in names))
    statistics = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(taps(golden, n) for n in names))
    return params, statistics


def test_client_training(golden, model):
    batches = (jnp.asarray(golden["client/images"]) / 255.0, jnp.asarray(golden["client/labels"]))
    start, rate = tree(golden, "client/before"), setting(golden, "client_lr")
    trained = train(model, start, batches, lambda batch: (*batch, None), rate)
    close(trained.losses, golden["client/losses"])
    close(trained.params, tree(golden, "client/after"))
    close(trained.taps, taps(golden, "client"))


def test_proxy(golden, model):
    inputs = jnp.asarray(golden["proxy/inputs"], jnp.float64)
    estimate = proxy.probe(model, tree(golden, "teacher0"), inputs, setting(golden, "t_probe"))
    close(estimate, golden["proxy/teacher0"])


def make_synthesiser(golden, model, convolution, meta="reptile"):
    generator = Generator((28, 28, 1), setting(golden, "features"), convolution)
    return synthesis.make_synthesiser(
        model,
        image_maker(generator, setting(golden, "latent"), setting(golden, "classes")),
        lambda images, key: images,
        Dfkd(
            synthesis_batch=setting(golden, "batch"),
            synthesis_steps=setting(golden, "steps"),
            generator_lr=setting(golden, "lr_g"),
            latent_lr=setting(golden, "lr_z"),
            feature_weight=setting(golden, "bn"),
            one_hot_weight=setting(golden, "oh"),
            adversarial_weight=setting(golden, "adv"),
            meta=meta,
        ),
    )


@pytest.fixture
def start(golden, teachers):
    """Arguments of a synthesis after the variables: draw, ensemble, guard, key."""
    proxies, student = jnp.asarray(golden["proxies"]), tree(golden, "student")
    targets = jnp.asarray(golden["synthesis/targets"])
    return (
        synthesis.Draw(targets, latents(golden), targets),
        synthesis.Ensemble(*teachers, proxies, student, jnp.asarray(True)),
        loss_guard.init(Dfkd()),
        jax.random.key(0),
    )


def latents(golden):
    return jnp.asarray(golden["synthesis/z"]), jnp.asarray(golden["synthesis/e"])


def variables(golden):
    return synthesis.Variables(tree(golden, "generator/before"), latents(golden))


def test_teacher_weights(golden):
    targets, q = jnp.asarray(golden["synthesis/targets"]), jnp.asarray(golden["proxies"])
    close(losses.teacher_weights(q, targets), golden["synthesis/weights"])


def test_synthesis_losses_and_gradients(golden, model, convolution, start):
    synthesiser = make_synthesiser(golden, model, convolution)
    gradient = jax.jit(jax.value_and_grad(synthesiser.objective, has_aux=True))
    (_, (terms, images, _, rejected, _)), grads = gradient(variables(golden), *start)
    assert not rejected.any()
    close(jnp.stack(terms), golden["synthesis/losses"][0])
    close(images[:4], golden["synthesis/images0_first4"])
    close(grads.latents[0], golden["synthesis/grad0_z"])
    close(grads.latents[1], golden["synthesis/grad0_e"])
    close(grads.generator["conv2"]["kernel"], golden["synthesis/grad0_conv2"])


def test_synthesis_in_single_precision(golden, model, convolution, start):
    """Losses and gradients in float32, to 1e-4 of the largest entry."""
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        (variables(golden), *start[:-1]),
    )
    synthesiser = make_synthesiser(golden, model, convolution)
    gradient = jax.jit(jax.value_and_grad(synthesiser.objective, has_aux=True))
    (_, (terms, _, _, _, _)), grads = gradient(*narrow, start[-1])
    assert grads.latents[0].dtype == jnp.float32
    np.testing.assert_allclose(jnp.stack(terms), golden["synthesis/losses"][0], rtol=1e-4)
    for actual, name in (
        (grads.latents[0], "grad0_z"),
        (grads.latents[1], "grad0_e"),
        (grads.generator["conv2"]["kernel"], "grad0_conv2"),
    ):
        expected = golden[f"synthesis/{name}"]
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_inner_steps(golden, model, convolution, start):
    result = jax.jit(make_synthesiser(golden, model, convolution).inner)(variables(golden), *start)
    close(jnp.stack(result.terms, axis=1), golden["synthesis/losses"])
    assert result.best_step == golden["synthesis/best_step"]
    close(result.samples[:4], golden["synthesis/images1_first4"])
    close(result.variables.generator, tree(golden, "generator/fast_after"))


def test_reptile_step(golden, model, convolution, start):
    synthesiser = make_synthesiser(golden, model, convolution)
    before = variables(golden)
    result = jax.jit(synthesiser.synthesise)(synthesiser.init(before.generator), *start)
    close(result.generator.params, tree(golden, "generator/after"))
    close(jnp.stack(result.terms), golden["synthesis/losses"][golden["synthesis/best_step"]])


@pytest.mark.slow
@pytest.mark.parametrize("convolution", ["patches"], indirect=True)
def test_meta_gradients(golden, model, start):
    """FOMAML sums the inner gradients; full MAML differentiates the inner steps.

    Both are read off the first meta-step's Adam state, whose first moment is (1 - b1) gradient.
    Full MAML is compared with central differences along a random direction.
    """
    before = variables(golden)

    def run(meta, omega):
        synthesiser = make_synthesiser(golden, model, "patches", meta)
        result = jax.jit(synthesiser.synthesise)(synthesiser.init(omega), *start)
        moment = optax.tree.get(result.generator.meta, "mu")
        return jax.tree.map(lambda m: m / (1 - synthesis.B1), moment)

    maml_synthesiser = make_synthesiser(golden, model, "patches", "maml")

    @jax.jit
    def loss_sum(omega):
        return maml_synthesiser.inner(before._replace(generator=omega), *start).terms.total.sum()

    inner = jax.jit(make_synthesiser(golden, model, "patches").inner)(before, *start)
    fomaml, maml = run("fomaml", before.generator), run("maml", before.generator)
    close(fomaml, inner.gradient_sum)
    keys = iter(jax.random.split(jax.random.key(1), 20))
    direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), before.generator)

    def along(gradient):
        products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
        return sum(jax.tree.leaves(products))

    # Adam's first step is a smoothed sign, so the curve bends within 1e-6; at 1e-8 truncation and
    # rounding (1e-16 / step) both stay below 1e-6 relative, and the two gradients differ by 1e-2.
    step = 1e-8
    up, down = (
        loss_sum(optax.tree.add_scale(before.generator, sign * step, direction)) for sign in (1, -1)
    )
    np.testing.assert_allclose(along(maml), (up - down) / (2 * step), rtol=1e-6)
    assert abs(along(fomaml) / along(maml) - 1) > 5e-3


@pytest.mark.parametrize("in_one_call", [True, False])
def test_distillation(golden, model, teachers, in_one_call):
    images = jnp.asarray(golden["distillation/images"]) / 255.0
    params, _ = teachers
    student = tree(golden, "student")
    targets = distillation.teacher_logits(model, params, images)
    result = distillation.distil(
        model,
        student,
        images,
        targets,
        jnp.ones(images.shape[1], bool),
        loss_guard.init(Dfkd()),
        Dfkd(
            num_teachers=images.shape[1],
            distillation_lr=setting(golden, "lr_kd"),
            distillation_weight_decay=setting(golden, "wd"),
            distillation_temperature=setting(golden, "temperature"),
            teacher_batch=images.shape[1] if in_one_call else 1,
        ),
    )
    close(result.losses, golden["distillation/losses"])
    # A difference of two nearly equal numbers: absolute error in units of the parameters.
    for a, e in zip(
        jax.tree.leaves(result.delta), jax.tree.leaves(tree(golden, "distillation/delta")),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cosine75", blending.cosine(75.0)),
        ("linear005", blending.linear(0.005)),
        ("exponential005", blending.exponential(0.005)),
    ],
)
def test_beta(golden, name, shape):
    close(shape(jnp.asarray(golden["beta/staleness"])), golden[f"beta/{name}"])
