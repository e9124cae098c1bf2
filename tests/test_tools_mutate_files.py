"""tools/mutate_files.py: a small part of its cases; and it notices what it is there to notice."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mask2former.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


@pytest.fixture(scope="module")
def runner(repository: Path) -> ModuleType:
    sys.path.insert(0, str(repository / "tools"))
    try:
        from mutation import runner
    finally:
        sys.path.pop(0)
    return runner


def test_damaged_files_end_in_one_clear_error_or_rightly(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/mutate_files.py", "--cases", "10", "--seed", "7", "--keep", str(tmp_path)],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("checkpoints", "annotations"):
        assert f"10 damaged {kind}, 0 failures" in done.stdout


def write(path: Path) -> str:
    path.write_text("text")
    return ""


def refuse(message: str) -> str:
    raise UserError(message)


CASES: dict[str, tuple[Callable[[Path, Path], Any], bool, str]] = {
    "the same": (lambda files, output: "good", False, "SAME"),
    "another result": (lambda files, output: "other", False, "OTHER"),
    "another result of a wrong type": (lambda files, output: "other", True, "SILENT"),
    "an error": (lambda files, output: refuse(f"'{files / 'a.json'}' is broken"), False, "ERROR"),
    "an error without a file": (lambda files, output: refuse("it is broken"), False, "UNCLEAR"),
    "an error of two lines": (lambda files, output: refuse("a.json is broken:\nvery"), False, "UNCLEAR"),
    "a traceback": (lambda files, output: {}["a.json"], False, "TRACEBACK"),
    "an exit": (lambda files, output: sys.exit("a.json"), False, "TRACEBACK"),
    "a crash": (lambda files, output: os.abort(), False, "CRASH"),
    "a hang": (lambda files, output: time.sleep(60), False, "HANG"),
    "memory": (lambda files, output: str(len(bytearray(2**31))), False, "MEMORY"),
    "a shell": (lambda files, output: str(os.system("true")), False, "RAN_CODE"),
    "a file of output": (lambda files, output: f"{write(output / 'b')}good", False, "SAME"),
    "a file that a resumed run writes": (lambda files, output: f"{write(files / 'log')}good", False, "SAME"),
    "a new file": (lambda files, output: write(files / "b"), False, "WROTE"),
    "a changed file": (lambda files, output: write(files / "a.json"), False, "WROTE"),
    "a file elsewhere": (lambda files, output: write(files.parent.parent / "b"), False, "WROTE"),
    "a file in the current folder": (lambda files, output: write(Path("b")), False, "WROTE"),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str, runner: ModuleType, tmp_path: Path) -> None:
    run, wrong_type, verdict = CASES[case]
    files, work = tmp_path / "case" / "files", tmp_path / "case" / "work"
    for folder in (files, work):
        folder.mkdir(parents=True)
    (files / "a.json").write_text("{}")
    subject = runner.Subject("subject", {"a.json": b"{}"}, ["a.json"], run, may_write=["log"])
    seconds = 0.5 if verdict == "HANG" else 30
    limits = {"seconds": seconds, "memory": 2**30}
    outcome = runner.judge(subject, files, work, expected="good", target="a.json", wrong_type=wrong_type, **limits)
    assert outcome.verdict.name == verdict, outcome.text
