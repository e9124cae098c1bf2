#!/usr/bin/env python
"""How long multi-scale deformable attention takes and what memory it adds, beside other ways to compute it.

All ways get the same tensors and take turns in one process; each one's result and gradients are compared with ours
first, and a difference is an error. Queries are the cells of all levels of a square picture, as in the pixel decoder.
Locations are a query's own cell moved by small offsets (normally distributed, two cells: about as far as the
initialisation's) or uniformly random, where caches are of little use. Sampling offsets and logits are float32 always;
grid_sample and Hugging Face's function run in float32 only, because in half precision locations would be off by up to
half a cell.

examples:
  python benchmarks/ms_deform_attn.py
  python benchmarks/ms_deform_attn.py --quick --json op.json --plot op.png
  python benchmarks/ms_deform_attn.py --sizes 512 800 1280 --threads 1 --peers ours grid_sample
  python benchmarks/ms_deform_attn.py --device cuda --sizes 512 1024 2048 --dtypes float32 bfloat16 float16
"""

import argparse
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe, peak_memory, processors
from matplotlib import ticker
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from mask2former.errors import UserError, command
from mask2former.ops import ms_deform_attn_fused
from mask2former.ops.extension import KERNELS, reason
from mask2former.ops.reference import ms_deform_attn_fused_reference

