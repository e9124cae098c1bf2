"""Reading ground truth, with errors that name the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..data.images import DECODING_ERRORS
from ..errors import UserError

__all__ = ["check_size", "compare_sizes", "read_json", "read_segment_ids", "reading"]


@contextmanager
def reading(what: str, path: str) -> Iterator[None]:
    """Turn a failure to open or parse ``path`` in the block into a ``UserError`` that names it."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UserError(f"{what}: {path} is not a picture") from error
    except OSError as error:
        raise UserError(f"{what}: cannot read {path} ({error.strerror or error})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what}: {path} is not valid JSON ({error})") from error
    except DECODING_ERRORS as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: cannot read {path} ({error})") from error


def read_json(what: str, path: str) -> Any:
    """The contents of a JSON file; ``what`` says in an error what the file is."""
    with reading(what, path), PathManager.open(path, "r") as file:
        return json.load(file)


def read_segment_ids(path: str) -> np.ndarray:
    """Segment ids (H, W) uint32 of a PNG in COCO's panoptic format: R + 256 G + 65536 B."""
    with reading("ground truth", path), PathManager.open(path, "rb") as file, Image.open(file) as picture:
        colors = picture if picture.mode == "RGB" else picture.convert("RGB")
        # Pillow holds a pixel in four bytes, which are those of an integer.
        pixels = colors.tobytes("raw", "RGBX")
    return np.frombuffer(pixels, "<u4").reshape(picture.height, picture.width) & np.uint32(0xFFFFFF)


def check_size(name: str, path: str, size: tuple[int, int]) -> None:
    """Raise ``UserError`` unless the picture at ``path`` has the prediction's ``size`` (height, width).

    ``name`` is the file that the prediction was made for.
    """
    with reading("ground truth", path), PathManager.open(path, "rb") as file, Image.open(file) as picture:
        compare_sizes(name, path, size, (picture.height, picture.width))


def compare_sizes(name: str, path: str, size: tuple[int, ...], truth_size: tuple[int, ...]) -> None:
    """Raise ``UserError`` unless the prediction's (height, width) is that of the ground truth at ``path``."""
    if size != truth_size:
        raise UserError(
            f"the prediction for {name} has {size[0]}x{size[1]} pixels (height x width), but its ground truth {path} "
            f"has {truth_size[0]}x{truth_size[1]}: picture and annotation must be the same size"
        )
