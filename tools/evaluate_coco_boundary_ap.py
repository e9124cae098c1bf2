#!/usr/bin/env python
"""Boundary AP of instance segmentation: COCO's AP with boundary IoU, which is strict about contours.

example:
  python tools/evaluate_coco_boundary_ap.py --gt-json-file datasets/coco/annotations/instances_val2017.json \\
      --dt-json-file output/inference/coco_instances_results.json
"""

import argparse
from collections.abc import Sequence

from tabulate import tabulate

from mask2former.errors import UserError, command
from mask2former.evaluation.boundary import DILATION_RATIO, average_precision
from mask2former.evaluation.truth import read_json


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    truth = read_json("ground truth", args.gt_json_file)
    lacking = {"images", "annotations", "categories"} - set(truth)
    if lacking:
        raise UserError(
            f"{args.gt_json_file} is not in COCO's instance format, or has no ground truth: it lacks "
            f"{', '.join(sorted(lacking))}"
        )
    results = read_json("results", args.dt_json_file)
    if not isinstance(results, list):
        raise UserError(f"{args.dt_json_file} is not in COCO's result format: expected a list of instances")
    by_boundary = args.iou_type == "boundary"
    figures = average_precision(truth, results, boundary=by_boundary, dilation_ratio=args.dilation_ratio)
    print(f"\n{'Boundary' if by_boundary else 'Mask'} AP of {len(results)} instances, in percent:")
    print(tabulate([list(figures.values())], headers=list(figures), tablefmt="github", floatfmt=".3f"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gt-json-file", required=True, metavar="FILE", help="ground truth, COCO's instance format")
    parser.add_argument(
        "--dt-json-file", required=True, metavar="FILE", help="results: coco_instances_results.json of an evaluation"
    )
    parser.add_argument(
        "--iou-type",
        choices=("boundary", "segm"),
        default="boundary",
        help="boundary: the smaller of boundary IoU and mask IoU; segm: mask IoU; default: %(default)s",
    )
    parser.add_argument(
        "--dilation-ratio",
        type=float,
        default=DILATION_RATIO,
        metavar="SHARE",
        help="width of the boundary as a share of the picture's diagonal; default: %(default)s",
    )
    args = parser.parse_args(arguments)
    if not 0 < args.dilation_ratio <= 1:
        raise UserError(f"--dilation-ratio is {args.dilation_ratio}, expected more than 0 and at most 1")
    return args


if __name__ == "__main__":
    command(main)
