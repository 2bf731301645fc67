"""Decodes one image file, which nobody vouches for, if it declares the size and channels that are wanted."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from distft.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.ImageFile import ImageFile

# Pillow's names; other formats of its are rarely used, and their decoders rarely tested.
_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
    "WEBP": (".webp",),
}
DECODED_SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
_MODES = {1: "L", 3: "RGB"}  # by number of channels
_MOST_OF_8_BITS = 255
_MODE_NAMES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "of a palette",
    "RGB": "RGB",
    "RGBA": "RGB with transparency",
    "CMYK": "CMYK",
    "I;16": "grey of 16 bits",
}


def decode(data: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8] | str:
    """The pixels uint8 of `shape` (channels, height, width), or what is wrong with the file.

    Nothing is decoded before the file's header has declared that shape, so that memory is bounded.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError(
            "data.type=images needs Pillow, which is not installed: pip install distft[images]."
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which is not used, and of sizes, refused below
            with Image.open(io.BytesIO(data), formats=list(_FORMATS)) as image:
                problem = _header_problem(image.size, image.mode, shape) or _loss(image)
                if problem is not None:
                    return problem
                if getattr(image, "is_animated", False):
                    return "has several frames: keep one."
                pixels = np.asarray(image, dtype=np.uint8)
    except Image.DecompressionBombError:
        return f"declares far more pixels than the model's {shape[2]} x {shape[1]}: it is refused undecoded."
    except UnidentifiedImageError:
        return f"is no image of a kind that is read ({', '.join(_FORMATS)}): remove or convert it."
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        return f"is damaged: {error or type(error).__name__}. Remove it, or restore the file."
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


def _loss(image: ImageFile) -> str | None:
    """What Pillow would leave out of an image without a word, if anything."""
    if any(_is_deep(tile.args) for tile in image.tile):
        return "has 16 bits a channel, and images have 8: convert it, so that you choose how it is rounded."
    if "transparency" in image.info:
        return "has a transparent colour, and images are opaque: put it on a background, or drop the colour."
    return None


def _is_deep(arguments: object) -> bool:
    """Whether a decoder with these arguments reads more than 8 bits a channel and keeps 8."""
    if isinstance(arguments, str):  # of PNG: a raw mode, such as RGB;16B
        return ";16" in arguments
    match arguments:
        case (str(), int(most)):  # of PPM: the mode, and the greatest value of a channel
            return most > _MOST_OF_8_BITS
    return False


def _header_problem(size: tuple[int, int], mode: str, shape: tuple[int, int, int]) -> str | None:
    channels, height, width = shape
    problems = []
    if size != (width, height):
        problems.append(
            f"has {size[0]} x {size[1]} pixels, and the model reads {width} x {height} (model.image_size)"
        )
    if mode != _MODES[channels]:
        found = _MODE_NAMES.get(mode, f"of mode {mode}")
        problems.append(
            f"is {found}, and the model reads {_MODE_NAMES[_MODES[channels]]} (model.num_channels={channels})"
        )
    return f"{'; it '.join(problems)}: convert it, or change the model." if problems else None
