"""The repository's programs, called within the tests' process."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from mask2former.errors import command

__all__ = ["Program", "load_script", "program"]

# From arguments to the exit code, and what is printed.
Program = Callable[..., tuple[int, str]]


def load_script(path: Path) -> ModuleType:
    """A program's file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: Sequence[str] = (),
) -> Program:
    """A program as a function, which puts the arguments ``first`` before those that it is given."""
    module = load_script(path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [path.name, *first, *arguments])
        with pytest.raises(SystemExit) as caught:
            command(module.main)
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out + printed.err

    return run
