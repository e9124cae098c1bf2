"""Reading picture files and label maps into arrays.

Detectron2's reader, with two things added: pictures with more than 8 bits a channel, and errors that name the file.
"""

import os
import struct

import numpy as np
import numpy.typing as npt
from detectron2.data import detection_utils
from PIL import Image, ImageOps

from ..errors import UserError

__all__ = ["DECODING_ERRORS", "picture_size", "read_image", "read_label_map"]

# What Pillow's decoders raise on files that are missing, truncated, of another kind, or damaged.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

_ORIENTATION = 0x0112  # the EXIF tag; its values from 5 on swap width and height
_LARGEST_16_BIT = 65535


def read_image(path: str | os.PathLike[str], image_format: str = "RGB", *, upright: bool = True) -> np.ndarray:
    """Read a picture file as a contiguous (H, W, C) array in the channel order of ``image_format``.

    ``image_format`` is one of Detectron2's: "RGB", "BGR", "L" (all uint8) or "YUV-BT.601" (float).
    Grey, palette and CMYK pictures are converted, transparency is dropped, and with ``upright`` a rotation in the EXIF
    data is applied. Grey pictures with 16 bits are scaled to 8 bits (65535 becomes 255), whatever they contain, so that
    brightness stays comparable between the pictures of a data set.

    Raises ``UserError`` naming the file if it can't be read, or holds floating-point numbers.
    """
    image = _open(path, "picture", upright)
    pixels = detection_utils.convert_PIL_to_numpy(_to_8_bits(image, path), image_format)
    return np.ascontiguousarray(pixels)


def read_label_map(path: str | os.PathLike[str], dtype: npt.DTypeLike = int) -> np.ndarray:
    """Read a PNG with a label for each pixel, as they are in the file, as an (H, W) array of its own.

    A palette's indices are the labels, not its colours. Raises ``UserError`` naming the file if it can't be read, or
    has colours, fractions or labels below 0.
    """
    image = _open(path, "label map")
    if image.mode == "F":
        raise UserError(f"label map '{os.fspath(path)}' holds floating-point numbers, expected integers: save it anew")
    labels = np.array(image, dtype=dtype)
    if labels.ndim != 2:
        raise UserError(
            f"label map '{os.fspath(path)}' is a picture of mode {image.mode}: expected one channel with the labels"
        )
    if image.mode == "I" and labels.min(initial=0) < 0:  # the one mode with a sign
        raise UserError(f"label map '{os.fspath(path)}' has the label {labels.min():g}, expected none below 0")
    return labels


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Height and width of a picture that is shown upright; its pixels are not read.

    Raises ``UserError`` if the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except FileNotFoundError as error:
        raise UserError(f"picture '{os.fspath(path)}' does not exist: check the path") from error
    except DECODING_ERRORS as error:
        raise UserError(f"cannot read picture '{os.fspath(path)}': {error}: replace or remove the file") from error
    return (width, height) if turned else (height, width)


def _open(path: str | os.PathLike[str], noun: str, upright: bool = True) -> Image.Image:
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image) if upright else image
            picture.load()
    except FileNotFoundError as error:
        raise UserError(f"{noun} '{os.fspath(path)}' does not exist: check the path") from error
    except DECODING_ERRORS as error:
        raise UserError(f"cannot read {noun} '{os.fspath(path)}': {error}: replace or remove the file") from error
    return picture


def _to_8_bits(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    if image.mode == "F":
        raise UserError(
            f"picture '{os.fspath(path)}' holds floating-point numbers, whose range is unknown: "
            "save it with 8 or 16 bits a channel"
        )
    if not image.mode.startswith("I"):  # "I;16", "I;16B", and "I" in older versions of Pillow
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > _LARGEST_16_BIT:
        raise UserError(
            f"picture '{os.fspath(path)}' holds values from {values.min()} to {values.max()}, expected "
            f"0 to {_LARGEST_16_BIT}: save it with 8 or 16 bits a channel"
        )
    return Image.fromarray(np.round(values * (255 / _LARGEST_16_BIT)).astype(np.uint8))
