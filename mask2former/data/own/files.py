"""Looking at many picture files: their sizes, their values, all of them in threads."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...errors import UserError
from ..annotations import ids_from_rgb
from ..images import picture_size, read_image, read_label_map

__all__ = ["PICTURE_SUFFIXES", "for_each", "is_colored", "list_files", "read_values"]

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})

_WORKERS = min(8, os.cpu_count() or 1)

Item = TypeVar("Item")
Result = TypeVar("Result")


def list_files(folder: Path, suffixes: Iterable[str] = PICTURE_SUFFIXES) -> dict[str, Path]:
    """Files below ``folder`` by their path in it without the ending, in the order of their names.

    Raises ``UserError`` if two differ in nothing but the ending.
    """
    allowed = set(suffixes)
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in allowed and not path.name.startswith("."):
            key = path.relative_to(folder).with_suffix("").as_posix()
            if key in found:
                raise UserError(f"'{found[key]}' and '{path}' differ in their ending alone: keep one of them")
            found[key] = path
    return found


def is_colored(path: Path) -> bool:
    """Whether a PNG has channels of colour, not one channel (or a palette's indices) alone."""
    picture_size(path)  # for the error
    with Image.open(path) as image:
        return image.mode.startswith("RGB")


def read_values(path: Path) -> np.ndarray:
    """What a PNG has at each pixel, (H, W) int64: its one channel, or R + 256 G + 65536 B of its colour."""
    if is_colored(path):
        return ids_from_rgb(read_image(path, "RGB")).astype(np.int64)
    return read_label_map(path, np.int64)


def for_each(function: Callable[[Item], Result], items: Sequence[Item], description: str) -> list[Result]:
    """``function`` of every item, in threads and under a progress bar.

    Raises the first ``UserError``, saying how many items have one.
    """

    def attempt(item: Item) -> tuple[list[Result], str]:
        try:
            return [function(item)], ""
        except UserError as error:
            return [], str(error)

    with ThreadPoolExecutor(_WORKERS) as executor:
        # On a terminal only; a log gets the summary.
        outcomes = list(tqdm(executor.map(attempt, items), total=len(items), desc=description, disable=None))
    problems = [message for _, message in outcomes if message]
    if problems:
        more = f" (and {len(problems) - 1} more of {len(items)} have problems)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)
    return [result for results, _ in outcomes for result in results]
