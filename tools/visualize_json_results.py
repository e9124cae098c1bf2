#!/usr/bin/env python
"""Draw an evaluation's result file on the pictures, beside the ground truth.

Takes coco_instances_results.json (instances) or sem_seg_predictions.json (classes of pixels). Each picture of the file
gives one of the same name: predictions left, ground truth right.

examples:
  python tools/visualize_json_results.py --input output/inference/coco_instances_results.json \\
      --dataset coco_2017_val --output drawn/ --conf-threshold 0.6
  python tools/visualize_json_results.py --input output/inference/sem_seg_predictions.json \\
      --dataset ade20k_sem_seg_val --output drawn/
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Instances
from tqdm import tqdm

from mask2former.data import load_dataset, read_image
from mask2former.data.annotations import decode_segmentation
from mask2former.data.panoptic_files import save_png
from mask2former.drawing import Palette, Picture, draw_instances, draw_semantic
from mask2former.errors import UserError, command
from mask2former.evaluation.semantic import paint_predictions, read_truth
from mask2former.evaluation.truth import read_json
from mask2former.structures import CroppedMasks

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    records = read_json("results", args.input)
    key = _kind(args.input, records)
    draw = _InstanceDrawer if key == "image_id" else _SemanticDrawer
    drawer = draw(MetadataCatalog.get(args.dataset), args.conf_threshold)
    chosen = _with_results(args, records, key)

    for dataset_dict, found in tqdm(chosen, unit="picture", disable=None):
        image = read_image(dataset_dict["file_name"])
        palette = Palette()  # one for both: an object that was found has the colour of its ground truth
        panels = [drawer.draw(image, found, dataset_dict, palette)]
        if drawer.has_truth(dataset_dict) and not args.no_ground_truth:
            panels.append(drawer.draw_truth(image, dataset_dict, palette))
        save_png(args.output / f"{Path(dataset_dict['file_name']).stem}.png", np.concatenate(panels, axis=1))
    print(f"{len(chosen)} pictures in {args.output}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, metavar="FILE", help="result file of an evaluation")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="made if it is not there")
    parser.add_argument(
        "--dataset", default="coco_2017_val", metavar="NAME", help="registered data set; default: %(default)s"
    )
    parser.add_argument(
        "--conf-threshold", type=float, default=0.5, metavar="SCORE", help="of instances; default: %(default)s"
    )
    parser.add_argument("--max-pictures", type=int, metavar="N", help="stop after this many; default: all")
    parser.add_argument("--no-ground-truth", action="store_true", help="draw the predictions alone")
    args = parser.parse_args(arguments)
    if not 0 <= args.conf_threshold <= 1:
        raise UserError(f"--conf-threshold is {args.conf_threshold}, expected 0 to 1")
    if args.max_pictures is not None and args.max_pictures < 1:
        raise UserError(f"--max-pictures is {args.max_pictures}, expected at least 1")
    return args


def _kind(path: str, records: Any) -> str:
    """What tells the pictures of a result file apart: "image_id" in instances, "file_name" in semantic results."""
    if isinstance(records, list):
        for key, needed in (("image_id", "score"), ("file_name", "category_id")):
            if all(isinstance(r, dict) and {key, needed, "segmentation"} <= r.keys() for r in records):
                return key
    raise UserError(
        f"{path} is neither a file of instances with masks nor of semantic predictions: "
        "give coco_instances_results.json or sem_seg_predictions.json"
    )


def _with_results(args: argparse.Namespace, records: Sequence[Record], key: str) -> list[tuple[Record, list[Record]]]:
    """The data set's pictures that the file has results for, with them."""
    if not records:
        raise UserError(f"{args.input} has no results: there is nothing to draw")
    by_picture: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        by_picture[record[key]].append(record)
    dicts = [d for d in load_dataset(args.dataset) if d.get(key) in by_picture]
    if not dicts:
        raise UserError(
            f"{args.input} has results for none of the pictures of data set '{args.dataset}': "
            "give the one that they were made for as --dataset"
        )
    return [(d, by_picture[d[key]]) for d in dicts[: args.max_pictures]]


class _InstanceDrawer:
    """Draws instances, of results and of dataset dicts."""

    def __init__(self, metadata: Metadata, threshold: float) -> None:
        self._metadata = metadata
        self._threshold = threshold

    def draw(self, image: Picture, results: Sequence[Record], dataset_dict: Record, palette: Palette) -> Picture:
        confident = [result for result in results if result["score"] >= self._threshold]
        instances = self._instances(
            image, confident, [self._contiguous_id(result["category_id"]) for result in confident], dataset_dict
        )
        instances.scores = torch.tensor([result["score"] for result in confident])
        return draw_instances(image, instances, self._metadata, palette=palette)

    @staticmethod
    def has_truth(dataset_dict: Record) -> bool:
        return "annotations" in dataset_dict

    def draw_truth(self, image: Picture, dataset_dict: Record, palette: Palette) -> Picture:
        objects = [annotation for annotation in dataset_dict["annotations"] if not annotation.get("iscrowd", 0)]
        classes = [annotation["category_id"] for annotation in objects]
        instances = self._instances(image, objects, classes, dataset_dict)
        return draw_instances(image, instances, self._metadata, palette=palette)

    def _contiguous_id(self, category: int) -> int:
        contiguous_ids: Mapping[int, int] | None = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous_ids is None:  # LVIS
            return category - 1
        if category not in contiguous_ids:
            raise UserError(f"the results have category_id {category}, which the data set has no thing class for")
        return contiguous_ids[category]

    @staticmethod
    def _instances(image: Picture, objects: Sequence[Record], classes: list[int], dataset_dict: Record) -> Instances:
        height, width = image.shape[:2]
        name = f"an instance of picture '{dataset_dict['file_name']}'"
        parts = [
            CroppedMasks.from_masks(
                torch.from_numpy(decode_segmentation(instance["segmentation"], height, width, name))[None]
            )
            for instance in objects
        ]
        instances = Instances((height, width))
        instances.pred_masks = CroppedMasks.cat(parts) if parts else CroppedMasks([], [], (height, width))
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        return instances


class _SemanticDrawer:
    """Draws the class of each pixel, of results and of label PNGs."""

    def __init__(self, metadata: Metadata, threshold: float) -> None:
        if metadata.get("stuff_classes") is None:
            raise UserError(
                f"the results are semantic, and data set '{metadata.name}' has no semantic classes: give the one that "
                "they were made for as --dataset"
            )
        self._metadata = metadata

    def draw(self, image: Picture, results: Sequence[Record], dataset_dict: Record, palette: Palette) -> Picture:
        name = f"'{dataset_dict['file_name']}'"
        return self._draw(image, paint_predictions(results, image.shape[:2], self._metadata, name))

    @staticmethod
    def has_truth(dataset_dict: Record) -> bool:
        return "sem_seg_file_name" in dataset_dict

    def draw_truth(self, image: Picture, dataset_dict: Record, palette: Palette) -> Picture:
        return self._draw(image, read_truth(dataset_dict["sem_seg_file_name"], self._metadata))

    def _draw(self, image: Picture, classes: np.ndarray) -> Picture:
        nothing = len(self._metadata.stuff_classes)
        return draw_semantic(image, classes, self._metadata, ignore_label=nothing)


if __name__ == "__main__":
    command(main)
