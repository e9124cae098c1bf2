#!/usr/bin/env python
"""Draw the losses and metrics of a run, or of several to compare them, from the metrics.json of their output folders.

A run draws itself (metrics.png in its output folder) after each evaluation and at its end.

examples:
  python tools/plot_metrics.py output/nuclei
  python tools/plot_metrics.py output/first output/second --output compared.png
  python tools/plot_metrics.py output/nuclei --metrics segm/AP50 loss_ce_0
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mask2former.engine.curves import PICTURE, draw_curves, read_metrics
from mask2former.errors import command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    path = args.output or (args.folders[0] if len(args.folders) == 1 else Path()) / PICTURE
    draw_curves({str(folder): read_metrics(folder) for folder in args.folders}, path, names=args.metrics)
    print(path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR", help="output folders of runs")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f".png, .pdf or .svg; default: {PICTURE} in the run's folder, or for several runs in the current one",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=(),
        metavar="NAME",
        help="as in metrics.json; default: losses, learning rate, and PQ, AP and mIoU of every task",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    command(main)
