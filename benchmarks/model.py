#!/usr/bin/env python
"""How long the whole model takes and what memory it needs, beside Hugging Face's Mask2Former and the work it does.

Both have the R50 of COCO panoptic with the same weights, threads, dtype and pictures, and take turns in one process.
What they give is compared first, and a difference is an error. --work says what is measured:

inference: semantic labels, panoptic and instance results of a picture of 800 x 1088, with class scores of a model that
  finds 25 objects; ours with semantic scores, too. Hugging Face's post-processing resizes masks to 384 x 384 first,
  which is less work and another result.
training: forward, loss, backward, clipping and AdamW.
loss: matching, losses of ten layers with 50 masks, and their backward alone. Hugging Face's is given whole masks, the
  making of which is its decoder's; ours makes those that it needs.
points: memory of a training step, beside that of one with losses on whole masks (full_mask_losses.py).
growth: time of inference at other sizes and numbers of queries, and of the loss of other numbers of masks.

Memory is what the work adds at its peak to the weights (and the optimizer's state), in a process for each model. The
floor is what matrix products, convolutions and attention would take at the speed of the run's best large matrix
product.

Hugging Face's model gets "sdpa" attention if it takes it. In transformers 5.24 it does not: its masked attention is
torch's nn.MultiheadAttention, which makes all weights.

examples:
  python benchmarks/model.py --json model.json --plot model.png
  python benchmarks/model.py --work inference --rounds 7
  python benchmarks/model.py --work training --sizes 256 512 --threads 1
  python benchmarks/model.py --quick
"""

import argparse
import copy
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from full_mask_losses import FullMaskCriterion
from machine import describe, peak_memory, processors
from model_growth import SERIES, Point, draw, growth_rows, sides_of
from model_parts import counted_flops, metered
from model_sides import Task, make_sides, random_picture, transformers, work_of
from tabulate import tabulate

from mask2former.errors import UserError, command

WORK = ("inference", "training", "loss", "points", "growth")
# Of each kind of work, the sides that take turns and those whose memory is measured.
TIMED = {
    "inference": ("ours", "ours, scores", "huggingface"),
    "training": ("ours", "huggingface"),
    "loss": ("ours", "huggingface"),
}
WEIGHED = {**TIMED, "points": ("ours", "full masks")}
SMALL = 128  # the side of pictures that warm up a process for memory
PLOT_FORMATS = (".png", ".svg", ".pdf")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        for name, task in zip(args.memory_of[::2], args.memory_of[1::2], strict=True):
            print(json.dumps({"added": _added_memory(name, Task.from_json(task))}), flush=True)
        return
    machine = describe([args.threads], transformers=transformers().__version__)
    tasks = _tasks(args)
    results: dict[Task, Result] = {}
    try:
        for work, names in TIMED.items():
            for task in tasks.get(work, ()):
                results[task] = _take_turns(task, names, args)
        _weigh(tasks, results, args.threads)
        for series in SERIES:
            for task in tasks.get(series, ()):
                if not (task in results and results[task].seconds):
                    results[task] = _take_turns(task, sides_of(task), args, brief=True)
    finally:  # Ctrl-C keeps what was measured before
        if results:
            _report(tasks, results, machine, args)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", nargs="+", choices=WORK, default=list(WORK), help="default: all")
    add(
        "--sizes",
        nargs="+",
        type=int,
        metavar="N",
        help="sides of training pictures, the largest for loss and points as well; default: 512 1024",
    )
    add("--threads", type=int, default=processors(), metavar="N", help="default: the number of processors")
    add(
        "--rounds", type=int, metavar="N", help="default: 3, or 2 of more than half a minute; of growth 1 if it is long"
    )
    add("--quick", action="store_true", help="small pictures and one round: a minute, to see that it runs")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--plot", type=Path, metavar="FILE", help=f"draw growth; {', '.join(PLOT_FORMATS)}")
    add("--memory-of", nargs="+", metavar="NAME TASK", help="only say what memory is added, in this process")
    args = parser.parse_args(arguments)
    args.sizes = sorted(set(args.sizes or ([64] if args.quick else [512, 1024])))
    for option in ("threads", "rounds"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}, expected at least 1")
    if min(args.sizes) < 64:
        raise UserError(f"--sizes has {min(args.sizes)}, expected at least 64")
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise UserError(f"'{path}' can't be written: there is no folder '{path.parent}'")
    if args.plot and args.plot.suffix not in PLOT_FORMATS:
        raise UserError(f"--plot is '{args.plot}', expected a name that ends in {', '.join(PLOT_FORMATS)}")
    if args.plot and "growth" not in args.work:
        raise UserError("--plot draws growth, which --work leaves out")
    return args


