"""Images to model inputs on the device: scaling, random crop, flip, normalisation.

All functions are pure, take batches [b, height, width, channels] and are differentiable in float
images, so that synthesis can optimise through them. uint8 images are divided by 255.
"""

import jax
import jax.numpy as jnp

from fedrevive_jax.data.dataset import Preprocessing


def plain_inputs(images: jax.Array, how: Preprocessing) -> jax.Array:
    """Inputs without augmentation, for evaluation."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    if how.mean:
        mean, std = (jnp.asarray(v, images.dtype)[None, None, None] for v in (how.mean, how.std))
        images = (images - mean) / std
    return images


def client_inputs(images: jax.Array, key: jax.Array, how: Preprocessing) -> jax.Array:
    """Inputs of local training: the random crop pads with zeros, before normalisation."""
    return plain_inputs(_augment(images, key, how, "constant"), how)


def synthetic_inputs(images: jax.Array, key: jax.Array, how: Preprocessing) -> jax.Array:
    """Inputs of synthesis and distillation: the random crop pads by reflection."""
    return plain_inputs(_augment(images, key, how, "reflect"), how)


def _augment(images, key, how: Preprocessing, padding_mode: str) -> jax.Array:
    """Random crop and flip, drawn per sample."""
    batch, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    if how.crop_padding:
        pad = how.crop_padding
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=padding_mode)
        corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)

        def crop(image, corner):
            start = (corner[0], corner[1], 0)
            return jax.lax.dynamic_slice(image, start, (height, width, channels))

        images = jax.vmap(crop)(padded, corners)
    if how.flip:
        flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    return images
