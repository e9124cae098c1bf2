#!/usr/bin/env python3
"""Make ADE20K's instance annotations, ``ade20k_instance_{train,val}.json``.

Made from ``images`` and ``annotations_instance``, in COCO's format.
Can be interrupted and started again.
"""

from collections.abc import Sequence
from functools import partial

from mask2former.data.ade20k_files import FOLDER, SPLITS, make_instances
from mask2former.data.preparation import read_options, run_splits
from mask2former.errors import command


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(__doc__, FOLDER, list(SPLITS), arguments)
    return run_splits(options.splits, partial(make_instances, options))


if __name__ == "__main__":
    command(main)
