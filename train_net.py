#!/usr/bin/env python
"""Train or evaluate a model that a config file describes.

Examples:
    python train_net.py --config-file configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml --num-gpus 8
    python train_net.py --config-file configs/quick/nuclei.yaml --resume
    python train_net.py --config-file FILE --eval-only MODEL.WEIGHTS model.pth
"""

import argparse

import torch
from detectron2.engine import default_argument_parser, launch

from mask2former.engine import evaluate_weights, load_recipe, setup_run, train
from mask2former.errors import UserError, command


def run(args: argparse.Namespace) -> None:
    """Train or evaluate on one process."""
    recipe = load_recipe(args.config_file, args.opts)
    setup_run(recipe.config, args)
    if args.eval_only:
        evaluate_weights(recipe, resume=args.resume)
    else:
        train(recipe, resume=args.resume)


def main() -> None:
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if args.num_gpus > max(gpus, 1):
        raise UserError(f"--num-gpus is {args.num_gpus}, but this machine has {gpus}: give at most {max(gpus, 1)}")
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    command(main)