def _tasks(args: argparse.Namespace) -> dict[str, list[Task]]:
    """What is measured for each kind of work, and for each series of growth."""
    largest = (args.sizes[-1], args.sizes[-1])
    tasks = {
        "inference": [Task("inference", (128, 160) if args.quick else (800, 1088))],
        "training": [Task("training", (side, side)) for side in args.sizes],
        "loss": [Task("loss", largest, objects=50)],
        "points": [Task("training", largest, objects=count) for count in (10, 50, 100)],
    }
    tasks = {work: some for work, some in tasks.items() if work in args.work}
    if "growth" in args.work:
        tasks |= {name: series.tasks(args.sizes[-1], args.quick) for name, series in SERIES.items()}
    return tasks


# -------------------------------------------------------------------------------------------- what is measured


@dataclass
class Result:
    """Of each side, seconds of each round and bytes that it adds; of each part of ours, seconds and GFLOP."""

    task: Task
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    part_seconds: dict[str, float] = field(default_factory=dict)
    part_gigaflop: dict[str, float] = field(default_factory=dict)
    sgemm: float = 0.0  # GFLOP/s, measured before

    @property
    def gigaflop(self) -> float:
        """The work of all parts."""
        return sum(self.part_gigaflop.values())

    def median(self, side: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[side])

    def ratios(self, side: str) -> list[float]:
        """How many times as long Hugging Face's model takes, in each round."""
        return [b / a for a, b in zip(self.seconds[side], self.seconds["huggingface"], strict=True)]


def _take_turns(task: Task, names: Sequence[str], args: argparse.Namespace, brief: bool = False) -> Result:
    """Time some sides after comparing what they give; ``brief``: hardly more than once if it takes seconds."""
    sides = _kept_sides(task.queries)
    if task.work == "inference" and not brief:
        _compare_logits(task, sides)
    calls = {name: work_of(sides[name], task) for name in names}
    result = Result(task, sgemm=_sgemm())
    _compare(task, sides, _warm_up(calls, sides["ours"], result, brief))
    parts: list[dict[str, float]] = []
    seconds: dict[str, list[float]] = {name: [] for name in names}
    while len(parts) < _wanted_rounds(seconds, args, brief):
        for name in names if len(parts) % 2 else reversed(names):
            if name == "ours":
                with metered(sides[name].model, time.perf_counter) as spent:
                    seconds[name].append(_time(calls[name]))
                parts.append(spent)
            else:
                seconds[name].append(_time(calls[name]))
    result.seconds = seconds
    result.part_seconds = {part: statistics.median(spent[part] for spent in parts) for part in parts[0]}
    medians = ", ".join(f"{name} {result.median(name):.2f} s" for name in names)
    print(f"{task.name}: {medians}", file=sys.stderr, flush=True)
    return result


@functools.lru_cache(maxsize=1)
def _kept_sides(queries: int) -> dict[str, Any]:
    """Models for all tasks with this many queries: nothing that they do changes their weights."""
    return make_sides(TIMED["inference"], queries)


def _warm_up(calls: Mapping[str, Callable[[], Any]], ours: Any, result: Result, brief: bool) -> dict[str, Any]:
    """What each gives, while what ours does is counted; if ``brief``, only of ours where that takes seconds."""
    outputs = {}
    start = time.perf_counter()
    for name, call in calls.items():  # ours is the first
        torch.manual_seed(0)
        if name != "ours":
            outputs[name] = call()
            continue
        with counted_flops() as counter, metered(ours.model, counter.get_total_flops) as flops:
            outputs[name] = call()
        result.part_gigaflop = {part: count / 1e9 for part, count in flops.items()}
        if brief and time.perf_counter() - start > 2:
            break
    return outputs


def _wanted_rounds(done: Mapping[str, Sequence[float]], args: argparse.Namespace, brief: bool) -> int:
    """How many rounds there are to be, when those in ``done`` have been."""
    longest = sum(max(spent, default=0.0) for spent in done.values())
    if brief and longest > 5:
        return 1
    if args.rounds is not None:
        return args.rounds
    if args.quick:
        return 1
    return 2 if longest > 30 else 3


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _sgemm() -> float:
    """GFLOP/s of the best of some large float32 products of torch's BLAS and of oneDNN.

    The BLAS is mostly MKL, which is twice as slow as oneDNN on AMD's processors with AVX512.
    """
    a = torch.randn(2048, 2048)
    products = [lambda: torch.mm(a, a)]
    if torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], ""))
    with torch.no_grad():
        for product in products:
            product()
        return 2 * 2048**3 / 1e9 / min(_time(product) for _ in range(10) for product in products)


