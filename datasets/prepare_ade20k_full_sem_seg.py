#!/usr/bin/env python3
"""Make the pictures and label maps of ADE20K with 847 classes, ``images_detectron2`` and ``annotations_detectron2``.

Made from the pictures that ``index_ade20k.pkl`` names and their ``*_seg.png``. Pictures whose shorter side has more
than 512 pixels are made smaller, to 512. A label is the class, 0 to 846, or 65535 where there is none of them. Can be
interrupted and started again.
"""

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mask2former.data.datasets import read_classes
from mask2former.data.images import read_image
from mask2former.data.panoptic_files import is_newer, run_jobs, write_whole
from mask2former.data.preparation import Options, read_options, run_splits
from mask2former.errors import UserError, command

FOLDER = "ADE20K_2021_17_01"
SPLITS = {"train": "training", "val": "validation"}
SHORTER_SIDE = 512
NO_CLASS = 65535

# What the index may name: the arrays in it. Python's unpickler would run anything else.
PARTS_OF_ARRAYS = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class ArrayUnpickler(pickle.Unpickler):
    """A reader of pickles that hold numbers, text, and arrays of these."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PARTS_OF_ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")
        return super().find_class(module, name)


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(__doc__, FOLDER, list(SPLITS), arguments)
    pictures = read_index(options.root)
    return run_splits(options.splits, partial(make, options, pictures))


def read_index(root: Path) -> dict[str, list[Path]]:
    """Split → its pictures, as the index names them. Raises ``UserError`` if it can't be read."""
    path = root / "index_ade20k.pkl"
    try:
        with open(path, "rb") as file:
            index = ArrayUnpickler(file).load()
        names = [(str(folder), str(name)) for folder, name in zip(index["folder"], index["filename"], strict=True)]
    except FileNotFoundError as error:
        raise UserError(f"'{path}' does not exist: give the folder {FOLDER} as --root") from error
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read '{path}': {error}: download it again") from error
    pictures: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for folder, name in names:  # folders begin with the data set's own
        split = "val" if name.split("_")[1:2] == ["val"] else "train"
        pictures[split].append(root.joinpath(*Path(folder).parts[1:], name))
    return pictures


def make(options: Options, pictures: dict[str, list[Path]], split: str) -> tuple[Path, list[str]]:
    """Make a split; the folder of its label maps, and a line for each file that is missing or broken."""
    images = options.output / "images_detectron2" / SPLITS[split]
    labels = options.output / "annotations_detectron2" / SPLITS[split]
    table = label_table()
    jobs = [partial(convert, path, images / path.name, labels / f"{path.stem}.tif", table) for path in pictures[split]]
    return labels, run_jobs(jobs, workers=options.workers, description=f"{FOLDER} {split}")


def label_table() -> np.ndarray:
    """(65536) uint16: class in the downloaded files → label."""
    table = np.full(2**16, NO_CLASS, dtype=np.uint16)
    for label, category in enumerate(read_classes("ade20k_full")):
        table[category["id"]] = label
    return table


def convert(picture: Path, image_target: Path, label_target: Path, table: np.ndarray) -> None:
    segmentation = picture.with_name(f"{picture.stem}_seg.png")
    sources = (picture, segmentation)
    if all(is_newer(target, *sources) for target in (image_target, label_target)) and all(map(Path.exists, sources)):
        return
    pixels = read_image(picture, "RGB", upright=False)
    red, green, _ = read_image(segmentation, "RGB").transpose(2, 0, 1)
    labels = table[red.astype(int) // 10 * 256 + green]
    height, width = pixels.shape[:2]
    if labels.shape != (height, width):
        raise UserError(
            f"'{segmentation}' has {labels.shape[1]} x {labels.shape[0]} pixels, but '{picture}' has {width} x {height}"
        )
    if min(height, width) > SHORTER_SIDE:
        size = smaller(width, height)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    write_whole(image_target, lambda file: Image.fromarray(pixels).save(file, format="JPEG"))
    write_whole(label_target, lambda file: Image.fromarray(labels).save(file, format="TIFF"))


def smaller(width: int, height: int) -> tuple[int, int]:
    """Width and height with the shorter side at 512 and, but for rounding, the same ratio."""
    if width >= height:
        return round(width / height * SHORTER_SIDE), SHORTER_SIDE
    return SHORTER_SIDE, round(height / width * SHORTER_SIDE)


if __name__ == "__main__":
    command(main)
