"""A small ConvNet for 8x8 digits: three padded convolutions and one hidden dense layer."""

import flax.linen as nn

from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import layers

HEAD = "fc2"


class DigitsNet(nn.Module):
    """conv-ReLU, (conv-ReLU-pool) twice, dense 64, dense classes; three taps."""

    num_classes: int
    width: int = 32
    hidden: int = 64
    convolution: str = "lax"
    platform: str = "cpu"

    @nn.compact
    def __call__(self, images):
        height, width = images.shape[1:3]
        if min(height, width) < 4:
            raise ConfigError(
                "model", "digitsnet", f"images of {height}x{width} are too small; 4x4 is the least"
            )
        taps = []
        x = layers.Images(images)
        for i in (1, 2, 3):
            x = layers.conv_beside(
                self.width,
                x,
                f"conv{i}",
                padding=1,
                convolution=self.convolution,
                platform=self.platform,
            )
            taps.append(x.apart())
            x = layers.relu(x)
            if i > 1:
                x = layers.max_pool_2x2(x, self.platform)
        x = nn.relu(layers.dense(self.hidden, x.values.reshape(len(images), -1), "fc1"))
        return layers.dense(self.num_classes, x, "fc2"), tuple(taps)


def build(num_classes: int, width: int, convolution: str, platform: str) -> DigitsNet:
    return DigitsNet(num_classes, width, convolution=convolution, platform=platform)
