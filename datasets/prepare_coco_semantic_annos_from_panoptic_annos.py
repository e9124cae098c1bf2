#!/usr/bin/env python3
"""Make COCO's semantic PNGs, ``panoptic_semseg_{train,val}2017``, from its panoptic annotations.

A pixel's label is the contiguous id (0 to 132) of its segment's class, things and stuff alike; 255 where there is no
segment. Can be interrupted and started again.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from mask2former.data.datasets import data_set_root
from mask2former.data.panoptic_files import panoptic_to_semantic
from mask2former.data.preparation import run_splits
from mask2former.errors import UserError, command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(data_set_root(), "coco"),
        help="folder with annotations/ and panoptic_*2017/ (default: $DETECTRON2_DATASETS/coco or datasets/coco)",
    )
    parser.add_argument("--output", type=Path, help="folder that gets panoptic_semseg_*2017/ (default: --root)")
    parser.add_argument("--splits", nargs="+", default=["val2017", "train2017"], help="default: val2017 train2017")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one a core)")
    options = parser.parse_args(arguments)

    for split in options.splits:
        for path in (options.root / f"annotations/panoptic_{split}.json", options.root / f"panoptic_{split}"):
            if not path.exists():
                raise UserError(f"'{path}' does not exist: give COCO's folder as --root, or other --splits")

    labels = {category["id"]: index for index, category in enumerate(COCO_CATEGORIES)}

    def make(split: str) -> tuple[Path, list[str]]:
        target = (options.output or options.root) / f"panoptic_semseg_{split}"
        source = options.root / f"annotations/panoptic_{split}.json"
        pngs = options.root / f"panoptic_{split}"
        return target, panoptic_to_semantic(source, pngs, target, labels, workers=options.workers)

    return run_splits(options.splits, make)


if __name__ == "__main__":
    command(main)
