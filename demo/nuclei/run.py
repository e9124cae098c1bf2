#!/usr/bin/env python
"""Segment the six microscopy pictures beside this file with the model beside it, draw and score the results.

This is what ``make demo`` runs.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data.datasets import register_coco_instances
from matplotlib.figure import Figure
from tqdm import tqdm

from mask2former.data import load_dataset, read_image
from mask2former.data.panoptic_files import save_json, save_png, write_whole
from mask2former.drawing import OUTPUT_KINDS, Picture, draw
from mask2former.errors import UserError, command
from mask2former.evaluation import InstanceSegEvaluator
from mask2former.predictor import Predictor
from mask2former.results import confident, to_json

FOLDER = Path(__file__).resolve().parent
CONFIG = FOLDER.parent.parent / "configs" / "quick" / "nuclei.yaml"
DATASET = "nuclei_demo"


def main() -> None:
    """Run the command."""
    args = _parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.perf_counter()
    weights = args.folder / "model.safetensors"
    print(f"segmenting the pictures of {os.path.relpath(args.folder / 'images')} with {os.path.relpath(weights)}")
    predictor = Predictor(args.config_file, weights, device=args.device, semantic_labels=True)
    metrics, rows = _segment(predictor, args.folder, args.output, args.confidence_threshold)
    _save_overview(args.output / "overview.png", rows)
    print(
        f"mask AP {metrics['AP']:.1f}, AP50 {metrics['AP50']:.1f} on these pictures; "
        f"recorded when the model was made: {_recorded(args.folder / 'metrics.json')}"
    )
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; pictures and JSON are in {args.output}{os.sep}, see overview.png there")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo/nuclei/run.py", description="Segment, draw and score the microscopy pictures of a folder."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/demo"), metavar="FOLDER", help="default: %(default)s"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=FOLDER,
        help="what to segment and with what: images/, annotations/instances.json in COCO's format, "
        "model.safetensors, metrics.json; default: the six pictures and the model that the project ships",
    )
    parser.add_argument("--config-file", type=Path, default=CONFIG, metavar="FILE", help="the model's recipe")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="instances that score less are not drawn, but count in the AP; default: %(default)s",
    )
    parser.add_argument("--device", help="default: the recipe's, or the CPU if there is no CUDA")
    return parser.parse_args()


def _segment(
    predictor: Predictor, folder: Path, output: Path, threshold: float
) -> tuple[dict[str, float], list[list[Picture]]]:
    """Write each picture's results; the metrics of all, and for each the picture and what was drawn on it."""
    register_coco_instances(DATASET, {}, str(folder / "annotations" / "instances.json"), str(folder / "images"))
    rows = []
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = load_dataset(DATASET)
        evaluator = InstanceSegEvaluator(DATASET)
        evaluator.reset()
    for record in tqdm(dataset, unit="picture", disable=None):
        image = read_image(record["file_name"], "RGB")
        outputs = predictor(image, image_format="RGB")
        # Average precision is over all instances, whatever they score.
        evaluator.process([record], [outputs])
        rows.append([image, *_write(output, Path(record["file_name"]), image, outputs, predictor, threshold)])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()["segm"], rows


def _write(
    output: Path, file: Path, image: Picture, outputs: dict[str, Any], predictor: Predictor, threshold: float
) -> list[Picture]:
    shown = confident(outputs, threshold)
    for kind, drawing in draw(image, shown, predictor.metadata):
        save_png(output / f"{file.stem}_{kind}.png", drawing)
    save_json(output / f"{file.stem}.json", to_json(shown, predictor.metadata, file=file.name))
    return [drawing for _, drawing in draw(image, shown, predictor.metadata, labels=False)]


def _save_overview(path: Path, rows: Sequence[Sequence[Picture]]) -> None:
    """One sheet with a row for each picture: the picture, instances, panoptic and semantic segmentation."""
    shapes = [row[0].shape for row in rows]
    heights = [3 * height / width for height, width, _ in shapes]  # inches, for columns of 3 inches
    figure = Figure(figsize=(3 * len(rows[0]), sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
    for axis, title in zip(axes[0], ("picture", *OUTPUT_KINDS), strict=False):
        axis.set_title(title)
    for axis, picture in zip(axes.flat, (picture for row in rows for picture in row), strict=True):
        axis.imshow(picture)
        axis.axis("off")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def _recorded(path: Path) -> str:
    """What was measured on these pictures when the model was trained."""
    if not path.is_file():
        return "nothing"
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["six"]
        return f"AP {recorded['AP']:.1f}, AP50 {recorded['AP50']:.1f}"
    except (ValueError, KeyError) as error:
        raise UserError(f"'{path}' should hold AP and AP50 under 'six': restore the file") from error


if __name__ == "__main__":
    command(main)