# -------------------------------------------------------------------------------------------- same results


def _compare_logits(task: Task, sides: Mapping[str, Any]) -> None:
    picture = random_picture(task.size)
    with torch.inference_mode():
        pairs = zip(*(sides[name].logits(picture) for name in ("ours", "huggingface")), strict=True)
        for kind, (ours, theirs) in zip(("class", "mask"), pairs, strict=True):
            agree = ((ours - theirs).abs() <= 1e-3).float().mean().item()
            if agree < 0.99:
                raise RuntimeError(f"only {agree:.1%} of the {kind} logits are within 1e-3 of Hugging Face's")
            print(f"{task.name}: {agree:.3%} of the {kind} logits agree within 1e-3", file=sys.stderr)


def _compare(task: Task, sides: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Errors where labels or losses differ."""
    if "huggingface" not in outputs:
        return
    if task.work == "inference":
        ours, theirs = (sides[name].labels(outputs[name]) for name in ("ours", "huggingface"))
        agree = (ours == theirs).float().mean().item()
        if agree < 0.95:
            raise RuntimeError(f"only {agree:.1%} of the semantic labels are Hugging Face's")
        return
    _compare_losses(task.name, outputs["ours"].item(), outputs["huggingface"].item(), "Hugging Face's")


def _compare_losses(name: str, ours: float, theirs: float, whose: str) -> None:
    if not abs(ours - theirs) <= 0.05 * theirs:  # points are drawn at random; NaN is wrong, too
        raise RuntimeError(f"{name}: the sum of losses is {ours}, but {whose} {theirs}")
    print(f"{name}: losses {ours:.3f}, {whose} {theirs:.3f}", file=sys.stderr)


def _check_full_masks(task: Task) -> None:
    """An error where losses on whole masks aren't those at points that are drawn everywhere alike."""
    ours = make_sides(["ours"], task.queries)["ours"]
    small = replace(task, work="loss", size=(min(task.size[0], 256),) * 2)
    at_points = ours.model.criterion
    at_points.importance_sample_ratio = 0.0
    losses = []
    for criterion in (at_points, FullMaskCriterion(at_points)):
        ours.model.criterion = criterion
        losses.append(work_of(ours, small)().item())
    _compare_losses(small.name, *losses, "on whole masks")


# -------------------------------------------------------------------------------------------- memory


def _weigh(tasks: Mapping[str, Sequence[Task]], results: dict[Task, Result], threads: int) -> None:
    """Add to the results what memory each side adds."""
    if not can_measure_memory():
        print("memory is not measured: the system doesn't tell a process's peak", file=sys.stderr)
        return
    if "points" in tasks:
        _check_full_masks(tasks["points"][0])
    wanted = dict.fromkeys((name, task) for work in WEIGHED for name in WEIGHED[work] for task in tasks.get(work, ()))
    theirs = [pair for pair in wanted if pair[0] == "huggingface"]
    ours = [pair for pair in wanted if pair not in theirs]
    for pairs in filter(None, (ours, theirs)):
        for (name, task), added in zip(pairs, _memory_in_another_process(pairs, threads), strict=True):
            results.setdefault(task, Result(task)).memory[name] = added
            print(f"{task.name}: {name} adds {added / 2**20:.0f} MiB", file=sys.stderr, flush=True)


def can_measure_memory() -> bool:
    """Whether the system tells a process's peak."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def _memory_in_another_process(pairs: Sequence[tuple[str, Task]], threads: int) -> Iterator[int]:
    """Bytes that each side adds with its task."""
    warnings = [f"-W{option}" for option in sys.warnoptions]
    words = [word for name, task in pairs for word in (name, task.to_json())]
    options = ["--threads", str(threads), "--memory-of", *words]
    # So that glibc gives back whatever is freed, and peaks are those of tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    program = [sys.executable, *warnings, __file__, *options]
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):  # else a library's
                yield json.loads(line)["added"]
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, program)


def _added_memory(name: str, task: Task) -> int:
    """Bytes that a first such task adds to the model's weights, and to the optimizer's state.

    A small picture before it loads code and starts threads. What a model keeps for later calls counts as added.
    """
    (unused,) = make_sides([name], task.queries).values()
    used = copy.deepcopy(unused)
    work_of(used, replace(task, size=(SMALL, SMALL)))()
    side = used if task.work == "training" else unused  # its optimizer has made its state
    del used, unused
    for parameter in side.model.parameters():
        parameter.grad = None
        parameter.sum()  # what is mapped from a file takes memory when it is read
    work = work_of(side, task)
    gc.collect()
    before = peak_memory("cpu", reset=True)
    work()
    return peak_memory("cpu") - before


# -------------------------------------------------------------------------------------------- report


def _report(
    tasks: Mapping[str, Sequence[Task]],
    results: Mapping[Task, Result],
    machine: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    sgemm = max(result.sgemm for result in results.values())
    if sgemm:
        machine = {**machine, "best matrix product, GFLOP/s": round(sgemm, 1)}
    found = {work: [results[task] for task in some if task in results] for work, some in tasks.items()}
    titles = {name: SERIES[name].title(some[0]) for name, some in tasks.items() if name in SERIES}
    growth = {
        name: [_point(SERIES[name].value(result.task), result) for result in some if result.seconds]
        for name, some in found.items()
        if name in SERIES
    }
    timed = [result for work in ("inference", "training", "loss") for result in found.get(work, ()) if result.seconds]
    if timed:
        _print_times(timed, sgemm)
    pairs = [result for result in found.get("points", ()) if "full masks" in result.memory]
    if pairs:
        _print_memory_of_points(pairs)
    for name, points in growth.items():
        if points:
            print(f"\n{titles[name]}: from one row to the next, how many times the time and the work")
            headers = [SERIES[name].label, "ours, s", "Hugging Face, s", "GFLOP", "floor, s", "time", "work"]
            print(tabulate(growth_rows(points, sgemm), headers=headers, disable_numparse=True))
    print("\n" + "\n".join(f"{key}: {value}" for key, value in machine.items()))
    if args.json:
        content = {
            "machine": machine,
            "results": [{"name": result.task.name, **asdict(result)} for result in results.values()],
            "growth": {name: [asdict(point) for point in points] for name, points in growth.items()},
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot and any(growth.values()):
        draw(growth, titles, sgemm).savefig(args.plot)


def _point(value: int, result: Result) -> Point:
    return Point(value, {name: result.median(name) for name in result.seconds}, result.gigaflop)


def _print_times(results: Sequence[Result], sgemm: float) -> None:
    rows = [row for result in results for row in _time_rows(result, sgemm)]
    headers = ["", "rounds", "ours, s", "Hugging Face, s", "times as fast", "ours, MiB", "Hugging Face, MiB", "of it"]
    print("\nMedian (min to max) of the rounds; memory added at the peak")
    print(tabulate(rows, headers=[*headers, "floor, s", "times the floor"], disable_numparse=True))
    for result in results:
        print(f"\n{result.task.name}: parts of ours")
        rows = [
            [part, f"{spent:.3f}", *_floor(result.part_gigaflop.get(part, 0.0), spent, sgemm)]
            for part, spent in result.part_seconds.items()
        ]
        total = sum(result.part_seconds.values())
        rows.append(["all", f"{total:.3f}", *_floor(result.gigaflop, total, sgemm)])
        print(tabulate(rows, headers=["", "s", "GFLOP", "floor, s", "times the floor"], disable_numparse=True))


def _time_rows(result: Result, sgemm: float) -> Iterator[list[str]]:
    """A row for each way of ours."""
    theirs = result.median("huggingface")
    for side in result.seconds:
        if side == "huggingface":
            continue
        ours, ratios = result.median(side), result.ratios(side)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        name = result.task.name + side.removeprefix("ours")
        times = [str(len(ratios)), f"{ours:.2f}", f"{theirs:.2f}", spread]
        _, *floor = _floor(result.gigaflop, ours, sgemm)
        yield [name, *times, *_memory_columns(result, side, "huggingface"), *floor]


def _floor(gigaflop: float, seconds: float, sgemm: float) -> list[str]:
    """GFLOP, the seconds that they take at least, and how many times as long it took."""
    floor = gigaflop / sgemm
    return [f"{gigaflop:.1f}", f"{floor:.3f}", f"{seconds / floor:.2f}" if gigaflop else ""]


def _memory_columns(result: Result, side: str, other: str) -> list[str]:
    """MiB that both add, and the share of the first in the second; empty where it wasn't measured."""
    if side not in result.memory or other not in result.memory:
        return ["", "", ""]
    ours, theirs = result.memory[side], result.memory[other]
    return [f"{ours / 2**20:.0f}", f"{theirs / 2**20:.0f}", f"{ours / theirs:.0%}"]


def _print_memory_of_points(results: Sequence[Result]) -> None:
    rows = [[result.task.name, *_memory_columns(result, "ours", "full masks")] for result in results]
    print("\nMemory that a step adds, with losses at points and on full masks")
    print(tabulate(rows, headers=["", "points, MiB", "full masks, MiB", "of it"], disable_numparse=True))


if __name__ == "__main__":
    command(main)
