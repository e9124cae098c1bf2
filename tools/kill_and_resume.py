#!/usr/bin/env python
"""Kill training runs at random moments, resume them, and compare them to the bit with an uninterrupted run.

A small model trains on the pictures of demo/nuclei through train_net.py, with checkpoints and evaluations on the way.
SIGKILL ends one rank, all processes, or what started them; some of the moments lie inside a checkpoint's writing or an
evaluation. The run is resumed and killed again, some times, and then goes on to its end. Every checkpoint (weights,
optimizer, moving average, the losses of every step), the metrics and the predictions must be those of the
uninterrupted run, and each resumption must start behind the last step that was saved. Linux only.

examples:
  python tools/kill_and_resume.py                            # 20 kills each: one process and two, 0 and 2 workers
  python tools/kill_and_resume.py --processes 2 --workers 0 --kills 5 --seed 7
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mask2former.errors import UserError, command

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS, CHECKPOINT_PERIOD, EVAL_PERIOD = 12, 3, 4
RECIPE = f"""\
VERSION: 2
MODEL:
  META_ARCHITECTURE: MaskFormer
  DEVICE: cpu
  BACKBONE: {{NAME: build_resnet_backbone, FREEZE_AT: 0}}
  RESNETS:
    DEPTH: 50
    NORM: SyncBN
    RES2_OUT_CHANNELS: 16
    WIDTH_PER_GROUP: 4
    STEM_OUT_CHANNELS: 16
    STRIDE_IN_1X1: False
    OUT_FEATURES: [res2, res3, res4, res5]
  SEM_SEG_HEAD:
    NAME: MaskFormerHead
    PIXEL_DECODER_NAME: MSDeformAttnPixelDecoder
    IN_FEATURES: [res2, res3, res4, res5]
    CONVS_DIM: 32
    MASK_DIM: 32
    NORM: GN
    TRANSFORMER_ENC_LAYERS: 1
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: multi_scale_pixel_decoder
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 10
    DEC_LAYERS: 3
    DIM_FEEDFORWARD: 64
    DROPOUT: 0.1
    TRAIN_NUM_POINTS: 64
