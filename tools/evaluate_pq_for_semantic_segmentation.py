#!/usr/bin/env python
"""Panoptic quality (PQ) and mIoU of a semantic segmentation, all classes taken for stuff.

Reads sem_seg_predictions.json, which an evaluation of semantic output writes into its inference folder, and the label
PNGs of a registered data set. Pixels that no prediction covers have no class.

example:
  python tools/evaluate_pq_for_semantic_segmentation.py --dataset-name ade20k_sem_seg_val \\
      --json-file output/inference/sem_seg_predictions.json
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from tabulate import tabulate
from tqdm import tqdm

from mask2former.data import load_dataset
from mask2former.errors import UserError, command
from mask2former.evaluation.semantic import paint_predictions, read_truth
from mask2former.evaluation.semantic_quality import SemanticQuality, SemanticResults
from mask2former.evaluation.truth import read_json

Prediction = dict[str, Any]  # category_id, as the data set's files have it, and segmentation, run lengths


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    label_files = _label_files(args.dataset_name)
    metadata = MetadataCatalog.get(args.dataset_name)
    predictions = _read_predictions(args.json_file, args.dataset_name, label_files)
    if len(predictions) < len(label_files):
        print(
            f"{args.json_file} has {len(predictions)} of the data set's {len(label_files)} pictures: only these count"
        )

    quality = SemanticQuality(len(metadata.stuff_classes))
    for name, regions in tqdm(predictions.items(), unit="picture", disable=None):
        truth = read_truth(label_files[name], metadata)
        quality.add(truth, paint_predictions(regions, truth.shape, metadata, name))
    _show(quality.results(), metadata, per_class=args.per_class)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset-name",
        default="ade20k_sem_seg_val",
        metavar="NAME",
        help="a registered data set with label PNGs; default: %(default)s",
    )
    parser.add_argument("--json-file", required=True, metavar="FILE", help="sem_seg_predictions.json of an evaluation")
    parser.add_argument("--per-class", action="store_true", help="show each class too")
    return parser.parse_args(arguments)


def _label_files(dataset_name: str) -> dict[str, str]:
    """The label PNG of each picture, by the picture's name without folder and ending."""
    dicts = load_dataset(dataset_name)
    if any("sem_seg_file_name" not in dataset_dict for dataset_dict in dicts):
        raise UserError(f"data set '{dataset_name}' has no label PNGs (sem_seg_file_name) to compare with")
    return {Path(dataset_dict["file_name"]).stem: dataset_dict["sem_seg_file_name"] for dataset_dict in dicts}


def _read_predictions(path: str, dataset_name: str, known: Mapping[str, str]) -> dict[str, list[Prediction]]:
    """The predictions of each picture, by its name without folder and ending."""
    content = read_json("predictions", path)
    needed = {"file_name", "category_id", "segmentation"}
    if not isinstance(content, list) or not all(isinstance(p, dict) and needed <= p.keys() for p in content):
        raise UserError(
            f"{path} is not a file of semantic predictions: expected a list with {', '.join(sorted(needed))} each"
        )
    if not content:
        raise UserError(f"{path} has no predictions: there is nothing to evaluate")
    by_picture: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in content:
        by_picture[Path(prediction["file_name"]).stem].append(prediction)
    unknown = by_picture.keys() - known.keys()
    if unknown:
        raise UserError(
            f"{path} has predictions for {min(unknown)}, which data set '{dataset_name}' does not have: "
            "give the data set that they were made for as --dataset-name"
        )
    return by_picture


def _show(results: SemanticResults, metadata: Metadata, *, per_class: bool) -> None:
    if per_class:
        rows = zip(metadata.stuff_classes, results.pq, results.sq, results.rq, results.iou, strict=True)
        _print_table(["class", "PQ", "SQ", "RQ", "IoU"], [list(row) for row in rows])
        print()
    means = [results.mean(metric) for metric in ("pq", "sq", "rq")]
    row = ["all", *means, results.mean_iou, int(results.found.sum())]
    _print_table(["", "PQ", "SQ", "RQ", "mIoU", "classes"], [row])


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3f"))


if __name__ == "__main__":
    command(main)
