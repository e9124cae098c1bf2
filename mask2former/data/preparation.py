"""What the ``datasets/prepare_*.py`` commands share: options, a JSON file made picture by picture, the last lines.

All of them keep what is complete and not older than what it is made from, so they can be stopped and started again.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .datasets import data_set_root
from .panoptic_files import is_newer, run_jobs, save_json

__all__ = ["Journal", "Options", "Part", "files_in", "make_json", "read_options", "run_splits"]


# ----------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Attributes:
        root: folder of the data set as downloaded, only read.
        output: folder that gets what is made.
        splits: the splits to make.
        workers: number of threads.
    """

    root: Path
    output: Path
    splits: Sequence[str]
    workers: int


def read_options(
    description: str | None, folder: str, splits: Sequence[str], arguments: Sequence[str] | None
) -> Options:
    """The options of a command that makes ``splits`` from the data set in ``folder`` of the folder of all data sets.

    ``arguments`` None are those of the process. A mistake in them ends it with a usage line and exit code 2.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(data_set_root(), folder),
        help=f"the data set as downloaded (default: $DETECTRON2_DATASETS/{folder} or datasets/{folder})",
    )
    parser.add_argument("--output", type=Path, help="folder that gets what is made (default: --root)")
    parser.add_argument("--splits", nargs="+", choices=splits, default=list(splits), help="default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one a core)")
    options = parser.parse_args(arguments)
    return Options(options.root, options.output or options.root, options.splits, options.workers)


def run_splits(splits: Sequence[str], make: Callable[[str], tuple[Path, Sequence[str]]]) -> int:
    """Call ``make`` for each split; the exit code, 1 if files could not be made.

    ``make`` returns what it made, and a line for each file that was missing or broken, which are printed.
    """
    failed = False
    for split in splits:
        target, problems = make(split)
        for problem in sorted(problems):
            print(f"error: {problem}", file=sys.stderr)
        failed = failed or bool(problems)
        summary = f"not complete, {len(problems)} missing or broken files" if problems else "complete"
        print(f"{target}: {summary}", flush=True)
    return int(failed)


def files_in(folder: Path, ending: str, hint: str) -> list[Path]:
    """The files of ``folder`` with this ``ending`` (".jpg"), sorted. Raises ``UserError`` with ``hint`` if none are."""
    if not folder.is_dir():
        raise UserError(f"'{folder}' does not exist: {hint}")
    files = sorted(path for path in folder.iterdir() if path.suffix == ending)
    if not files:
        raise UserError(f"'{folder}' has no {ending} files: {hint}")
    return files


# --------------------------------------------------------------------------- one JSON file of many pictures


@dataclass(frozen=True)
class Part:
    """One picture's share in a data set.

    Attributes:
        name: of the picture, unique.
        sources: what the share is made from. A change of these makes it anew.
        file: what is made besides the entry in the JSON file, if anything.
    """

    name: str
    sources: tuple[Path, ...]
    file: Path | None = None


def make_json(
    json_file: Path,
    parts: Sequence[Part],
    make: Callable[[Part], Any],
    assemble: Callable[[list[Any]], Any],
    *,
    folders: Sequence[Path] = (),
    workers: int = 1,
) -> list[str]:
    """Make a JSON file with an entry for each part, and the parts' own files; a line for each part that failed.

    ``make`` makes a part's file and returns its entry, for ``assemble`` to put them together, in the order of
    ``parts``. Entries are kept beside the JSON file until it is written, which is when no part has failed. What is
    complete is not made again, unless something was added to ``folders``, or removed there, since.
    """
    journal = Journal(json_file.with_name(json_file.name + ".journal"))
    complete = is_newer(json_file, *folders, *(source for part in parts for source in part.sources))
    entries: dict[str, Any] = {}

    def work(part: Part) -> None:
        entry = journal.get(part)
        there = part.file is None or is_newer(part.file, *part.sources)
        if there and complete:
            return
        if not there or entry is None:
            entry = make(part)
            journal.add(part, entry)
        entries[part.name] = entry

    jobs = [lambda part=part: work(part) for part in parts]
    problems = run_jobs(jobs, workers=workers, description=json_file.stem)
    if not problems:
        if not complete:
            save_json(json_file, assemble([entries[part.name] for part in parts]))
        journal.remove()
    return problems


class Journal:
    """Entries of pictures, each put into a file at once, so that a command that is stopped loses none.

    A line is a JSON list: name, stamp, entry. One that was cut short, when a process was killed, counts as absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        lines = path.read_bytes().splitlines() if path.is_file() else []
        entries = [entry for entry in map(_journal_entry, lines) if entry is not None]
        self._known = {name: (stamp, content) for name, stamp, content in entries}

    def get(self, part: Part) -> Any:
        """The entry of ``part``; None if there is none, or its sources have changed since."""
        stamp, entry = self._known.get(part.name, (None, None))
        return entry if stamp == _stamp(part) else None

    def add(self, part: Part, entry: Any) -> None:
        """Keep the ``entry`` of ``part``. Threads may call this."""
        line = json.dumps([part.name, _stamp(part), entry])
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(f"\n{line}".encode())  # the line before may have been cut short

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _journal_entry(line: bytes) -> list[Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, list) and len(entry) == 3 else None


def _stamp(part: Part) -> list[list[int]]:
    """Time (ns) and size of the sources that exist."""
    found = [source.stat() for source in part.sources if source.is_file()]
    return [[status.st_mtime_ns, status.st_size] for status in found]