INPUT: {{FORMAT: RGB, DATASET_MAPPER_NAME: coco_instance_lsj, IMAGE_SIZE: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.001
  WARMUP_ITERS: 4
  MAX_ITER: {STEPS}
  CHECKPOINT_PERIOD: {CHECKPOINT_PERIOD}
  EMA_DECAY: 0.9
TEST: {{EVAL_PERIOD: {EVAL_PERIOD}, BEST_METRIC: segm/AP}}
SEED: 1
"""
NUCLEI = REPOSITORY / "demo" / "nuclei"
IMAGES = 5  # so that two processes evaluate different numbers
KILLS_OF_A_RUN = 4
LIMIT = 600  # seconds of a run that is not killed
END_LIMIT = 60  # seconds until a kill has ended all processes
# Lines of the log.
STARTS = r"Starting training from iteration (\d+)|the run is complete: (\d+) of"
SAVES = r"Saving checkpoint to \S+model_(\d+)\.pth"
EVALUATES, HAS_EVALUATED = "Start inference on", "copypaste: Task: segm"
# Seconds: between two looks; behind a line of the log, at most; into a checkpoint's writing or an evaluation, at most.
POLL, PAUSE, DEPTH = 0.002, 0.5, 0.02
# Where a kill comes.
CHECKPOINT, EVALUATION, STEP = "in a checkpoint", "in an evaluation", "elsewhere"
# In metrics.json, what differs from run to run.
TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


class Setting(NamedTuple):
    """How a run is started."""

    processes: int
    workers: int
    torchrun: bool = False

    def command(self, data: Path, output: Path) -> list[str]:
        launcher, options = [sys.executable], []
        if self.torchrun:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        elif self.processes > 1:
            options = ["--num-processes", str(self.processes)]
        paths = [str(data / "instances.json"), str(NUCLEI / "images")]
        options += [part for kind in ("train", "val") for path in paths for part in (f"--{kind}-data", path)]
        values = ["OUTPUT_DIR", str(output), "DATALOADER.NUM_WORKERS", str(self.workers)]
        recipe = ["--config-file", str(data / "recipe.yaml")]
        return [*launcher, str(REPOSITORY / "train_net.py"), *recipe, "--resume", *options, *values]

    def __str__(self) -> str:
        start = " of torchrun" if self.torchrun else ""
        return f"{self.processes} processes{start}, {self.workers} workers"

    def targets(self) -> list[str]:
        """What can be killed: a rank, all processes, or the one that started the ranks."""
        if self.processes == 1:
            return ["rank 0", "all"]
        # Ranks of torchrun don't notice that it is gone.
        return [f"rank {rank}" for rank in range(self.processes)] + ["all"] + ["parent"] * (not self.torchrun)


@dataclass
class Kill:
    """What was killed when, and what was wrong behind it."""

    moment: str
    target: str
    checkpoint: int | None = None  # the last whole one; None: there is none
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        checkpoint = "no checkpoint" if self.checkpoint is None else f"last checkpoint of step {self.checkpoint + 1}"
        return f"{self.target}, {self.moment}, {checkpoint}: {'; '.join(self.problems) or 'all equal'}"


# ------------------------------------------------------------------------------------------ processes


def descendants(process: int) -> list[int]:
    """The process and all that it started and that run, itself first, children by age."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":  # it has ended, and nobody has asked how
                children.setdefault(int(parent), []).append(int(folder.name))
    found = [process]
    for ancestor in found:  # grows
        found += sorted(children.get(ancestor, []))
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def chosen(target: str, launcher: int, setting: Setting) -> list[int]:
    """The processes of a target."""
    processes = descendants(launcher)
    if target == "all":
        return processes
    if target == "parent" or setting.processes == 1:
        return [launcher]
    children = [process for process in processes[1:] if is_rank(process)]
    return [children[int(target.removeprefix("rank "))]]


def is_rank(process: int) -> bool:
    """Whether a process below the launcher is one that trains, and not Python's tracker of resources."""
    return b"resource_tracker" not in Path(f"/proc/{process}/cmdline").read_bytes()


def send(processes: Sequence[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


@contextmanager
def started(arguments: list[str], printed: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program, which is killed with all that it started if it outlives the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(printed, "ab") as output:
        program = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment, cwd=REPOSITORY)
    try:
        yield program
    finally:
        if program.poll() is None:
            send(descendants(program.pid), signal.SIGKILL)
            program.wait()


def seconds_to_end(program: subprocess.Popen[bytes], processes: Sequence[int]) -> float:
    """Until all are gone, or the limit is over."""
    start = time.monotonic()
    while program.poll() is None or any(map(is_running, processes)):
        if time.monotonic() - start > END_LIMIT:
            send(processes, signal.SIGKILL)
            break
        time.sleep(0.05)
    return time.monotonic() - start


# --------------------------------------------------------------------------------------- what a run leaves


class Log:
    """What rank 0 writes into a run's log from now on."""

    def __init__(self, output: Path) -> None:
        self._path = output / "log.txt"
        self._start = self._path.stat().st_size if self._path.is_file() else 0

    @property
    def text(self) -> str:
        if not self._path.is_file():
            return ""
        with open(self._path, "rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def first_step(self) -> int | None:
        """The step that training starts with; None: it has not started."""
        found = re.search(STARTS, self.text)
        return int(found[1] or found[2]) if found else None

    def lines(self) -> int:
        """That it has from the first step on; 0: training has not started."""
        found = re.search(STARTS, self.text)
        return self.text.count("\n", found.start()) if found else 0

    def is_evaluating(self) -> bool:
        text = self.text
        return text.count(EVALUATES) > text.count(HAS_EVALUATED)

    def saved_steps(self) -> list[int]:
        """Of checkpoints that are written or were being written."""
        return [int(step) for step in re.findall(SAVES, self.text)]


def unfinished_checkpoints(output: Path) -> list[Path]:
    """What is being written: a checkpoint, or the name of the last one."""
    return [*output.glob("model_*.pth.part"), *output.glob("last_checkpoint.part")]


def bytes_written(output: Path) -> int:
    """Of what is being written."""
    written = 0
    for path in unfinished_checkpoints(output):
        with suppress(FileNotFoundError):  # it has its name now
            written += path.stat().st_size
    return written


def newest_checkpoint(output: Path) -> int | None:
    """The step of the last whole checkpoint."""
    steps = [int(path.stem.removeprefix("model_")) for path in output.glob("model_*.pth") if path.stem[-1].isdigit()]
    return max(steps, default=None)


def differences(expected: Path, found: Path) -> Iterator[str]:
    """How a run's results differ from another's."""
    for path in sorted(expected.glob("model_*.pth")):
        other = found / path.name
        if not other.is_file():
            yield f"{path.name} is missing"
            continue
        first, second = (torch.load(file, weights_only=True) for file in (path, other))
        yield from islice(different_values(first, second, path.name), 1)
    for name in ("model_best.json", "last_checkpoint", "inference/coco_instances_results.json"):
        if (expected / name).read_bytes() != (found / name).read_bytes():
            yield f"{name} differs"
    yield from islice(different_metrics(expected, found), 1)
    yield from (f"{path.name} is left" for path in found.glob("*.part"))


def different_values(first: Any, second: Any, place: str) -> Iterator[str]:
    """The places where two checkpoints differ in a bit."""
    if type(first) is not type(second):
        yield f"{place} has another type"
    elif isinstance(first, dict):
        if first.keys() != second.keys():
            yield f"{place} has other keys"
        for key in first.keys() & second.keys():
            yield from different_values(first[key], second[key], f"{place} {key}")
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            yield f"{place} has another length"
        for index, pair in enumerate(zip(first, second, strict=False)):
            yield from different_values(*pair, f"{place} {index}")
    elif isinstance(first, torch.Tensor):
        same_form = first.dtype == second.dtype and first.shape == second.shape
        if not same_form or first.numpy().tobytes() != second.numpy().tobytes():
            yield place
    elif repr(first) != repr(second):  # of floats it says all bits, and NaN is itself
        yield place


def different_metrics(expected: Path, found: Path) -> Iterator[str]:
    """Values of ``metrics.json`` that are others, in any line, and steps' losses and evaluations that are missing."""
    wanted = dict(metrics(expected))
    seen = set()
    for place, value in metrics(found):
        seen.add(place)
        if repr(wanted.get(place, value)) != repr(value):  # an interrupted run has lines of other steps too
            yield f"metrics.json: {place} is {value}, not {wanted[place]}"
    for place in wanted.keys() - seen:
        if "loss" in place[0] or "/" in place[0]:
            yield f"metrics.json lacks {place}"


def metrics(output: Path) -> Iterator[tuple[tuple[str, int], Any]]:
    """((name, step), value) in the order of the file, but for times."""
    for line in (output / "metrics.json").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in TIMES:
                yield (name, record["iteration"]), value


# ----------------------------------------------------------------------------------------------- kills


def wait(program: subprocess.Popen[bytes], condition: Callable[[], bool]) -> bool:
    """Until it is true; False if the program ends before."""
    while not condition():
        if program.poll() is not None:
            return False
        time.sleep(POLL)
    return True


class Run:
    """A training run, however often it is killed.

    Args:
        folder: has data and recipe, and gets the run's output.
        name: of its output.
    """

    def __init__(self, setting: Setting, folder: Path, name: str) -> None:
        self.setting = setting
        self.output = folder / name
        self._printed = folder / f"{name}.txt"
        self._command = setting.command(folder, self.output)

    def finish(self) -> tuple[int, list[str]]:
        """Start or resume it: lines of the log from the first step on, and what was wrong."""
        newest, log = newest_checkpoint(self.output), Log(self.output)
        with started(self._command, self._printed) as program, suppress(subprocess.TimeoutExpired):
            program.wait(LIMIT)
        problems = [f"exit code {program.returncode}, see {self._printed}"] if program.returncode else []
        return log.lines(), problems + wrong_start(log, newest)

    def kill(self, draw: random.Random, lines: float) -> Kill | None:
        """Start or resume it, and kill it at a random moment; None if it ended before.

        Args:
            draw: the moment, and what is killed.
            lines: the moment is behind one of the first lines of the log, from the first step on, or later.
        """
        newest, log = newest_checkpoint(self.output), Log(self.output)
        target = draw.choice(self.setting.targets())
        is_moment, line = self._moment(draw, log), draw.random() * lines
        with started(self._command, self._printed) as program:
            if not wait(program, lambda: log.lines() > line):
                return None
            time.sleep(draw.random() * PAUSE)
            # What was waited for may be over when all processes have been stopped.
            while wait(program, is_moment):
                time.sleep(draw.random() * DEPTH)
                processes = descendants(program.pid)
                send(processes, signal.SIGSTOP)
                if is_moment():
                    break
                send(processes, signal.SIGCONT)
            else:
                return None
            kill = Kill(self._describe(log), target)
            begun = log.saved_steps()
            send(chosen(target, program.pid, self.setting), signal.SIGKILL)
            send(processes, signal.SIGCONT)
            seconds = seconds_to_end(program, processes)
        kill.checkpoint = newest_checkpoint(self.output)
        kill.problems += wrong_start(log, newest)
        if seconds > END_LIMIT:
            kill.problems.append(f"processes went on for more than {END_LIMIT} s")
        whole = begun[:-1] if kill.moment.startswith(CHECKPOINT) else begun
        if whole and (kill.checkpoint is None or kill.checkpoint < whole[-1]):
            kill.problems.append(f"the checkpoint of step {whole[-1] + 1} is lost")
        return kill

    def _moment(self, draw: random.Random, log: Log) -> Callable[[], bool]:
        """What to wait for: most of the time that a checkpoint takes its file is empty still."""
        begun, half = lambda: bool(unfinished_checkpoints(self.output)), lambda: bytes_written(self.output) > 0
        return draw.choice((begun, half, log.is_evaluating, lambda: True))

    def _describe(self, log: Log) -> str:
        """Where the stopped run is."""
        files = unfinished_checkpoints(self.output)
        if files:
            return f"{CHECKPOINT} ({files[0].name}, {files[0].stat().st_size:,} bytes)"
        return EVALUATION if log.is_evaluating() else STEP


def wrong_start(log: Log, newest: int | None) -> list[str]:
    """What is wrong with where a run went on: it is behind the last whole checkpoint."""
    expected, step = 0 if newest is None else newest + 1, log.first_step()
    return [] if step == expected else [f"it went on from step {step}, not {expected}"]


def kill_and_finish(run: Run, kills: int, draw: random.Random, expected: Path, lines: int) -> list[Kill]:
    """Kill a run, at most so often, resume it to its end, and compare it: each kill with what was wrong.

    Args:
        lines: of the log of an uninterrupted run.
    """
    done: list[Kill] = []
    while len(done) < kills:
        left = lines * (1 - (newest_checkpoint(run.output) or 0) / STEPS)
        kill = run.kill(draw, 2 * left / (kills - len(done) + 1))  # so that something is left for those to come
        if kill is None:
            break
        done.append(kill)
    _, problems = run.finish()
    problems += [] if problems else differences(expected, run.output)
    for kill in done:
        kill.problems += problems
    if not problems:
        shutil.rmtree(run.output)
    return done


def check(setting: Setting, kills: int, folder: Path, expected: Path, lines: int, seed: int) -> list[Kill]:
    """Kill runs of a setting until there are so many kills; a line for each is printed."""
    draw = random.Random(f"{seed} {setting}")
    done: list[Kill] = []
    for number in itertools.count():
        if len(done) >= kills:
            break
        started_by = setting._replace(torchrun=setting.processes > 1 and number % 3 == 1)
        run = Run(started_by, folder, f"run_{setting.processes}_{setting.workers}_{number}")
        for kill in kill_and_finish(run, min(KILLS_OF_A_RUN, kills - len(done)), draw, expected, lines):
            done.append(kill)
            print(f"{started_by}, kill {len(done)}: {kill}", flush=True)
    return done


def table(results: dict[Setting, list[Kill]]) -> Iterator[str]:
    """A line for each setting: kills, where they came, what was killed, and how many runs went on as they should."""
    yield f"{'':36}{'kills':>7}{CHECKPOINT:>24}{EVALUATION:>18}{'one rank':>10}{'all':>5}{'parent':>8}{'good':>6}"
    for setting, kills in results.items():
        moments = [sum(kill.moment.startswith(place) for kill in kills) for place in (CHECKPOINT, EVALUATION)]
        targets = Counter(kill.target.split()[0] for kill in kills)
        good = sum(not kill.problems for kill in kills)
        yield (
            f"{setting!s:36}{len(kills):7}{moments[0]:24}{moments[1]:18}{targets['rank']:10}{targets['all']:5}"
            f"{targets['parent']:8}{good:6}"
        )


def prepare(folder: Path) -> None:
    """Write recipe and annotations."""
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    content = json.loads((NUCLEI / "annotations" / "instances.json").read_text(encoding="utf-8"))
    content["images"] = content["images"][:IMAGES]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in ids]
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def check_all(args: argparse.Namespace, folder: Path) -> dict[Setting, list[Kill]]:
    """The kills of every setting."""
    prepare(folder)
    results = {}
    for processes in args.processes:
        whole = Run(Setting(processes, 0), folder, f"uninterrupted_{processes}")
        lines, problems = whole.finish()
        if problems:
            raise UserError(f"the uninterrupted run failed: {'; '.join(problems)}")
        print(f"{whole.setting}: uninterrupted", flush=True)
        for workers in args.workers:
            setting = Setting(processes, workers)
            results[setting] = check(setting, args.kills, folder, whole.output, lines, args.seed)
    return results


def main() -> int:
    """Run the command: 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each number of processes and workers")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the data loader; default: 0 2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is killed")
    parser.add_argument(
        "--output", type=Path, help="new folder, which keeps the runs that went wrong; default: a temporary one"
    )
    args = parser.parse_args()
    if args.output and args.output.is_dir() and any(args.output.iterdir()):
        raise UserError(f"--output {args.output} is not empty: give a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = check_all(args, folder.resolve())
    print(*table(results), sep="\n")
    return int(any(kill.problems for kills in results.values() for kill in kills))


if __name__ == "__main__":
    command(main)
