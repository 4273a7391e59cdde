# PyTorch and transformers are optional, see the extra `parity`.
# pyright: reportMissingImports=false
"""The networks in plain PyTorch, channels first; parity tests and the benchmark use them."""

import itertools

import numpy as np
import torch
from torch import nn


class TorchConvNet(nn.Module):
    """`models.convnet.ConvNet`."""

    def __init__(self, width: int = 64, classes: int = 62, channels: int = 1, side: int = 28):
        super().__init__()
        inputs = (channels, width, width)
        self.convs = nn.ModuleList(nn.Conv2d(size, width, 3) for size in inputs)
        self.side = ((side - 4) // 2 - 2) // 2
        sizes = [self.side**2 * width, 200, 100, classes]
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        taps = []
        for i, conv in enumerate(self.convs):
            x = conv(x)
            taps.append(x)
            x = torch.relu(x)
            if i > 0:
                x = nn.functional.max_pool2d(x, 2)
        return _dense(self.dense, x.flatten(1)), taps

    def load(self, params):
        for i, conv in enumerate(self.convs, start=1):
            _copy_conv(conv, params[f"conv{i}"])
        _copy_dense(self.dense, params, self.side)


class TorchDigitsNet(nn.Module):
    """`models.digitsnet.DigitsNet`."""

    def __init__(self, width: int = 32, classes: int = 10, channels: int = 1, side: int = 8):
        super().__init__()
        inputs = (channels, width, width)
        self.convs = nn.ModuleList(nn.Conv2d(size, width, 3, padding=1) for size in inputs)
        self.side = side // 4
        sizes = [self.side**2 * width, 64, classes]
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    forward = TorchConvNet.forward
    load = TorchConvNet.load


class TorchResNet18(nn.Module):
    """`models.resnet.ResNet18`."""

    def __init__(self, width: int = 64, classes: int = 10, channels: int = 3, side: int = 32):
        del side  # the mean over space takes any
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
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
        _copy_conv(self.stem, params["stem"])
        for i, block in enumerate(self.blocks):
            for name, conv in block.items():
                _copy_conv(conv, params[f"stage{i // 2 + 1}_block{i % 2 + 1}_{name}"])
        _copy(self.head.weight, np.asarray(params["head"]["kernel"]).T)


class TorchT5(nn.Module):
    """`models.t5.T5Classifier` on `transformers`' encoder; reads (ids or embeddings, mask).

    The last tap lies behind the final normalisation here, which costs the same.
    """

    def __init__(self, shape, classes: int):
        from transformers import T5Config, T5EncoderModel

        super().__init__()
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=shape.vocabulary,
                d_model=shape.width,
                d_kv=shape.head_width,
                d_ff=shape.feed_forward,
                num_layers=shape.layers,
                num_heads=shape.heads,
                relative_attention_num_buckets=shape.buckets,
                relative_attention_max_distance=shape.max_distance,
                dropout_rate=0.0,
                feed_forward_proj="relu",
            )
        )
        self.encoder.shared.weight.requires_grad_(False)
        self.token = shape.classifier_token
        self.dense = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(shape.width, shape.width), nn.Tanh(), nn.Dropout(0.1),
            nn.Linear(shape.width, classes),
        )  # fmt: skip

    def forward(self, inputs):
        embeddings, mask = inputs
        if embeddings.dtype == torch.long:
            embeddings = self.encoder.shared(embeddings)
        first = self.encoder.shared.weight[self.token].expand(len(mask), 1, -1)
        out = self.encoder(
            inputs_embeds=torch.cat([first, embeddings], 1),
            attention_mask=torch.cat([torch.ones_like(mask[:, :1]), mask], 1),
            output_hidden_states=True,
        )
        taps = [states[:, 0] for states in out.hidden_states[1:]]
        return self.dense(out.last_hidden_state[:, 0]), taps


class TorchGenerator(nn.Module):
    """`dfkd.generator.Generator`: (z, class embeddings, targets) -> images in [0, 1]."""

    def __init__(self, image_shape: tuple[int, int, int], latent: int, features: int):
        super().__init__()
        height, width, channels = image_shape
        self.start = (2 * features, height // 4, width // 4)
        self.dense = nn.Linear(latent, int(np.prod(self.start)))
        norm = {"track_running_stats": False}  # the batch's own statistics, always
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(n, **norm) for n in (2 * features, 2 * features, features)
        )
        self.conv1 = nn.Conv2d(2 * features, 2 * features, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2 * features, features, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(features, channels, 3, padding=1)

    def forward(self, z, embeddings, targets):
        x = self.dense(z + 0.2 * embeddings[targets]).view(-1, *self.start)
        x = nn.functional.interpolate(self.norms[0](x), scale_factor=2)
        x = nn.functional.leaky_relu(self.norms[1](self.conv1(x)), 0.2)
        x = nn.functional.interpolate(x, scale_factor=2)
        x = nn.functional.leaky_relu(self.norms[2](self.conv2(x)), 0.2)
        return torch.sigmoid(self.conv3(x))


def _dense(layers, x):
    for layer in layers[:-1]:
        x = torch.relu(layer(x))
    return layers[-1](x)


def _copy(target, value):
    with torch.no_grad():
        target.copy_(torch.from_numpy(np.array(value)))


def _copy_conv(layer, params):
    _copy(layer.weight, np.asarray(params["kernel"]).transpose(3, 2, 0, 1))
    if layer.bias is not None:
        _copy(layer.bias, params["bias"])


def _copy_dense(layers, params, side: int):
    """The first layer reads (height, width, channel) here and (channel, height, width) there."""
    for i, layer in enumerate(layers, start=1):
        kernel = np.asarray(params[f"fc{i}"]["kernel"])
        if i == 1:
            shape = (side, side, -1, kernel.shape[1])
            kernel = kernel.reshape(shape).transpose(2, 0, 1, 3).reshape(kernel.shape)
        _copy(layer.weight, kernel.T)
        _copy(layer.bias, params[f"fc{i}"]["bias"])
