#!/usr/bin/env python
"""Split one annotation file in COCO's form, of instances or panoptic segments, into two: for training and validation.

The pictures are drawn by a seed: the same file, share and seed give the same split, whatever the order in the file.
Nothing is balanced, and entries of one picture file stay together. Pictures and PNGs stay where they are.

examples:
  python tools/split_dataset.py annotations.json --val-share 0.2
  python tools/split_dataset.py annotations.json --val-share 0.1 --seed 7 --output folder/
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask2former.data.datasets.coco_format import load_json
from mask2former.data.panoptic_files import save_json
from mask2former.errors import UserError, command

Content = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    content = load_json(args.file)
    _check(content, args.file)
    chosen = _draw([image["file_name"] for image in content["images"]], args.val_share, args.seed)
    folder = args.output or args.file.parent
    parts = {
        folder / f"{args.file.stem}_train.json": _part(content, chosen, inside=False),
        folder / f"{args.file.stem}_val.json": _part(content, chosen, inside=True),
    }
    existing = [str(path) for path in parts if path.exists()]
    if existing and not args.overwrite:
        raise UserError(f"{' and '.join(existing)} exist: give another --output, or --overwrite")
    for path, part in parts.items():
        save_json(path, part)
        print(f"{path}: {len(part['images'])} pictures, {len(part['annotations'])} annotations")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="annotations in COCO's form")
    parser.add_argument("--val-share", type=float, default=0.2, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: the file's own")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(arguments)
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share is {args.val_share}, expected more than 0 and less than 1")
    return args


def _check(content: Any, file: Path) -> None:
    """Raise ``UserError`` unless every annotation belongs to one picture."""
    for key, needed in (("images", {"id", "file_name"}), ("annotations", {"image_id"})):
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(r, dict) and needed <= r.keys() for r in records):
            raise UserError(
                f"'{file}' has no list '{key}' of records with {' and '.join(sorted(needed))}: is it COCO's form?"
            )
    counts = Counter(image["id"] for image in content["images"])
    twice = [image_id for image_id, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"'{file}' has {counts[twice[0]]} pictures with the id {twice[0]}: give each an id of its own")
    for annotation in content["annotations"]:
        if annotation["image_id"] not in counts:
            raise UserError(
                f"'{file}': annotation {annotation.get('id')} has image_id {annotation['image_id']}, which is not in "
                "its 'images': remove it, or add the picture"
            )


def _draw(file_names: Sequence[str], share: float, seed: int) -> set[str]:
    """The share of the files, rounded to whole ones, to validate on."""
    files = sorted(set(file_names))
    count = round(share * len(files))
    if not 0 < count < len(files):
        raise UserError(
            f"a share of {share} of {len(files)} pictures is {count}, which leaves nothing to train on or to validate "
            "on: give another --val-share"
        )
    random.Random(seed).shuffle(files)
    return set(files[:count])


def _part(content: Content, chosen: set[str], *, inside: bool) -> Content:
    """The content with the pictures that are, or are not, chosen; in their order."""
    images = [image for image in content["images"] if (image["file_name"] in chosen) == inside]
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in content["annotations"] if annotation["image_id"] in ids]
    return {**content, "images": images, "annotations": annotations}


if __name__ == "__main__":
    command(main)
