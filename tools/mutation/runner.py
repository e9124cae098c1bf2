"""Reading damaged files in processes of their own, and judging what comes of it."""

import faulthandler
import fnmatch
import hashlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mask2former.errors import UserError

__all__ = ["Outcome", "Subject", "Verdict", "digest", "in_process", "judge"]

# What a damaged file that holds code to run writes, in the current folder.
MARKER = "code_was_run"
LONGEST_MESSAGE = 700
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
STARTING = frozenset(("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn"))


class Verdict(Enum):
    """What came of a damaged file; the first three are as they should be."""

    SAME = "right result, that of the good file"
    ERROR = "one clear error"
    OTHER = "valid file with another content"
    SILENT = "WRONG TYPE TAKEN WITHOUT A WORD"
    UNCLEAR = "UNCLEAR ERROR"
    TRACEBACK = "TRACEBACK"
    CRASH = "CRASH"
    HANG = "HANG"
    MEMORY = "OUT OF MEMORY"
    RAN_CODE = "CODE RUN"
    WROTE = "FILE WRITTEN OR CHANGED"

    @property
    def good(self) -> bool:
        return self in (Verdict.SAME, Verdict.ERROR, Verdict.OTHER)


@dataclass(frozen=True)
class Subject:
    """Good files, and what reads them.

    Attributes:
        name: for the report.
        files: the good files by their path in a folder.
        targets: paths of those that get damaged.
        run: reads the files below a folder as a user's command does, and returns the digest of the result. It may write
            into the second folder.
        may_write: patterns of files that it may write among the good ones, as a resumed run does.
    """

    name: str
    files: Mapping[str, bytes]
    targets: Sequence[str]
    run: Callable[[Path, Path], str]
    may_write: Sequence[str] = ()


@dataclass
class Outcome:
    """How a process that read files ended."""

    verdict: Verdict
    text: str = ""  # the result's digest, or the error
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def digest(*values: Any) -> str:
    """The same text for the same values: tensors, arrays, numbers, text, and containers of these."""
    state = hashlib.sha256()
    for part in _parts(values):
        state.update(part)
    return state.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


# ------------------------------------------------------------------------------------------------- processes


def judge(
    subject: Subject,
    files: Path,
    work: Path,
    *,
    expected: str,
    target: str,
    wrong_type: bool,
    seconds: float,
    memory: int,
) -> Outcome:
    """Let ``subject`` read the damaged ``files`` and say what came of it.

    Args:
        work: an empty folder, for what it writes.
        expected: the digest of the good files' result.
        target: the damaged file.
        wrong_type: see ``Change``.
        seconds: a process that takes longer hangs.
        memory: bytes that it may take besides what it has at its start.
    """
    before = _contents(files)
    outcome = in_process(lambda: subject.run(files, work / "output"), work, seconds=seconds, memory=memory)
    if (work / "current" / MARKER).exists():
        return Outcome(Verdict.RAN_CODE, outcome.text)
    changed = [path for path, _ in before ^ _contents(files) if not _may_write(subject, path)]
    changed += [path for path, _ in _contents(work / "current")]
    if changed:
        return Outcome(Verdict.WROTE, ", ".join(sorted(set(changed))))
    if outcome.verdict is Verdict.ERROR:
        named = str(files) in outcome.text or Path(target).name in outcome.text
        clear = named and "\n" not in outcome.text and len(outcome.text) <= LONGEST_MESSAGE
        outcome.verdict = Verdict.ERROR if clear else Verdict.UNCLEAR
    elif outcome.verdict is Verdict.SAME and outcome.text != expected:
        told = any(Path(target).name in warning for warning in outcome.warnings)
        outcome.verdict = Verdict.SILENT if wrong_type and not told else Verdict.OTHER
    return outcome


def _may_write(subject: Subject, path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in subject.may_write)


def _contents(folder: Path) -> set[tuple[str, bytes]]:
    """Path and content of every file below a folder; folders have none."""
    return {
        (path.relative_to(folder).as_posix(), path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def in_process(function: Callable[[], str], work: Path, *, seconds: float, memory: int) -> Outcome:
    """Call ``function`` in a forked process, which has ``work`` for its output, temporary files and current folder."""
    for name in ("output", "current", "temporary"):
        (work / name).mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(function, work, memory, theirs), daemon=False)
    start = time.monotonic()
    process.start()
    theirs.close()
    outcome = Outcome(Verdict.HANG, f"more than {seconds:g} s")
    try:
        if ours.poll(seconds):
            outcome = ours.recv()
    except EOFError:
        process.join()
        outcome = Outcome(Verdict.CRASH, f"exit code {process.exitcode}")
    finally:
        if outcome.verdict in (Verdict.HANG, Verdict.CRASH) and process.pid is not None:
            _end_group(process.pid)
        process.join()
    outcome.seconds = time.monotonic() - start
    return outcome


def _end_group(pid: int) -> None:
    """End a process and those that it started, which are in a group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _run(function: Callable[[], str], work: Path, memory: int, pipe: Connection) -> None:
    faulthandler.disable()  # a crash is reported by the other side
    os.setsid()
    os.chdir(work / "current")
    tempfile.tempdir = str(work / "temporary")
    warnings: list[str] = []
    _be_silent(warnings)
    limit = _address_space() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with _watched(work.parent) as acts:
        outcome = _outcome(function)
    if acts and outcome.verdict is not Verdict.MEMORY:
        started = any(act.startswith("started") for act in acts)
        outcome = Outcome(Verdict.RAN_CODE if started else Verdict.WROTE, "; ".join(acts[:5]))
    outcome.warnings = warnings
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(outcome)
    pipe.close()
    os._exit(0)  # threads that a failed reading left are not waited for


def _outcome(function: Callable[[], str]) -> Outcome:
    try:
        return Outcome(Verdict.SAME, function())
    except UserError as error:
        return Outcome(Verdict.ERROR, str(error).strip())
    except MemoryError:
        return Outcome(Verdict.MEMORY, traceback.format_exc(limit=-4))
    except BaseException:  # whatever the user would see as a traceback
        return Outcome(Verdict.TRACEBACK, traceback.format_exc(limit=-8))


def _be_silent(warnings: list[str]) -> None:
    """Nothing to the terminal; log lines from warnings on are kept."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    logging.root.addHandler(Keep(logging.WARNING))


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


@contextmanager
def _watched(folder: Path) -> Iterator[list[str]]:
    """In the block: what is opened for writing outside of ``folder``, and programs that are started."""
    acts: list[str] = []
    watching = True
    places = (f"{folder}{os.sep}", f"{os.devnull}", "/dev/shm/", "/proc/self/")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event in STARTING:
            acts.append(f"started {event} {arguments[0]!r}")
        elif event == "open" and isinstance(arguments[0], str | os.PathLike) and arguments[2] & WRITING:
            path = os.path.abspath(os.fspath(arguments[0]))
            if not path.startswith(places):
                acts.append(f"opened {path} for writing")

    sys.addaudithook(watch)
    yield acts
    watching = False