Shapes = tuple[tuple[int, int], ...]
# From value, spatial_shapes, reference_points, sampling_offsets and attention_logits to the output.
Attention = Callable[[Tensor, Shapes, Tensor, Tensor, Tensor], Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCATIONS = ("grid", "random")
PASSES = ("forward", "forward + backward")
PROBLEM = ("device", "batch", "heads", "channels", "levels", "points")
PLOT_FORMATS = (".png", ".svg", ".pdf")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    machine = describe(args.threads)
    runs, missing = _runs(args)
    if args.memory_of:
        print(json.dumps(_measure_memory(runs[-1].attention, args)))
        return
    cases: list[Case] = []
    memory: dict[str, dict[str, float]] = {}
    try:
        for side in args.sizes:
            for locations in LOCATIONS:
                cases.extend(_measure(side, locations, runs, args))
        memory.update(_memory_in_other_processes(runs, args))
    finally:  # Ctrl-C keeps what was measured before
        if cases:
            _report(cases, memory, missing, machine, args)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peers", nargs="+", choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)}; default: those that can run")
    add("--sizes", nargs="+", type=int, metavar="N", help="sides of the pictures; default: 256 512 1024")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], help="default: float32 bfloat16")
    add("--threads", nargs="+", type=int, metavar="N", help="default: 1 and the number of processors")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--rounds", type=int, metavar="N", help="default: 5")
    add("--quick", action="store_true", help="small pictures and few rounds: seconds, to see that it runs")
    add("--batch", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--heads", type=int, default=8, metavar="N", help="default: %(default)s")
    add("--channels", type=int, default=32, metavar="N", help="of a head; default: %(default)s")
    add("--levels", type=int, default=3, metavar="N", help="of strides 8, 16, 32 and so on; default: %(default)s")
    add("--points", type=int, default=4, metavar="N", help="for each head and level; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write all times to FILE")
    add("--plot", type=Path, metavar="FILE", help=f"draw time against size; {', '.join(PLOT_FORMATS)}")
    add("--memory-of", choices=PEERS, metavar="NAME", help="only say what memory this one adds, in this process")
    args = parser.parse_args(arguments)

    if args.memory_of:
        args.peers = [args.memory_of]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no GPU")
    if args.device == "cuda" and args.threads:
        raise UserError("--threads is for --device cpu: a GPU is timed with one thread")
    args.sizes = args.sizes or ([64, 128] if args.quick else [256, 512, 1024])
    args.rounds = (2 if args.quick else 5) if args.rounds is None else args.rounds
    args.threads = args.threads or ([1, processors()] if args.device == "cpu" else [1])
    args.sizes, args.threads = sorted(set(args.sizes)), sorted(set(args.threads))
    args.dtypes = list(dict.fromkeys(args.dtypes))
    for option in ("sizes", "threads", "rounds", *PROBLEM[1:]):
        given = getattr(args, option)
        lowest = min(given) if isinstance(given, list) else given
        if lowest < 1:
            raise UserError(f"--{option} is {lowest}, expected at least 1")
    for path in filter(None, (args.json, args.plot)):
        if not path.absolute().parent.is_dir():
            raise UserError(f"'{path}' can't be written: there is no folder '{path.parent}'")
        if path.is_dir():
            raise UserError(f"'{path}' is a folder, expected the name of a file to write")
    if args.plot and args.plot.suffix not in PLOT_FORMATS:
        raise UserError(f"--plot is '{args.plot}', expected a name that ends in {', '.join(PLOT_FORMATS)}")
    return args


# -------------------------------------------------------------------------------------------- ways to compute it


@functools.cache
def _level_sizes(shapes: Shapes, device: torch.device) -> Tensor:
    """(L, 1, 2) of (width, height), made once because a copy to a GPU waits for what runs there."""
    return torch.tensor([(width, height) for height, width in shapes], device=device).unsqueeze(1)


def _locations(shapes: Shapes, reference_points: Tensor, sampling_offsets: Tensor) -> Tensor:
    sizes = _level_sizes(shapes, sampling_offsets.device)
    return reference_points[:, :, None, :, None] + sampling_offsets / sizes  # (B, Q, M, L, P, 2)


def _load_ours(device: str) -> Attention:
    if device not in KERNELS:
        raise UserError(f"there is nothing to measure: no kernels for {device}, because {reason(device)}")
    return ms_deform_attn_fused


def _load_grid_sample(device: str) -> Attention:
    return ms_deform_attn_fused_reference


def _load_hugging_face(device: str) -> Attention:
    import transformers

    if not transformers.utils.is_torch_available():
        raise ImportError(f"transformers {transformers.__version__} asks for a newer torch")
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    def attend(value: Tensor, shapes: Shapes, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        weights = logits.flatten(3).softmax(-1).view(logits.shape)
        return multi_scale_deformable_attention(value, list(shapes), _locations(shapes, references, offsets), weights)

    return attend


def _load_deformops(device: str) -> Attention:
    if device != "cuda":
        raise ImportError("its kernels are for CUDA")
    msda = importlib.import_module("deformops.registry").msda

    @functools.cache
    def table(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
        areas = torch.tensor(shapes).prod(1)
        return torch.tensor(shapes, device=device), (areas.cumsum(0) - areas).to(device)

    def attend(value: Tensor, shapes: Shapes, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        locations = _locations(shapes, references, offsets)
        return msda(value, *table(shapes, value.device), locations, logits.to(value.dtype), softmax=True)

    return attend


@dataclass(frozen=True)
class Peer:
    """A way to compute the attention; ``load`` raises ImportError where it can't run."""

    load: Callable[[str], Attention]
    half: bool  # also bfloat16 and float16


PEERS = {
    "ours": Peer(_load_ours, half=True),
    "grid_sample": Peer(_load_grid_sample, half=False),
    "huggingface": Peer(_load_hugging_face, half=False),
    "deformops": Peer(_load_deformops, half=True),
}


@dataclass(frozen=True)
class Run:
    """A peer in a dtype."""

    peer: str
    dtype: str
    attention: Attention

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.peer} {self.dtype}"


def _runs(args: argparse.Namespace) -> tuple[list[Run], dict[str, str]]:
    """Ours in the first dtype, which others are compared with, then the others; and why the rest can't run."""
    loaded, missing = {"ours": _load_ours(args.device)}, {}
    for peer in args.peers or PEERS:
        try:
            loaded[peer] = PEERS[peer].load(args.device)
        except ImportError as error:
            if args.peers:
                raise UserError(f"--peers names {peer}, which can't run here: {error}") from error
            missing[peer] = str(error)
    runs = [
        Run(peer, dtype, attention)
        for peer, attention in loaded.items()
        for dtype in (args.dtypes if PEERS[peer].half else ["float32"])
    ]
    return runs, missing


# -------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Inputs:
    """What every way to compute it is given. Letters as in ``mask2former/ops/reference.py``."""

    shapes: Shapes
    value: Tensor  # (B, S, M, D)
    reference_points: Tensor  # (1, Q, L, 2)
    sampling_offsets: Tensor  # (B, Q, M, L, P, 2)
    attention_logits: Tensor  # (B, Q, M, L, P)
    grad_output: Tensor  # (B, Q, M*D)

    @property
    def variables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those that have gradients."""
        return self.value, self.sampling_offsets, self.attention_logits

    def in_dtype(self, dtype: torch.dtype) -> "Inputs":
        """The same with value and output in another dtype."""
        value = self.value.detach().to(dtype).requires_grad_()
        return replace(self, value=value, grad_output=self.grad_output.to(dtype))


def _make_inputs(side: int, locations: str, args: argparse.Namespace) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = tuple((math.ceil(side / (8 << level)),) * 2 for level in range(args.levels))
    centres = [torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in shape)).flip(-1) for shape in shapes]
    cells = torch.cat(centres)  # (S, 2), normalised (x, y)
    samples = (args.batch, len(cells), args.heads, args.levels, args.points)
    width = args.heads * args.channels
    if locations == "grid":
        offsets = 2 * torch.randn(*samples, 2, generator=generator)
    else:
        anywhere = torch.rand(*samples, 2, generator=generator) - cells[:, None, None, None]
        offsets = anywhere * _level_sizes(shapes, cells.device)
    value = torch.randn(args.batch, len(cells), args.heads, args.channels, generator=generator)
    logits = torch.randn(samples, generator=generator)
    grad = torch.randn(args.batch, len(cells), width, generator=generator)
    references = cells[None, :, None].repeat(1, 1, args.levels, 1)
    value, offsets, logits = (x.to(args.device).requires_grad_() for x in (value, offsets, logits))
    return Inputs(shapes, value, references.to(args.device), offsets, logits, grad.to(args.device))


def _attend(attention: Attention, inputs: Inputs) -> Tensor:
    return attention(
        inputs.value, inputs.shapes, inputs.reference_points, inputs.sampling_offsets, inputs.attention_logits
    )


def _forward(attention: Attention, inputs: Inputs) -> None:
    with torch.inference_mode():
        _attend(attention, inputs)


def _forward_and_backward(attention: Attention, inputs: Inputs) -> tuple[Tensor, ...]:
    """Output, and gradients of value, sampling offsets and attention logits."""
    output = _attend(attention, inputs)
    return output.detach(), *torch.autograd.grad(output, inputs.variables, inputs.grad_output)


# -------------------------------------------------------------------------------------------- same results

# Largest difference, as a part of the largest number (or of 1): of float32, rounding of sums and of locations; of the
# others, rounding of value, weights and output.
TOLERANCES = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}


def _check(run: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Gradients of locations jump where a sample crosses a cell's border: of them 1 in 10,000 may differ."""
    names = ("output", "gradient of value", "gradient of sampling_offsets", "gradient of attention_logits")
    for name, ours, theirs in zip(names, expected, found, strict=True):
        difference = (theirs.float() - ours.float()).abs()
        allowed = tolerance * max(1.0, ours.abs().max().item())
        wrong = (~(difference <= allowed)).sum().item()  # NaN is wrong, too
        if wrong > (1e-4 * ours.numel() if "offsets" in name else 0):
            raise RuntimeError(
                f"{run}: {name} differs from ours in {wrong} of {ours.numel()} places by more than {allowed:.2g}, "
                f"at most by {difference.max().item():.2g}"
            )


# -------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Case:
    """One problem: the seconds that each run took, in each round."""

    side: int
    queries: int
    locations: str
    threads: int
    passes: str
    seconds: dict[str, list[float]]
    limits: dict[str, float]

    def ratios(self, run: str) -> list[float]:
        """Times as long as the first run, in each round."""
        return [a / b for a, b in zip(self.seconds[run], next(iter(self.seconds.values())), strict=True)]


def _measure(side: int, locations: str, runs: Sequence[Run], args: argparse.Namespace) -> Iterator[Case]:
    given = _make_inputs(side, locations, args)
    inputs = {dtype: given.in_dtype(DTYPES[dtype]) for dtype in {run.dtype for run in runs}}
    torch.set_num_threads(max(args.threads))
    expected = _forward_and_backward(runs[0].attention, inputs[runs[0].dtype])
    for run in runs[1:]:
        tolerance = max(TOLERANCES[run.dtype], TOLERANCES[runs[0].dtype])
        _check(run.name, _forward_and_backward(run.attention, inputs[run.dtype]), expected, tolerance)
    del expected

    time_of = _time_on_gpu if args.device == "cuda" else functools.partial(_time_on_cpu, 0.01 if args.quick else 0.05)
    for threads in args.threads:
        torch.set_num_threads(threads)
        for passes, compute in zip(PASSES, (_forward, _forward_and_backward), strict=True):
            seconds: dict[str, list[float]] = {run.name: [] for run in runs}
            for round_number in range(args.rounds):
                for run in runs if round_number % 2 else reversed(runs):
                    spent = time_of(functools.partial(compute, run.attention, inputs[run.dtype]))
                    seconds[run.name].append(spent)
            counted = [run for run in runs if args.device == "cuda" and PEERS[run.peer].half]
            limits = {run.name: _limit(inputs[run.dtype], passes) for run in counted}
            case = Case(side, given.sampling_offsets.shape[1], locations, threads, passes, seconds, limits)
            medians = [f"{name} {1000 * statistics.median(spent):.2f}" for name, spent in seconds.items()]
            label = f"{side} x {side}, {locations}, {_count(threads)}, {passes}"
            print(f"{label}: {', '.join(medians)} ms", file=sys.stderr, flush=True)
            yield case


def _count(threads: int) -> str:
    return f"{threads} thread{'s'[: threads > 1]}"


def _time_on_cpu(at_least: float, call: Callable[[], object]) -> float:
    start, count = time.perf_counter(), 0
    while True:
        call()
        count += 1
        spent = time.perf_counter() - start
        if spent >= at_least:
            return spent / count


def _time_on_gpu(call: Callable[[], object]) -> float:
    """Median of 20, each with nothing in the L2 cache."""
    # More than any L2 cache holds, and so much that the call is queued before the GPU has done with it.
    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(20):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


# Bytes a second of an H100 (SXM).
DRAM, L2, L1 = 3.35e12, 9.7e12, 29.7e12


def _limit(inputs: Inputs, passes: str) -> float:
    """Seconds that an H100 needs at least, by counting bytes.

    Forward: tensors from and to the main memory once, or the four corners of all samples from L1. Backward: tensors
    once and zeros for the gradient of value, or a float32 atomic addition at L2's speed for every corner.
    """
    size = sum(x.nbytes for x in (*inputs.variables, inputs.reference_points))
    output = inputs.grad_output.nbytes
    corner_channels = 4 * inputs.attention_logits.numel() * inputs.value.shape[-1]
    forward = max((size + output) / DRAM, corner_channels * inputs.value.itemsize / L1)
    if passes == "forward":
        return forward
    grads = sum(x.nbytes for x in inputs.variables) + inputs.value.nbytes
    return forward + max((size + output + grads) / DRAM, corner_channels * 4 / L2)


# -------------------------------------------------------------------------------------------- memory


def _memory_in_other_processes(runs: Sequence[Run], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """One a peer, in float32 and at the largest size: what one has left behind, the next would not have to ask for."""
    if args.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        print("memory is not measured: the system doesn't tell a process's peak", file=sys.stderr)
        return
    options = {name: getattr(args, name) for name in PROBLEM}
    options |= {"sizes": max(args.sizes)} | ({"threads": max(args.threads)} if args.device == "cpu" else {})
    words = [word for name, option in options.items() for word in (f"--{name}", str(option))]
    # So that glibc gives back whatever is freed, and peaks are those of tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    for peer in dict.fromkeys(run.peer for run in runs):
        warnings = [f"-W{option}" for option in sys.warnoptions]
        child = [sys.executable, *warnings, __file__, "--memory-of", peer, *words]
        done = subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        memory = json.loads(done.stdout)
        print(f"memory: {peer} adds {memory['added']:.1f} MiB", file=sys.stderr, flush=True)
        yield peer, memory


def _measure_memory(attention: Attention, args: argparse.Namespace) -> dict[str, float]:
    """MiB of memory that forward and backward add at their peak, and of the output and the gradients."""
    torch.set_num_threads(max(args.threads))
    inputs = _make_inputs(max(args.sizes), "grid", args)
    _forward_and_backward(attention, _make_inputs(32, "grid", args))  # loads code and starts threads
    before = peak_memory(args.device, reset=True)
    results = _forward_and_backward(attention, inputs)
    added = peak_memory(args.device) - before
    return {"added": added / 2**20, "results": sum(x.nbytes for x in results) / 2**20}


# -------------------------------------------------------------------------------------------- report


def _report(
    cases: Sequence[Case],
    memory: dict[str, dict[str, float]],
    missing: dict[str, str],
    machine: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    first, *others = cases[0].seconds
    print(f"\nTimes as long as {first}: median (min to max) of {args.rounds} rounds")
    headers = ["size", "queries", "locations", "threads", "passes", f"{first}, ms", *others]
    print(tabulate([_time_row(case, first, others) for case in cases], headers=headers, disable_numparse=True))
    if cases[0].limits:
        print("\nTimes as long as the limit counted for an H100")
        headers = ["size", "queries", "locations", "passes", "", "ms", "limit, ms", "times the limit"]
        rows = [row for case in cases for row in _limit_rows(case)]
        print(tabulate(rows, headers=headers, floatfmt=("", "", "", "", "", ".4f", ".4f", ".2f")))
    if memory:
        print(f"\nMemory that forward + backward add, float32, {max(args.sizes)} x {max(args.sizes)}")
        rows = [[peer, found["added"], found["results"]] for peer, found in memory.items()]
        headers = ["", "added at the peak, MiB", "of it output and gradients, MiB"]
        print(tabulate(rows, headers=headers, floatfmt=".1f"))
    print()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    for peer, why in missing.items():
        print(f"not compared with {peer}: {why}")
    if args.json:
        problem = {name: getattr(args, name) for name in PROBLEM}
        content = {
            "machine": machine,
            "problem": problem,
            "times": [asdict(case) for case in cases],
            "memory of forward + backward, MiB": memory,
            "not compared with": missing,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        _plot(cases).savefig(args.plot)


def _time_row(case: Case, first: str, others: Sequence[str]) -> list[Any]:
    milliseconds = 1000 * statistics.median(case.seconds[first])
    ratios = [_spread(case.ratios(other)) for other in others]
    problem = [f"{case.side} x {case.side}", case.queries, case.locations, case.threads, case.passes]
    return [*problem, f"{milliseconds:.2f}", *ratios]


def _spread(ratios: Sequence[float]) -> str:
    median = statistics.median(ratios)
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})"


def _limit_rows(case: Case) -> Iterator[list[Any]]:
    for run, least in case.limits.items():
        spent = statistics.median(case.seconds[run])
        problem = [f"{case.side} x {case.side}", case.queries, case.locations, case.passes]
        yield [*problem, run, 1000 * spent, 1000 * least, spent / least]


def _plot(cases: Sequence[Case]) -> Figure:
    """Time against size on logarithmic axes: a panel for each number of threads and kind of pass."""
    threads = list(dict.fromkeys(case.threads for case in cases))
    height = 1 + 4 * len(threads)
    figure = Figure(figsize=(11, height), dpi=120)
    panels = figure.subplots(len(threads), len(PASSES), sharex=True, sharey=True, squeeze=False)
    queries = {case.queries: case.side for case in cases}
    for (row, count), (column, passes) in ((r, c) for r in enumerate(threads) for c in enumerate(PASSES)):
        panel = panels[row][column]
        for index, run in enumerate(cases[0].seconds):
            for locations, style in zip(LOCATIONS, ("o-", "s--"), strict=True):
                problem = (count, passes, locations)
                shown = [case for case in cases if (case.threads, case.passes, case.locations) == problem]
                times = [1000 * statistics.median(case.seconds[run]) for case in shown]
                label = f"{run}, {locations}"
                panel.plot([case.queries for case in shown], times, style, color=f"C{index}", mfc="white", label=label)
        panel.set(xscale="log", yscale="log", title=f"{passes}, {_count(count)}")
        panel.set_xticks(list(queries), [f"{n:,}\n({side} x {side})" for n, side in queries.items()])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("queries (picture)")
    for panel in panels[:, 0]:
        panel.set_ylabel("time, ms")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncol=4)
    figure.tight_layout(rect=(0, 0.2 * math.ceil(len(labels) / 4) / height, 1, 1))
    return figure


if __name__ == "__main__":
    command(main)
