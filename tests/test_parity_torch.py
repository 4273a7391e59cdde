"""The same weights give the same logits and taps in PyTorch (float32, to 1e-4).

The twins are those of the benchmark.
"""

import jax
import numpy as np
import pytest

from fedrevive_jax import models

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[parity]'")
from fedrevive_jax.benchmark.torch_networks import (  # noqa: E402
    TorchConvNet,
    TorchDigitsNet,
    TorchResNet18,
)


@pytest.mark.parametrize("convolution", ["lax", "winograd"])
@pytest.mark.parametrize(
    ("name", "shape", "classes", "twin"),
    [
        ("convnet", (28, 28, 1), 62, TorchConvNet),
        ("resnet18", (32, 32, 3), 10, TorchResNet18),
        ("digitsnet", (8, 8, 1), 10, TorchDigitsNet),
    ],
)
def test_logits_and_taps(name, shape, classes, twin, convolution):
    model = models.create(
        name, input_shape=shape, num_classes=classes, width=64, convolution=convolution
    )
    params = model.init(jax.random.key(0))
    # Larger weights than at the start, so that activations neither vanish nor explode with depth.
    params = jax.tree.map(lambda leaf: 2 * leaf, params)
    inputs = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    logits, ours = jax.jit(model.apply)(params, inputs)
    taps = models.tap_statistics(ours)

    net = twin(width=64, classes=classes)
    net.load(params)
    with torch.no_grad():
        expected, activations = net(torch.from_numpy(inputs.transpose(0, 3, 1, 2)))
    assert float(np.abs(logits).max()) > 0.1
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert len(taps) == len(activations)
    for (mean, variance), activation in zip(taps, activations, strict=True):
        np.testing.assert_allclose(mean, activation.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            variance, activation.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-4
        )


def test_start_has_the_law_of_pytorch():
    """Kernels and biases of each kind of layer: the same bound, and a uniform law within it."""
    params = models.create("convnet", input_shape=(28, 28, 1), num_classes=62, width=64).init(
        jax.random.key(0)
    )
    net = TorchConvNet()
    for name, layer in (("conv2", net.convs[1]), ("fc1", net.dense[0]), ("fc2", net.dense[1])):
        for leaf, theirs in (("kernel", layer.weight), ("bias", layer.bias)):
            ours = np.asarray(params[name][leaf])
            theirs = theirs.detach().numpy()
            # The largest of n uniform draws is within 5 / n of the bound, relatively.
            tolerance = 10 / ours.size
            assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=tolerance)
