#!/usr/bin/env python3
"""Make the ``nuclei`` data set from a folder with pictures and COCO instance annotations of nuclei.

The input has ``train/``, ``val/`` (pictures) and ``annotations/{train,val}.json``, and is only read. The output gets
links to these (or copies), panoptic annotations with nuclei as things and the background as stuff, and semantic PNGs.
Where nuclei overlap, the smaller one is on top. Can be interrupted and started again.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mask2former.data.datasets import data_set_root, read_classes
from mask2former.data.datasets.coco_format import load_instances_json
from mask2former.data.panoptic_files import instances_to_panoptic, write_whole
from mask2former.errors import UserError, command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder with train/, val/ and annotations/")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(data_set_root(), "nuclei"),
        help="default: $DETECTRON2_DATASETS/nuclei or datasets/nuclei",
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="default: train val")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--link", action="store_true", help="link to the pictures (the default)")
    how.add_argument("--copy", action="store_true", help="copy the pictures")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one a core)")
    options = parser.parse_args(arguments)

    for split in options.splits:
        _check_input(options.input, split)
    failed = False
    for split in options.splits:
        problems = _prepare(options.input, options.output, split, options.copy, options.workers)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        failed = failed or bool(problems)
        summary = f"{len(problems)} annotations could not be made" if problems else "complete"
        print(f"{options.output / split}: {summary}")
    return int(failed)


def _check_input(source: Path, split: str) -> None:
    """Raise ``UserError`` if the split's annotations or some of its pictures are missing."""
    annotations = source / "annotations" / f"{split}.json"
    hint = "give the folder of the nuclei as --input, or other --splits"
    classes = [category["id"] for category in read_classes("nuclei")]
    images = load_instances_json(annotations, hint, classes)["images"]
    missing = [image["file_name"] for image in images if not (source / split / image["file_name"]).is_file()]
    if missing:
        raise UserError(
            f"'{source / split}': {len(missing)} of the {len(images)} pictures in '{annotations}' are missing, the "
            f"first is '{missing[0]}'"
        )


def _prepare(source: Path, output: Path, split: str, copy: bool, workers: int) -> list[str]:
    for part in (split, f"annotations/{split}.json"):
        _place(source / part, output / part, copy)
    categories = read_classes("nuclei")
    background = next(category["id"] for category in categories if not category["isthing"])
    return instances_to_panoptic(
        output / "annotations" / f"{split}.json",
        categories,
        output / "annotations" / f"panoptic_{split}.json",
        output / f"panoptic_{split}",
        output / f"panoptic_semseg_{split}",
        background=background,
        workers=workers,
    )


def _place(source: Path, target: Path, copy: bool) -> None:
    """Make ``target`` a link to ``source``, a file or a folder, or a copy of it."""
    if target.exists() and target.samefile(source):
        return
    if copy:
        _copy(source, target)
        return
    if target.exists() or target.is_symlink():
        raise UserError(f"'{target}' exists and is not '{source}': remove it, or choose another --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError as error:
        raise UserError(f"cannot link '{target}' to '{source}': {error}: try --copy") from error


def _copy(source: Path, target: Path) -> None:
    """Copy a file, or the files of a folder, that are not there yet."""
    if source.is_dir():
        for file in sorted(source.iterdir()):
            _copy(file, target / file.name)
    elif not target.exists() or target.stat().st_size != source.stat().st_size:
        with open(source, "rb") as content:
            write_whole(target, lambda file: shutil.copyfileobj(content, file))


if __name__ == "__main__":
    command(main)
