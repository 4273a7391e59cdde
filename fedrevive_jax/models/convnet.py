"""The paper's ConvNet for 28x28 images (FEMNIST): three valid convolutions, three dense layers."""

import flax.linen as nn

from fedrevive_jax.errors import ConfigError
from fedrevive_jax.models import layers

HEAD = "fc3"


class ConvNet(nn.Module):
    """conv-ReLU, (conv-ReLU-pool) twice, dense 200, dense 100, dense classes; three taps.

    At 28x28x1, width 64 and 62 classes the flattened size is 5 * 5 * 64 = 1600.
    """

    num_classes: int
    width: int = 64
    hidden: tuple[int, int] = (200, 100)
    convolution: str = "lax"
    platform: str = "cpu"

    @nn.compact
    def __call__(self, images):
        height, width = images.shape[1:3]
        if min(height, width) < 12:
            raise ConfigError(
                "model", "convnet", f"images of {height}x{width} are too small; 12x12 is the least"
            )
        taps = []
        x = layers.Images(images)
        for i in (1, 2, 3):
            x = layers.conv_beside(
                self.width, x, f"conv{i}", convolution=self.convolution, platform=self.platform
            )
            taps.append(x.apart())
            x = layers.relu(x)
            if i > 1:
                x = layers.max_pool_2x2(x, self.platform)
        x = x.values.reshape(len(images), -1)
        for i, features in enumerate(self.hidden, start=1):
            x = nn.relu(layers.dense(features, x, f"fc{i}"))
        logits = layers.dense(self.num_classes, x, f"fc{len(self.hidden) + 1}")
        return logits, tuple(taps)


def build(num_classes: int, width: int, convolution: str, platform: str) -> ConvNet:
    return ConvNet(num_classes, width, convolution=convolution, platform=platform)
