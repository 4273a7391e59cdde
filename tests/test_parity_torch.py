"""The same weights give the same logits and taps in PyTorch (float32, to 1e-4).

The twins are plain `torch.nn` networks in PyTorch's own layout (channels first).
"""

import itertools

import jax
import numpy as np
import pytest

from fedrevive_jax import models

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[parity]'")
from torch import nn  # noqa: E402


class TorchConvNet(nn.Module):
    def __init__(self, width=64, classes=62):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1 if i == 0 else width, width, 3) for i in range(3))
        sizes = [25 * width, 200, 100, classes]
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        taps = []
        for i, conv in enumerate(self.convs):
            x = conv(x)
            taps.append(x)
            x = torch.relu(x)
            if i > 0:
                x = nn.functional.max_pool2d(x, 2)
        x = x.flatten(1)
        for layer in self.dense[:-1]:
            x = torch.relu(layer(x))
        return self.dense[-1](x), taps

    def load(self, params):
        for i, conv in enumerate(self.convs, start=1):
            copy_conv(conv, params[f"conv{i}"])
        for i, layer in enumerate(self.dense, start=1):
            kernel = np.asarray(params[f"fc{i}"]["kernel"])
            if i == 1:
                # Flattened (height, width, channel) here, (channel, height, width) in PyTorch.
                shape = (5, 5, -1, kernel.shape[1])
                kernel = kernel.reshape(shape).transpose(2, 0, 1, 3).reshape(kernel.shape)
            copy(layer.weight, kernel.T)
            copy(layer.bias, params[f"fc{i}"]["bias"])


class TorchResNet18(nn.Module):
    def __init__(self, width=64, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        channels = width
        for stage in range(4):
            for block in range(2):
                features, stride = width * 2**stage, 2 if stage > 0 and block == 0 else 1
                layers = {
                    "conv1": nn.Conv2d(channels, features, 3, stride, 1, bias=False),
                    "conv2": nn.Conv2d(features, features, 3, 1, 1, bias=False),
                }
                if channels != features:
                    layers["shortcut"] = nn.Conv2d(channels, features, 1, stride, bias=False)
                self.blocks.append(nn.ModuleDict(layers))
                channels = features
        self.head = nn.Linear(channels, classes, bias=False)

    def forward(self, x):
        taps = []

        def tapped(y):
            taps.append(y)
            return y

        x = torch.relu(tapped(self.stem(x)))
        for block in self.blocks:
            y = torch.relu(tapped(block["conv1"](x)))
            y = tapped(block["conv2"](y))
            x = torch.relu(y + (tapped(block["shortcut"](x)) if "shortcut" in block else x))
        return self.head(x.mean((2, 3))), taps

    def load(self, params):
        copy_conv(self.stem, params["stem"])
        for i, block in enumerate(self.blocks):
            for name, conv in block.items():
                copy_conv(conv, params[f"stage{i // 2 + 1}_block{i % 2 + 1}_{name}"])
        copy(self.head.weight, np.asarray(params["head"]["kernel"]).T)


def copy(target, value):
    with torch.no_grad():
        target.copy_(torch.from_numpy(np.array(value)))


def copy_conv(layer, params):
    copy(layer.weight, np.asarray(params["kernel"]).transpose(3, 2, 0, 1))
    if layer.bias is not None:
        copy(layer.bias, params["bias"])


@pytest.mark.parametrize("convolution", ["lax", "winograd"])
@pytest.mark.parametrize(
    ("name", "shape", "classes", "twin"),
    [("convnet", (28, 28, 1), 62, TorchConvNet), ("resnet18", (32, 32, 3), 10, TorchResNet18)],
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

    net = twin()
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
