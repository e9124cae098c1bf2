#!/usr/bin/env python
"""What activations of a training step take, and how long it takes, with activation checkpointing of each part.

The recipe's model has random weights and its optimizer a state; a process of its own for each case takes a step with
one picture. Memory is what that adds at its peak to weights, gradients and the optimizer's state: activations, and
what is made on the way. Time is the processors', of all threads together, so that other work on the machine counts
little.

--count runs nothing: it counts what backbone, pixel decoder and transformer decoder keep for the backward pass, and
beside that the inside of the largest layer that is computed twice. That is what a step adds but for gradients on the
way, losses and scratch memory.

examples:
  python benchmarks/training_memory.py
  python benchmarks/training_memory.py --sizes 512 --cases nothing backbone --config-file \\
      configs/coco/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml
  python benchmarks/training_memory.py --count
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.structures import Instances
from machine import describe, peak_memory, processors
from tabulate import tabulate
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mask2former.engine import Recipe, load_recipe
from mask2former.errors import UserError, command
from mask2former.modeling.checkpointing import PARTS, LayerCheckpointing

__all__ = ["random_sample"]

RECIPE = Path(__file__).resolve().parent.parent / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
CASES = {"nothing": (), **{name: (name,) for name in PARTS}, "all": tuple(PARTS)}
SMALL = 128  # the side of the picture that makes gradients and the optimizer's state
OBJECTS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    if args.only:
        print(json.dumps(_measure(args)))
        return
    if args.count:
        for side in args.sizes:
            rows = [[case, *(f"{n / 1e6:.0f}" for n in _count(CASES[case], side, args))] for case in args.cases]
            print(f"\n{side} x {side} pixels")
            headers = ["computed twice", "kept, MB", "inside the largest layer, MB"]
            print(tabulate(rows, headers=headers, disable_numparse=True))
        return
    machine = describe([args.threads])
    for side in args.sizes:
        figures = {case: _measure_in_another_process(case, side, args) for case in args.cases}
        rows = [[case, f"{of['added'] / 2**20:.0f}", f"{of['seconds']:.2f}"] for case, of in figures.items()]
        print(f"\n{side} x {side} pixels, {OBJECTS} objects")
        print(
            tabulate(rows, headers=["computed twice", "memory added, MiB", "processor seconds"], disable_numparse=True)
        )
    print("\n" + "\n".join(f"{key}: {value}" for key, value in machine.items()))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default=str(RECIPE), metavar="FILE", help="YAML recipe; default: R50, COCO panoptic")
    add("--sizes", nargs="+", type=int, default=[512, 1024], metavar="N", help="sides of pictures; default: 512 1024")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="what is computed twice; default: each")
    add("--threads", type=int, default=processors(), metavar="N", help="default: the number of processors")
    add("--count", action="store_true", help="only count what is kept, without running")
    add("--only", choices=CASES, help="measure this case in this process, at the first size, and say it as JSON")
    args = parser.parse_args(arguments)
    if min(args.sizes) < 64 or args.threads < 1:
        raise UserError(f"--sizes is {args.sizes} and --threads {args.threads}, expected at least 64 and 1")
    return args


def _measure_in_another_process(case: str, side: int, args: argparse.Namespace) -> dict[str, float]:
    warnings = [f"-W{option}" for option in sys.warnoptions]
    options = ["--only", case, "--sizes", str(side), "--threads", str(args.threads), "--config-file", args.config_file]
    # So that glibc gives back whatever is freed, and peaks are those of tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    program = [sys.executable, *warnings, __file__, *options]
    child = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    figures = json.loads(child.stdout.splitlines()[-1])
    print(f"{side}, {case}: {figures}", file=sys.stderr, flush=True)
    return figures


def _recipe(parts: Sequence[str], args: argparse.Namespace) -> Recipe:
    options = ["MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.ACTIVATION_CHECKPOINTING", str(list(parts))]
    return load_recipe(args.config_file, options)


def _count(parts: Sequence[str], side: int, args: argparse.Namespace) -> tuple[int, int]:
    """Bytes kept for the backward pass, and inside the largest layer that is computed twice."""
    model = _recipe(parts, args).build_model().train()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    largest = 0

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    def run_layer(stack: LayerCheckpointing, layer: Any, *inputs: Any) -> Any:
        nonlocal kept, largest
        before = dict(kept)
        output = layer(*inputs)
        if stack.checkpointing:
            inside = sum(storage.nbytes() for key, storage in kept.items() if key not in before)
            largest, kept = max(largest, inside), before
            for x in inputs:
                if isinstance(x, Tensor):
                    keep(x)
        return output

    with (
        mock.patch.object(LayerCheckpointing, "run_layer", run_layer),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        output = model.sem_seg_head(model.backbone(torch.empty(1, 3, side, side)))
    assert output.mask_features.shape[-1] == side // 4
    return sum(storage.nbytes() for storage in kept.values()), largest


def _measure(args: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recipe = _recipe(CASES[args.only], args)
    model = recipe.build_model().train()
    optimizer = recipe.build_optimizer(model)

    def step(side: int) -> float:
        sample = random_sample(side, model.sem_seg_head.num_classes)
        start = time.process_time()
        sum(model([sample]).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return time.process_time() - start

    step(SMALL)
    before = peak_memory("cpu", reset=True)
    first = step(args.sizes[0])
    added = peak_memory("cpu") - before
    return {"added": added, "seconds": min(first, step(args.sizes[0]))}


def random_sample(side: int, num_classes: int) -> dict[str, Any]:
    """A random picture with random boxes for objects."""
    instances = Instances((side, side))
    instances.gt_classes = torch.randint(num_classes, (OBJECTS,))
    corners = torch.randint(side // 2, (2, OBJECTS, 1))
    pixels = torch.arange(side)
    rows, columns = ((pixels >= corner) & (pixels < corner + side // 3) for corner in corners)
    instances.gt_masks = rows[:, :, None] & columns[:, None, :]
    return {"image": torch.randint(256, (3, side, side), dtype=torch.uint8), "instances": instances}


if __name__ == "__main__":
    command(main)
