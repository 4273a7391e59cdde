"""Pixels of image files as a viewer shows them."""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, TiffImagePlugin

from fedrevive_jax.data.errors import reading
from fedrevive_jax.errors import FileError, one_line

# Pillow reads more, but hands some of it to other programs to be run (EPS).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
_GREY = ("1", "L", "LA", "La")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
# The colour spaces of profiles, as ICC calls them, and the images that they are for.
_PROFILED = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}
_SRGB_GAMMA = 1 / 2.2


def read(file: Path) -> np.ndarray:
    """The pixels of an image file, uint8 [height, width, 1] where they are grey, else [..., 3].

    Raises:
      FileError: the file is no image, is cut, or is not shown in one way only, see `as_shown`.
    """
    try:
        with reading(file):
            if not file.is_file():  # a pipe would be waited for
                raise FileError(file, "cannot be read as an image (it is no file)")
            raw = file.read_bytes()
        # From memory: Pillow maps some TIFF files, and does not turn those.
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            shown = np.asarray(as_shown(image))
    except FileError:
        raise
    except NotShown as error:
        raise FileError(file, str(error)) from None
    except Exception as error:  # Pillow's readers pass all kinds on
        raise FileError(file, f"cannot be read as an image ({one_line(error)})") from None
    return shown[..., None] if shown.ndim == 2 else shown


class NotShown(ValueError):
    """An image of which it cannot be said what a viewer shows. The message tells why."""


def as_shown(image: Image.Image) -> Image.Image:
    """An opened image as a viewer shows it, in Pillow's mode L where its pixels are grey, else RGB.

    It is turned as its EXIF orientation says. A colour profile is applied. Where it is transparent
    it is put on white.

    Raises:
      NotShown: it has several frames, more than 8 bits a channel, another gamma than sRGB, or
        colours that no profile explains.
    """
    _check(image)
    grey = image.mode in _GREY
    image.load()
    turned = ImageOps.exif_transpose(image)
    alpha = None
    if turned.mode in _TRANSPARENT or "transparency" in turned.info:
        turned = turned.convert("LA" if grey else "RGBA")
        alpha = turned.getchannel("A")
    profile = image.info.get("icc_profile")
    if turned.mode != "CMYK":
        turned = turned.convert("L" if grey else "RGB")
    colours = _in_srgb(turned, profile) if profile else turned
    shown = colours.convert("L") if grey else colours
    if alpha is not None:
        shown = Image.composite(shown, Image.new(shown.mode, shown.size, "white"), alpha)
    return shown


def _check(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    # The other frames of a telephone's photograph (MPO) are no part of what is shown.
    if frames > 1 and image.format != "MPO":
        raise NotShown(f"holds {frames} frames, must hold one")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK" and not profile:
        raise NotShown("pixels are CMYK without a colour profile, must be grey or RGB")
    if image.mode not in (*_GREY, *_COLOUR, "CMYK") or _bits(image) > 8:
        bits = f" of {_bits(image)} bits" if _bits(image) > 8 else ""
        raise NotShown(f"pixels are {image.mode}{bits}, must be grey or RGB of 8 bits a channel")
    gamma = image.info.get("gamma")
    if gamma and not profile and "srgb" not in image.info and abs(gamma - _SRGB_GAMMA) > 0.02:
        raise NotShown(f"has gamma {gamma:.4g}, must have that of sRGB, {_SRGB_GAMMA:.4g}")


def _bits(image: Image.Image) -> int:
    """Bits of a channel in the file, where Pillow makes 8 of them without a word."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return 8
    told = image.tile[0].args
    if image.format == "PNG":
        return 16 if ";16" in str(told) else 8
    if image.format == "PPM" and isinstance(told, tuple):  # with the largest value
        return max(n.bit_length() for n in told if isinstance(n, int))
    return 8


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours of an L, RGB or CMYK image as its profile explains them."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source) and image.mode != "CMYK":
            return image
        mode = _PROFILED[profile[16:20]]  # where its header tells the colour space
        if image.mode == "L" and mode == "RGB":
            image = image.convert(mode)
        shown = ImageCms.applyTransform(image, _transform(profile, mode))
    except (ImageCms.PyCMSError, KeyError, OSError, ValueError) as error:
        raise NotShown(f"its colour profile cannot be applied ({one_line(error)})") from None
    assert shown is not None
    return shown


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
