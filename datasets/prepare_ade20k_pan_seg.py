#!/usr/bin/env python3
"""Make ADE20K's panoptic annotations, ``ade20k_panoptic_{train,val}``.

Made from ``images``, ``annotations`` (stuff) and ``annotations_instance`` (things), in COCO's panoptic format.
Can be interrupted and started again.
"""

from collections.abc import Sequence
from functools import partial

from mask2former.data.ade20k_files import FOLDER, SPLITS, make_panoptic
from mask2former.data.preparation import read_options, run_splits
from mask2former.errors import command


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(__doc__, FOLDER, list(SPLITS), arguments)
    return run_splits(options.splits, partial(make_panoptic, options))


if __name__ == "__main__":
    command(main)
