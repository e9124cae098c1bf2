#!/usr/bin/env python
"""Train or evaluate a model that a config file describes.

Examples:
    python train_net.py --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml --num-gpus 8
    python train_net.py --config-file configs/quick/nuclei.yaml --num-processes 2
    python train_net.py --config-file configs/quick/nuclei.yaml --resume
    python train_net.py --config-file FILE --eval-only MODEL.WEIGHTS model.pth
    python train_net.py --config-file FILE --train-data train.json --val-data val.json
"""

import argparse

from detectron2.engine import default_argument_parser

from mask2former.engine import (
    DataPaths,
    add_data_options,
    add_launch_options,
    evaluate_weights,
    launch,
    load_recipe,
    setup_run,
    train,
)
from mask2former.errors import command


def run(args: argparse.Namespace) -> None:
    """Train or evaluate on one process."""
    recipe = load_recipe(args.config_file, args.opts, DataPaths.from_options(args))
    setup_run(recipe.config, args)
    if args.eval_only:
        evaluate_weights(recipe, resume=args.resume)
    else:
        train(recipe, resume=args.resume)


def main() -> None:
    parser = default_argument_parser(epilog=__doc__)
    add_launch_options(parser)
    add_data_options(parser)
    launch(run, parser.parse_args())


if __name__ == "__main__":
    command(main)
