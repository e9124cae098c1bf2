#!/usr/bin/env python3
"""Let a small model learn a handful of COCO pictures by heart, and check how well it did.

Trains on a few pictures of train2017 with their panoptic annotations and evaluates on the same ones: where the panoptic
quality stays low, something between reading the annotations and judging the segments is broken. Takes minutes on a CPU.
The exit code is 1 where the panoptic quality is lower than expected.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from mask2former.data import register_panoptic
from mask2former.data.datasets import data_set_root, panoptic_metadata
from mask2former.data.datasets.coco_format import load_json
from mask2former.data.panoptic_files import save_json
from mask2former.engine import load_recipe, setup_run, train
from mask2former.errors import UserError, command

RECIPE = Path(__file__).resolve().parent.parent / "configs/quick/coco_overfit.yaml"
DATA_SET = "coco_overfit"
SPLIT = "train2017"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    annotations = options.coco / f"annotations/panoptic_{SPLIT}.json"
    content = load_json(annotations, "give COCO's folder as --coco")
    missing = {"images", "annotations", "categories"} - set(content)
    if missing:
        raise UserError(f"'{annotations}' is not in COCO's panoptic format: it lacks {', '.join(sorted(missing))}")
    image_ids = options.images or sorted(annotation["image_id"] for annotation in content["annotations"])
    subset = choose_pictures(content, image_ids[: options.count], annotations)
    register_subset(subset, options.coco, options.output)

    overrides = ["DATASETS.TRAIN", repr((DATA_SET,)), "DATASETS.TEST", repr((DATA_SET,))]
    recipe = load_recipe(str(options.config_file), [*overrides, "OUTPUT_DIR", str(options.output), *options.opts])
    setup_run(recipe.config, argparse.Namespace(config_file=str(options.config_file), eval_only=False))
    quality = train(recipe)["panoptic_seg"]["PQ"]

    reached = quality >= options.expected_pq
    names = ", ".join(sorted(image["file_name"] for image in subset["images"]))
    print(f"PQ {quality:.1f} on {names}: {'as' if reached else 'NOT as'} expected, at least {options.expected_pq:g}")
    return int(not reached)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--coco",
        type=Path,
        default=Path(data_set_root(), "coco"),
        help=f"folder with {SPLIT}/, panoptic_{SPLIT}/ and annotations/, only read "
        "(default: $DETECTRON2_DATASETS/coco or datasets/coco)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--count", type=int, default=4, help="take this many pictures, of the lowest ids (default: 4)")
    which.add_argument("--images", type=int, nargs="+", metavar="ID", help="take the pictures with these ids")
    parser.add_argument("--output", type=Path, default=Path("output/coco_overfit"), help="default: %(default)s")
    parser.add_argument("--expected-pq", type=float, default=80.0, help="in percent (default: 80)")
    parser.add_argument("--config-file", type=Path, default=RECIPE, help="default: configs/quick/coco_overfit.yaml")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="options over the config file's")
    options = parser.parse_args(arguments)
    if options.images:
        options.count = len(options.images)
    if options.count < 1:
        raise UserError(f"--count is {options.count}, expected at least 1")
    return options


def choose_pictures(content: dict[str, Any], image_ids: Sequence[int], source: Path) -> dict[str, Any]:
    """What COCO's panoptic file ``content`` holds about some pictures, as the contents of a file like it.

    Args:
        source: where ``content`` is from, for messages.

    Raises:
        UserError: if it lacks one of the pictures.
    """
    missing = set(image_ids) - {annotation["image_id"] for annotation in content["annotations"]}
    if missing:
        raise UserError(f"'{source}' has no annotation of picture {min(missing)}: give other ids as --images")
    return {
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [annotation for annotation in content["annotations"] if annotation["image_id"] in image_ids],
        "categories": content["categories"],
    }


def register_subset(subset: dict[str, Any], coco: Path, output: Path) -> None:
    """Write the annotations to ``output`` and register them; pictures and PNGs stay in COCO's folder."""
    panoptic_json = output / "panoptic.json"
    save_json(panoptic_json, subset)
    register_panoptic(
        DATA_SET,
        panoptic_metadata(COCO_CATEGORIES),
        image_root=str(coco / SPLIT),
        panoptic_root=str(coco / f"panoptic_{SPLIT}"),
        panoptic_json=str(panoptic_json),
    )


if __name__ == "__main__":
    command(main)
