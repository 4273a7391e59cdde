"""ResNet-18 for 32x32 images, without normalisation layers and without biases."""

import functools

import flax.linen as nn

from fedrevive_jax.models import layers

HEAD = "head"


class ResNet18(nn.Module):
    """3x3 stem, stages [2, 2, 2, 2] of width 1/2/4/8 with strides 1/2/2/2, mean pool, dense.

    Projection shortcuts are 1x1 convolutions, tapped too: 20 taps. With width 64 and 10 classes it
    has 11,164,352 parameters.
    """

    num_classes: int
    width: int = 64
    convolution: str = "lax"
    platform: str = "cpu"

    @nn.compact
    def __call__(self, images):
        taps = []
        conv = functools.partial(
            layers.conv_beside, use_bias=False, convolution=self.convolution, platform=self.platform
        )

        def tapped(x):
            taps.append(x.apart())
            return x

        x = layers.relu(tapped(conv(self.width, layers.Images(images), "stem", padding=1)))
        for stage in range(4):
            features = self.width * 2**stage
            for block in range(2):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}_"
                y = tapped(conv(features, x, name + "conv1", stride=stride, padding=1))
                y = layers.relu(y)
                y = tapped(conv(features, y, name + "conv2", padding=1))
                if stride != 1 or x.channels != features:
                    x = tapped(conv(features, x, name + "shortcut", size=1, stride=stride))
                x = layers.relu(x, y)
        x = x.apart()
        x = x.mean(axis=tuple(range(1, x.ndim - 1)))
        return layers.dense(self.num_classes, x, "head", use_bias=False), tuple(taps)


def build(num_classes: int, width: int, convolution: str, platform: str) -> ResNet18:
    return ResNet18(num_classes, width, convolution, platform)
