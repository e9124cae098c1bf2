#!/usr/bin/env python
"""How much memory, and time, the results of a large picture take.

The whole model (R50, COCO panoptic, random weights) segments a picture of --input pixels for results of --size pixels;
the predictions that results are made of are replaced by smooth random masks, some of them of sure classes. Each case
runs in a process of its own. Memory is what it adds at its peak to that of the model and the predictions; beside it is
what the results that are handed out take, below which it can't be.

examples:
  python benchmarks/results_memory.py
  python benchmarks/results_memory.py --cases labels scores --size 2000 2500
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from machine import describe, peak_memory, processors
from tabulate import tabulate
from torch import Tensor

from mask2former.engine import load_config
from mask2former.errors import UserError, command
from mask2former.modeling import Predictions

RECIPE = Path(__file__).resolve().parent.parent / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
QUERIES, CLASSES, CHANNELS = 100, 133, 256
# Of each case, the outputs that are on and whether semantic output is labels.
CASES = {
    "labels": (("SEMANTIC_ON", "PANOPTIC_ON", "INSTANCE_ON"), True),
    "labels alone": (("SEMANTIC_ON",), True),
    "panoptic": (("PANOPTIC_ON",), False),
    "scores": (("SEMANTIC_ON", "PANOPTIC_ON", "INSTANCE_ON"), False),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    if args.only:
        print(json.dumps(_measure(args)))
        return
    machine = describe([args.threads])
    figures = {case: _measure_in_another_process(case, args) for case in args.cases}
    rows = [
        [name, f"{of['added'] / 1e9:.2f}", f"{of['results'] / 1e9:.2f}", f"{of['seconds']:.1f}"]
        for name, of in figures.items()
    ]
    height, width = args.size
    print(f"\nresults of {height} x {width} pixels, {QUERIES} queries, {CLASSES} classes")
    print(tabulate(rows, headers=["", "memory added, GB", "results, GB", "seconds"], disable_numparse=True))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in machine.items()))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "size": args.size, "cases": figures}, indent=1) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--cases",
        nargs="+",
        choices=CASES,
        default=["labels", "labels alone", "panoptic"],
        help="semantic labels or scores, with panoptic and instance results or alone; panoptic results alone. "
        "default: all but scores, which add 10 GB",
    )
    add("--size", nargs=2, type=int, default=[4000, 5000], metavar="N", help="height and width of results; 4000 5000")
    add("--input", nargs=2, type=int, default=[1024, 1280], metavar="N", help="of what the network sees; 1024 1280")
    add("--threads", type=int, default=processors(), metavar="N", help="default: the number of processors")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--only", choices=CASES, help="measure one case in this process, and print JSON")
    args = parser.parse_args(arguments)
    if min(*args.size, *args.input) < 64 or args.threads < 1:
        raise UserError("expected sizes of at least 64 pixels and at least 1 thread")
    return args


def _measure_in_another_process(case: str, args: argparse.Namespace) -> dict[str, float]:
    options = ["--only", case, "--threads", str(args.threads)]
    for name in ("size", "input"):
        options += [f"--{name}", *map(str, getattr(args, name))]
    warnings = [f"-W{option}" for option in sys.warnoptions]
    child = [sys.executable, *warnings, __file__, *options]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{case}: {figures['added'] / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return figures


def _measure(args: argparse.Namespace) -> dict[str, float]:
    """Bytes that results add at the peak and take themselves, and seconds, in this process."""
    torch.set_num_threads(args.threads)
    height, width = args.input
    model = _model(args.only)
    predictions = _predictions(height // 4, width // 4)
    model.sem_seg_head.register_forward_hook(lambda *_: predictions)
    sample = {"image": torch.full((3, height, width), 127, dtype=torch.uint8), "height": args.size[0]}
    with torch.inference_mode():
        before = peak_memory("cpu", reset=True)
        start = time.perf_counter()
        (results,) = model([{**sample, "width": args.size[1]}])
        seconds = time.perf_counter() - start
    return {"added": peak_memory("cpu") - before, "results": _size(results), "seconds": seconds}


def _model(case: str) -> Any:
    outputs, labels = CASES[case]
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.MASK_FORMER.TEST.SEMANTIC_LABELS", str(labels)]
    for name in ("SEMANTIC_ON", "PANOPTIC_ON", "INSTANCE_ON"):
        options += [f"MODEL.MASK_FORMER.TEST.{name}", str(name in outputs)]
    torch.manual_seed(0)
    model = build_model(load_config(str(RECIPE), options)).eval()
    model.inference = dataclasses.replace(model.inference, thing_classes=None)  # as many instances as there can be
    return model


def _predictions(height: int, width: int) -> Predictions:
    """Smooth masks; about one in four queries is sure of a class."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, CHANNELS, max(height // 8, 1), max(width // 8, 1), generator=generator)
    features = F.interpolate(coarse, size=(height, width), mode="bicubic")
    logits = 3 * torch.randn(1, 1, QUERIES, CLASSES + 1, generator=generator)
    return Predictions(logits, torch.randn(1, 1, QUERIES, CHANNELS, generator=generator) / 4, features)


def _size(results: dict[str, Any]) -> int:
    """Bytes of the results' tensors."""
    tensors: list[Tensor] = [results[name] for name in ("sem_seg",) if name in results]
    if "panoptic_seg" in results:
        tensors.append(results["panoptic_seg"][0])
    if "instances" in results:
        tensors.append(results["instances"].pred_masks)
    return sum(tensor.nbytes for tensor in tensors)


if __name__ == "__main__":
    command(main)
