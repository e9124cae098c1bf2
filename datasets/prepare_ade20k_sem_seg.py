#!/usr/bin/env python3
"""Make ADE20K's semantic PNGs, ``annotations_detectron2``, from the downloaded ones.

A pixel's label is the class, 0 to 149, or 255 where there is none.
Can be interrupted and started again.
"""

from collections.abc import Sequence
from functools import partial

from mask2former.data.ade20k_files import FOLDER, SPLITS, make_semantic
from mask2former.data.preparation import read_options, run_splits
from mask2former.errors import command


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(__doc__, FOLDER, list(SPLITS), arguments)
    return run_splits(options.splits, partial(make_semantic, options))


if __name__ == "__main__":
    command(main)
