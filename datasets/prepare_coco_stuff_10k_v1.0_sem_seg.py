#!/usr/bin/env python3
"""Make COCO-Stuff 10k's pictures and semantic PNGs, ``images_detectron2`` and ``annotations_detectron2``.

Pictures are copied, shared out as ``imageLists/train.txt`` and ``test.txt`` say. Labels, 0 to 170, and 255 where there
is none, are those of the matrix S of ``annotations/*.mat`` less 2. Needs h5py. Can be interrupted and started again.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mask2former.data.images import read_image
from mask2former.data.panoptic_files import is_newer, run_jobs, save_png, write_whole
from mask2former.data.preparation import Options, read_options, run_splits
from mask2former.errors import UserError, command

try:
    import h5py
except ImportError:
    h5py = None

FOLDER = "coco/coco_stuff_10k"
NO_CLASS = 1
LAST_CLASS = 172


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(__doc__, FOLDER, ["train", "test"], arguments)
    if h5py is None:
        raise UserError("COCO-Stuff 10k's annotations are HDF5 files: run 'pip install h5py' to read them")
    names = {split: read_list(options.root / "imageLists" / f"{split}.txt") for split in options.splits}
    return run_splits(options.splits, partial(make, options, names))


def read_list(path: Path) -> list[str]:
    """Names of pictures, without endings. Raises ``UserError`` if the file can't be read."""
    try:
        return path.read_text(encoding="utf-8").split()
    except FileNotFoundError as error:
        raise UserError(f"'{path}' does not exist: give the folder of COCO-Stuff 10k as --root") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{path}': {error}: download it again") from error


def make(options: Options, names: dict[str, list[str]], split: str) -> tuple[Path, list[str]]:
    """Make a split; the folder of its PNGs, and a line for each file that is missing or broken."""
    images, labels = (options.output / folder / split for folder in ("images_detectron2", "annotations_detectron2"))

    def convert(name: str) -> None:
        picture, annotation = options.root / "images" / f"{name}.jpg", options.root / "annotations" / f"{name}.mat"
        targets = {images / picture.name: picture, labels / f"{name}.png": annotation}
        if all(source.exists() and is_newer(target, source) for target, source in targets.items()):
            return
        shape = read_image(picture, upright=False).shape[:2]
        save_png(labels / f"{name}.png", read_labels(annotation, shape))
        with open(picture, "rb") as content:
            write_whole(images / picture.name, lambda file: shutil.copyfileobj(content, file))

    jobs = [partial(convert, name) for name in names[split]]
    return labels, run_jobs(jobs, workers=options.workers, description=f"COCO-Stuff 10k {split}")


def read_labels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Labels (H, W) uint8 of an annotation of a picture with this shape. Raises ``UserError`` naming the file."""
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: download it again")
    try:
        with h5py.File(path, "r") as file:
            matrix = np.asarray(file["S"][()]).T  # MATLAB stores columns first
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot read '{path}': {error}: expected the matrix S of COCO-Stuff 10k's version 1.0"
        ) from error
    if matrix.shape != shape:
        raise UserError(f"'{path}': S is {matrix.shape}, but the picture has {shape[0]} rows and {shape[1]} columns")
    if matrix.min() < NO_CLASS or matrix.max() > LAST_CLASS:
        raise UserError(
            f"'{path}' has labels from {matrix.min()} to {matrix.max()}, expected {NO_CLASS} (none) to {LAST_CLASS}, "
            "those of version 1.0"
        )
    return (matrix.astype(int) - 2).astype(np.uint8)  # 1 becomes 255


if __name__ == "__main__":
    command(main)
