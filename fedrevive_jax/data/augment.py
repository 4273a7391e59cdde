"""Images to model inputs on the device: scaling, random crop, flip, rotation, normalisation.

All functions are pure, take batches [b, height, width, channels] and are differentiable in float
images, so that synthesis can optimise through them. uint8 images are divided by 255.
"""

import jax
import jax.numpy as jnp

from fedrevive_jax.data.dataset import Preprocessing

# What a batch's key is used for; folded into it.
CROP, FLIP, ROTATION = range(3)


def plain_inputs(images: jax.Array, how: Preprocessing) -> jax.Array:
    """Inputs without augmentation, for evaluation."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    if how.mean:
        mean, std = (jnp.asarray(v, images.dtype)[None, None, None] for v in (how.mean, how.std))
        images = (images - mean) / std
    return images


def client_inputs(images: jax.Array, key: jax.Array, how: Preprocessing) -> jax.Array:
    """Inputs of local training: crop, flip and rotation fill with zeros, before normalisation."""
    return plain_inputs(_augment(images, key, how, "constant"), how)


def synthetic_inputs(images: jax.Array, key: jax.Array, how: Preprocessing) -> jax.Array:
    """Inputs of synthesis and distillation: as a client's, but that the crop pads by reflection."""
    return plain_inputs(_augment(images, key, how, "reflect"), how)


def crop(images: jax.Array, corners: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Of each image the part that begins at its corner.

    A CPU fetches each part. A TPU would do so in a loop over the images; choosing among all places,
    row by row and column by column, takes it a tenth of the time, and a CPU a hundred times as
    long.

    Args:
      images: [b, height, width, channels].
      corners: int [b, 2], first row and column of each, such that its part lies inside.
      size: (height, width) of the parts.
    """

    def fetch(images, corners):
        def one(image, corner):
            start = (corner[0], corner[1], 0)
            return jax.lax.dynamic_slice(image, start, (*size, image.shape[-1]))

        return jax.vmap(one)(images, corners)

    return jax.lax.platform_dependent(
        images, corners, tpu=lambda i, c: choose_parts(i, c, size), default=fetch
    )


def choose_parts(images: jax.Array, corners: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`crop` by a choice among all places, along one axis after the other."""
    for axis in (1, 2):
        length = size[axis - 1]
        places = [
            jax.lax.slice_in_dim(images, place, place + length, axis=axis)
            for place in range(images.shape[axis] - length + 1)
        ]
        at = corners[:, axis - 1].reshape(-1, 1, 1, 1)
        images = places[0]
        for place, part in enumerate(places[1:], 1):
            images = jnp.where(at == place, part, images)
    return images


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
    """Turns one image [height, width, channels] counter-clockwise about its centre.

    Each pixel takes the value of the nearest pixel that it comes from, zero outside the image.
    """
    height, width, _ = image.shape
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.arange(height)[:, None] - centre_y, jnp.arange(width)[None] - centre_x
    sine, cosine = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))
    from_y = jnp.round(sine * x + cosine * y + centre_y).astype(jnp.int32)
    from_x = jnp.round(cosine * x - sine * y + centre_x).astype(jnp.int32)
    inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
    # A gather clamps positions outside the image; those pixels are zeroed.
    return jnp.where(inside[..., None], image[from_y, from_x], jnp.zeros((), image.dtype))


def _augment(images, key, how: Preprocessing, padding_mode: str) -> jax.Array:
    """Random crop, flip and rotation, drawn per sample."""
    batch, height, width, _ = images.shape
    crop_key, flip_key = (jax.random.fold_in(key, tag) for tag in (CROP, FLIP))
    if how.crop_padding:
        pad = how.crop_padding
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=padding_mode)
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)
        images = crop(padded, corners, (height, width))
    if how.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if how.rotation:
        rotation_key = jax.random.fold_in(key, ROTATION)
        angles = jax.random.uniform(
            rotation_key, (batch,), minval=-how.rotation, maxval=how.rotation
        )
        images = jax.vmap(rotate)(images, angles)
    return images
