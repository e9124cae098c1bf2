#!/usr/bin/env python
"""Whether memory and open files grow while demo.py segments pictures, and while train_net.py trains.

Both run as their users start them, with the shipped model and the pictures of demo/nuclei: demo.py on smaller copies of
three sizes, round after round, train_net.py with the model's recipe. Meanwhile their resident memory and open handles
are read from the system. The first quarter is warm-up. glibc is told to give freed memory back to the system at once,
which else stays with a process as it happens. The exit code is 1 if something has grown by more than the noise.

examples:
  python tools/memory_over_time.py --plot memory.png      # 1,000 pictures and 300 steps: about 20 minutes on two cores
  python tools/memory_over_time.py --pictures 200 --steps 0
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import theilslopes
from tabulate import tabulate

from mask2former.data.panoptic_files import save_json, write_whole
from mask2former.errors import UserError, command

REPOSITORY = Path(__file__).resolve().parent.parent
NUCLEI = REPOSITORY / "demo" / "nuclei"
RECIPE = REPOSITORY / "configs" / "quick" / "nuclei.yaml"
PROC = Path("/proc")
MIB = 2**20

SIDES = (96, 128, 160)  # of the longer side of the pictures that demo.py gets, in pixels
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # bytes; read by glibc
LOGGED = 20  # train_net.py says after so many steps how far it is
INTERVAL = 0.25  # seconds between two samples
WARM_UP = 0.25  # share of the groups
FEWEST = 8  # groups, of which a trend can be told
NOTHING = 1.0  # MiB, or handles


@dataclass(frozen=True)
class Sample:
    """What a process had when ``done`` pictures or steps were done: MiB of resident memory, and open handles."""

    done: int
    memory: float
    handles: int


@dataclass(frozen=True)
class Series:
    """A process's samples, in order.

    Attributes:
        name: of the program.
        unit: what is done, and per: for how many of them growth is given.
        group: after so many of them it does the same again.
    """

    name: str
    unit: str
    per: int
    group: int
    samples: list[Sample]


@dataclass(frozen=True)
class Trend:
    """How a quantity went behind the warm-up.

    Attributes:
        at: where the groups begin, in pictures or steps.
        values: medians of the groups.
        slope: by Theil and Sen, a picture or step; with its 95 % confidence interval, ``low`` to ``high``.
        noise: two standard deviations of the values around the line, by their median, or what counts as nothing.
    """

    at: np.ndarray
    values: np.ndarray
    slope: float
    low: float
    high: float
    noise: float

    @property
    def growth(self) -> float:
        return self.slope * float(self.at[-1] - self.at[0])

    @property
    def grows(self) -> bool:
        """Whether it grows for sure, and by more than values scatter around the line."""
        return self.low > 0 and self.growth > self.noise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 if memory or handles have grown, else 0."""
    args = _parse(arguments)
    runs: list[Series] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.pictures:
            runs += watch_demo(Path(folder, "demo"), args.pictures)
        if args.steps:
            runs += watch_training(Path(folder, "training"), args.steps)
    if args.json:
        save_json(args.json, [{**vars(run), "samples": [vars(sample) for sample in run.samples]} for run in runs])
    return report(runs, args.plot)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000, metavar="N", help="for demo.py; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="for train_net.py; default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all samples, as .png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples")
    args = parser.parse_args(arguments)
    if not (PROC / "self" / "statm").is_file():
        raise UserError(f"{PROC} doesn't tell the memory of processes: run this on Linux")
    for name, count, group in (("pictures", args.pictures, _round()), ("steps", args.steps, LOGGED)):
        fewest = int(group * (FEWEST + 2) / (1 - WARM_UP))
        if 0 < count < fewest:
            raise UserError(f"--{name} is {count}: expected 0, or {fewest} or more, since fewer don't show a trend")
    return args


# ---------------------------------------------------------------------------------------------- programs


def _round() -> int:
    return len(SIDES) * len(list((NUCLEI / "images").iterdir()))


def watch_demo(folder: Path, count: int) -> list[Series]:
    """demo.py on ``count`` pictures."""
    pictures, output = folder / "pictures", folder / "output"
    pictures.mkdir(parents=True)
    contents = [_scaled(path, side) for path in sorted((NUCLEI / "images").iterdir()) for side in SIDES]
    for number in range(count):
        contents[number % len(contents)].save(pictures / f"{number:06d}.png")
    words = ["demo/demo.py", "--input", str(pictures), "--model", "nuclei", "--output", str(output)]
    samples, _ = _watch(words, lambda: len(list(output.glob("*.json"))), count)  # what is written last of each
    return [Series("demo.py", "pictures", 1000, len(contents), samples)]


def _scaled(path: Path, side: int) -> Image.Image:
    with Image.open(path) as picture:
        scale = side / max(picture.size)
        return picture.convert("RGB").resize((round(scale * picture.width), round(scale * picture.height)))


def watch_training(folder: Path, steps: int) -> list[Series]:
    """train_net.py, and the process that loads its data."""
    folder.mkdir()
    words = ["train_net.py", "--config-file", str(RECIPE)]
    for option in ("--train-data", "--val-data"):
        words += [option, str(NUCLEI / "annotations" / "instances.json"), option, str(NUCLEI / "images")]
    words += ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", str(steps), "OUTPUT_DIR", str(folder)]
    samples, of_loader = _watch(words, lambda: _steps_done(folder / "metrics.json"), steps)
    return [
        Series("train_net.py", "steps", 100, LOGGED, samples),
        Series("its data loader", "steps", 100, LOGGED, of_loader),
    ]


