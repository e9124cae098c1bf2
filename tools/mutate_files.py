#!/usr/bin/env python
"""Damage checkpoints and annotation files in hundreds of ways, and see that each ends in one clear error or rightly.

The good files are made by the program: a small model's checkpoints in every form that the project reads, and annotation
files of a small data set in every form. Each case damages one of them (bits flipped, cut, a value removed or of a wrong
type, huge numbers, code to run, ...) and reads it as a user's command does, in a process of its own with limits of time
and memory. Counted as right:

  the result of the good file;
  one clear error: a line that names the file;
  a valid file with another content: formats without checksums can't tell a flipped bit from another number. A value of
  a wrong type is none of these, unless a warning names the file.

All else is a failure: a traceback, a crash, a hang, too much memory, code that is run, files that are written where
none should be. Exits with 1 if there is one. Everything is drawn from --seed: a case is the same every time.

examples:
  python tools/mutate_files.py checkpoints --cases 500
  python tools/mutate_files.py annotations --only 17 23 --keep damaged/
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.modeling import build_model
from mutation.annotations import annotation_subjects, damage_annotation
from mutation.changes import Change
from mutation.checkpoints import RECIPE, checkpoint_subjects, damage_checkpoint
from mutation.runner import Outcome, Subject, Verdict, in_process, judge

from mask2former.engine import load_config
from mask2former.errors import command

KINDS = ("checkpoints", "annotations")
GIB = 2**30


@dataclass(frozen=True)
class Suite:
    """Subjects of one kind, and what damages their files."""

    subjects: Sequence[Subject]
    damage: Callable[[Path, random.Random], Change]


@dataclass(frozen=True)
class Case:
    """A damaged file and what came of it."""

    number: int
    subject: str
    target: str
    change: Change
    outcome: Outcome


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{' or '.join(KINDS)}; default: both")
    parser.add_argument("--cases", type=int, default=100, help="of each kind; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--only", type=int, nargs="+", default=[], metavar="N", help="these cases alone, told in full")
    parser.add_argument("--keep", type=Path, help="empty folder for the files of the cases that fail, or of --only")
    parser.add_argument("--seconds", type=float, default=60, help="limit of a case's time; default: %(default)s")
    parser.add_argument("--memory", type=float, default=2, help="limit of a case's memory, GiB; default: %(default)s")
    args = parser.parse_args()
    unknown = set(args.kinds) - set(KINDS)
    if unknown:
        parser.error(f"expected {' or '.join(KINDS)}, got {' '.join(unknown)}")
    torch.set_num_threads(1)  # threads don't survive forking, and so small a model needs none
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mutate_files_") as work:
        suites = _make_suites(Path(work), args.kinds or KINDS)
        for kind, suite in suites.items():
            start = time.monotonic()
            cases = list(_run_cases(suite, args, Path(work) / "case"))
            failed += _report(kind, cases, time.monotonic() - start)
    return int(failed > 0)


def _make_suites(work: Path, kinds: Sequence[str]) -> dict[str, Suite]:
    (work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(load_config(str(work / "recipe.yaml"))).eval()
    suites = {}
    if "checkpoints" in kinds:
        suites["checkpoints"] = Suite(checkpoint_subjects(work, model), damage_checkpoint)
    if "annotations" in kinds:
        suites["annotations"] = Suite(annotation_subjects(work, model), damage_annotation)
    return suites


def _run_cases(suite: Suite, args: argparse.Namespace, folder: Path) -> Iterator[Case]:
    expected: dict[int, str] = {}
    repeatable = set()  # subjects that were seen to give the same result twice
    limits = {"seconds": args.seconds, "memory": int(args.memory * GIB)}
    for number in args.only or range(args.cases):
        index = number % len(suite.subjects)
        subject = suite.subjects[index]
        if index not in expected:
            expected[index] = _result_of_good(subject, folder, limits)
        rng = random.Random(f"{args.seed} {number}")
        target = rng.choice(list(subject.targets))
        files, work = _lay_out(subject, folder)
        change = suite.damage(files / target, rng)
        outcome = judge(
            subject,
            files,
            work,
            expected=expected[index],
            target=target,
            wrong_type=change.wrong_type,
            **limits,
        )
        if outcome.verdict is Verdict.SAME:
            repeatable.add(index)
        elif outcome.verdict in (Verdict.OTHER, Verdict.SILENT) and index not in repeatable:
            if _result_of_good(subject, folder.with_name("again"), limits) != expected[index]:
                sys.exit(f"the good files of '{subject.name}' don't give the same result each time")
            repeatable.add(index)
        case = Case(number, subject.name, target, change, outcome)
        if args.only or not outcome.verdict.good:
            _tell(case)
            if args.keep:
                shutil.copytree(files, args.keep / f"{number}", dirs_exist_ok=True)
        yield case


def _lay_out(subject: Subject, folder: Path) -> tuple[Path, Path]:
    """The good files in a folder of their own, and an empty one beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in subject.files.items():
        file = folder / "files" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    work = folder / "work"
    work.mkdir()
    return folder / "files", work


def _result_of_good(subject: Subject, folder: Path, limits: dict[str, float]) -> str:
    """The digest of what the good files give."""
    files, work = _lay_out(subject, folder)
    outcome = in_process(lambda: subject.run(files, work / "output"), work, **limits)
    if outcome.verdict is not Verdict.SAME:
        sys.exit(f"the good files of '{subject.name}' can't be read: {outcome.verdict.value}: {outcome.text}")
    return outcome.text


def _tell(case: Case) -> None:
    outcome = case.outcome
    print(f"case {case.number}: {case.subject}, {case.target}: {case.change.text}")
    print(f"  {outcome.verdict.value} ({outcome.seconds:.1f} s): {outcome.text}")
    for warning in outcome.warnings[:3]:
        print(f"  warning: {warning[:300]}")
    sys.stdout.flush()


def _report(kind: str, cases: Sequence[Case], seconds: float) -> int:
    """Print a table of subjects and verdicts; how many cases failed."""
    verdicts = [verdict for verdict in Verdict if any(case.outcome.verdict is verdict for case in cases)]
    counts = Counter((case.subject, case.outcome.verdict) for case in cases)
    subjects = list(dict.fromkeys(case.subject for case in cases))
    rows = [(subject, [counts[subject, verdict] for verdict in verdicts]) for subject in subjects]
    rows.append(("all", [sum(column) for column in zip(*(row for _, row in rows), strict=True)]))
    for number, verdict in enumerate(verdicts, start=1):
        print(f"({number}) {verdict.value}")
    print(f"{kind:28}" + "".join(f"{f'({number})':>7}" for number in range(1, len(verdicts) + 1)) + "    sum")
    for name, row in rows:
        print(f"{name:28}" + "".join(f"{count:7}" for count in row) + f"{sum(row):7}")
    failed = sum(not case.outcome.verdict.good for case in cases)
    print(f"{len(cases)} damaged {kind}, {failed} failures, {seconds:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    command(main)
