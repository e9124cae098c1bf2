#!/usr/bin/env python
"""What processes of a training run on CPUs send and hold, beside what the formulas of docs/scaling.md say.

The model has random weights, and each process takes the same small picture in every step, so that the model's state
is most of its memory. Bytes are what goes over the loopback device, so nothing else may use it meanwhile. On Linux:

  unshare --net sh -c 'ip link set lo up; python benchmarks/processes.py'

examples:
  python benchmarks/processes.py --processes 2 --model Swin-L
  python benchmarks/processes.py --processes 4 --cases sharded
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from machine import peak_memory
from scaling import GIGABYTE, MODELS, sent_bytes, state_bytes
from tabulate import tabulate
from torch import distributed, multiprocessing
from training_memory import random_sample

from mask2former.engine import load_recipe
from mask2former.engine.parallel import for_all_ranks
from mask2former.errors import UserError, command

CONFIGS = Path(__file__).resolve().parent.parent / "configs/coco/panoptic-segmentation"
CASES = {"plain": False, "sharded": True}
SIDE, STEPS = 64, 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    # So that glibc gives back whatever is freed, and peaks are those of tensors.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    rows = []
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(_train, (args, case, folder), nprocs=args.processes)
            measured = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(args.processes)]
        rows += _compare(args, case, measured)
    print(tabulate(rows, headers=["", "formula, GB", "measured, GB"], disable_numparse=True))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="R50", help="default: R50")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="optimizers; default: both")
    args = parser.parse_args(arguments)
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}, expected at least 1")
    return args


def _compare(args: argparse.Namespace, case: str, measured: Sequence[dict[str, float]]) -> list[list[str]]:
    parameters = MODELS[args.model].parameters
    parts = state_bytes(parameters, args.processes, CASES[case])
    sent = args.processes * sent_bytes(parameters, args.processes, CASES[case])
    pairs = {
        "sent in a step by all": [sent, measured[0]["sent"]],
        "AdamW's state, largest of a process": [
            parts["optimizer"],
            max(of["optimizer"] for of in measured),
        ],
        "memory, largest of a process": [sum(parts.values()), max(of["memory"] for of in measured)],
    }
    start = f"{args.model}, {args.processes} processes, {case}: "
    return [[start + what, *(f"{value / GIGABYTE:.3f}" for value in pair)] for what, pair in pairs.items()]


def _train(rank: int, args: argparse.Namespace, case: str, folder: str) -> None:
    """Write what this process held, and what all sent in a step."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=args.processes)
    options = ["MODEL.DEVICE", "cpu", "SOLVER.SHARD_OPTIMIZER", str(CASES[case])]
    recipe = load_recipe(str(CONFIGS / MODELS[args.model].recipe), options)
    before = peak_memory("cpu", reset=True)
    model = recipe.build_model().train()
    optimizer = recipe.build_optimizer(model)
    parallel_model = for_all_ranks(model)

    def step() -> None:
        optimizer.zero_grad()
        sum(parallel_model([random_sample(SIDE, model.sem_seg_head.num_classes)]).values()).backward()
        optimizer.step()

    for _ in range(2):  # the second time DDP has arranged its buckets anew
        step()
    gc.collect()
    peak_memory("cpu", reset=True)
    distributed.barrier()
    sent = _sent()
    distributed.barrier()
    for _ in range(STEPS):
        step()
    distributed.barrier()
    sent = (_sent() - sent) / STEPS
    states = getattr(optimizer, "optim", optimizer).state.values()
    figures = {
        "sent": sent,
        "optimizer": sum(value.nbytes for state in states for value in state.values()),
        "memory": peak_memory("cpu") - before,
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figures))
    distributed.barrier()
    distributed.destroy_process_group()


def _sent() -> int:
    """Bytes that went out over the loopback device."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


if __name__ == "__main__":
    command(main)