def _steps_done(metrics: Path) -> int:
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    with suppress(IndexError, json.JSONDecodeError):  # nothing yet, or a line that is being written
        return int(json.loads(lines[-1])["iteration"]) + 1
    return 0


def _watch(words: Sequence[str], count_done: Callable[[], int], total: int) -> tuple[list[Sample], list[Sample]]:
    """Samples of a program, and of the processes that it starts together, between its first result and its last."""
    samples, of_children = [], []
    print(f"running {words[0]}", flush=True)
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *words],
            cwd=REPOSITORY,
            env={**os.environ, **GIVES_BACK, "PYTHONPATH": paths},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                if 0 < (done := count_done()) < total:
                    with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                        samples.append(_sample(done, [process.pid]))
                        of_children.append(_sample(done, _children(process.pid)))
                time.sleep(INTERVAL)
        finally:
            process.kill()
        printed.seek(0)
        if process.returncode:
            last = (printed.read().splitlines() or ["it printed nothing"])[-1]
            raise UserError(f"{words[0]} ended with exit code {process.returncode}: {last}")
    return samples, of_children


def _sample(done: int, processes: Iterable[int]) -> Sample:
    found = [_memory_and_handles(process) for process in processes]
    return Sample(done, sum(memory for memory, _ in found), sum(handles for _, handles in found))


def _memory_and_handles(process: int) -> tuple[float, int]:
    """MiB of resident memory, and open handles."""
    folder = PROC / str(process)
    pages = int((folder / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB, len(os.listdir(folder / "fd"))


def _children(process: int) -> list[int]:
    tasks = (PROC / str(process) / "task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


# -------------------------------------------------------------------------------------------------- report


def trend(run: Series, quantity: str) -> Trend:
    """Of ``memory`` or ``handles``, behind the warm-up."""
    of_each = [
        (done, float(np.median([getattr(sample, quantity) for sample in samples])))
        for done, samples in groupby(run.samples, key=lambda sample: sample.done)
    ]
    groups = [
        (group * run.group, float(np.median([value for _, value in values])))
        for group, values in groupby(of_each, key=lambda item: item[0] // run.group)
    ]
    at, values = np.array(groups[round(WARM_UP * len(groups)) :]).T
    slope, intercept, low, high = theilslopes(values, at)
    deviation = 1.4826 * float(np.median(np.abs(values - intercept - slope * at)))
    return Trend(at, values, slope, low, high, max(2 * deviation, NOTHING))


def report(runs: Sequence[Series], plot: Path | None) -> int:
    """Print a table, and draw; 1 if something grows, else 0."""
    trends = [(run, trend(run, "memory"), trend(run, "handles")) for run in runs]
    rows = []
    for run, memory, handles in trends:
        fit = f"{memory.slope * run.per:+.2f} ({memory.low * run.per:+.2f} to {memory.high * run.per:+.2f})"
        verdict = ", ".join(
            f"{name} {'GROW' if each.grows else 'flat'}" for name, each in (("memory", memory), ("handles", handles))
        )
        rows.append(
            [
                f"{run.name}, {run.samples[-1].done:,} {run.unit}",
                f"{memory.values[0]:.1f} → {memory.values[-1]:.1f}",
                f"{fit} per {run.per:,}",
                f"{memory.growth:+.2f} / {memory.noise:.2f}",
                f"{handles.values[0]:.0f} → {handles.values[-1]:.0f}",
                verdict,
            ]
        )
    headers = ["", "MiB", "slope, MiB (95 %)", "growth / noise, MiB", "handles", ""]
    print(tabulate(rows, headers, disable_numparse=True))
    if plot is not None:
        _draw([(run, memory) for run, memory, _ in trends], plot)
    return int(any(memory.grows or handles.grows for _, memory, handles in trends))


def _draw(trends: Sequence[tuple[Series, Trend]], path: Path) -> None:
    figure = Figure(figsize=(5 * len(trends), 6), layout="constrained")
    axes = figure.subplots(2, len(trends), squeeze=False, sharex="col", height_ratios=(3, 1))
    for column, (run, memory) in enumerate(trends):
        done = [sample.done for sample in run.samples]
        above, below = axes[:, column]
        above.plot(done, [sample.memory for sample in run.samples], ".", markersize=2, color="0.7", label="samples")
        above.plot(memory.at + run.group / 2, memory.values, "o", markersize=4, label=f"medians of {run.group}")
        middle = np.median(memory.values) - memory.slope * np.median(memory.at)
        above.plot(memory.at + run.group / 2, middle + memory.slope * memory.at, label="trend behind the warm-up")
        above.set_title(run.name)
        above.set_ylabel("resident memory, MiB")
        above.legend(fontsize="small")
        below.plot(done, [sample.handles for sample in run.samples], ".", markersize=2)
        below.set_ylabel("open handles")
        below.set_xlabel(run.unit)
        below.set_ylim(bottom=0)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


if __name__ == "__main__":
    command(main)
