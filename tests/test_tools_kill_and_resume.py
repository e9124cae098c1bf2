"""tools/kill_and_resume.py sees what differs; that nothing does between runs is its own long test."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script

NAN = float("nan")
LINES = [
    {"iteration": 2, "total_loss": 0.5, "lr": 0.1, "time": 3.0},
    {"iteration": 3, "segm/AP": NAN, "total_loss": 0.25},
]


@pytest.fixture
def tool(repository: Path) -> ModuleType:
    return load_script(repository / "tools" / "kill_and_resume.py")


def write(folder: Path, weight: float = 1.0, step: int = 2, lines: list[dict[str, Any]] = LINES) -> Path:
    """What a run leaves, in short."""
    (folder / "inference").mkdir(parents=True)
    state = {"model": {"weight": torch.tensor([weight, NAN])}, "trainer": {"iteration": step, "losses": [(0.5, 2)]}}
    torch.save(state, folder / "model_0000002.pth")
    for name in ("model_best.json", "last_checkpoint", "inference/coco_instances_results.json"):
        (folder / name).write_text("text")
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def found(
    tool: ModuleType, tmp_path: Path, change: Callable[[Path], object] = lambda folder: None, **values: Any
) -> str:
    folder = write(tmp_path / "found", **values)
    change(folder)
    return "; ".join(tool.differences(write(tmp_path / "expected"), folder))


def test_equal_runs(tool: ModuleType, tmp_path: Path) -> None:
    """Times differ, and an interrupted run has lines twice and lines of its own."""
    lines = [LINES[0] | {"time": 4.0}, {"iteration": 1, "total_loss": 7.0}, *LINES]
    assert found(tool, tmp_path, lines=lines) == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"weight": 1 + 2.0**-23}, "model_0000002.pth model weight"),
        ({"weight": -1.0}, "model_0000002.pth model weight"),
        ({"step": 3}, "model_0000002.pth trainer iteration"),
        ({"lines": LINES[:1]}, "metrics.json lacks"),
        ({"lines": [*LINES, LINES[0] | {"lr": 0.2}]}, "metrics.json: ('lr', 2) is 0.2, not 0.1"),
        ({"change": lambda folder: (folder / "model_0000002.pth").unlink()}, "model_0000002.pth is missing"),
        ({"change": lambda folder: (folder / "model_best.json").write_text("")}, "model_best.json differs"),
        ({"change": lambda folder: (folder / "model_final.pth.part").touch()}, "model_final.pth.part is left"),
    ],
)
def test_runs_that_differ(tool: ModuleType, tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    assert found(tool, tmp_path, **values).startswith(expected)
