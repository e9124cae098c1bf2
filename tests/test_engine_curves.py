"""Losses and metrics as a picture."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.axes
import numpy as np
import pytest
from detectron2.utils.events import EventStorage, JSONWriter
from PIL import Image
from scripts import Program, program

from mask2former.engine import curves
from mask2former.engine.curves import CurvesWriter, draw_curves, read_metrics
from mask2former.errors import UserError


def write_run(folder: Path, factor: float = 1.0) -> Path:
    """A run of 200 steps, a line each 20, evaluated twice."""
    folder.mkdir()
    lines = []
    for step in range(19, 200, 20):
        loss = factor * math.exp(-step / 50)
        line: dict[str, Any] = {
            "iteration": step,
            "total_loss": 3 * loss,
            "loss_ce": loss,
            "loss_ce_0": loss,
            "lr": 1e-4,
        }
        if (step + 1) % 100 == 0:
            line |= {"segm/AP": step / 10, "segm/AP-person": 1.0, "sem_seg/mIoU": 30.0, "eval/time": "long"}
        lines.append(json.dumps(line))
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The panels that are drawn from now on."""
    seen: list[str] = []
    original = matplotlib.axes.Axes.set_title

    def set_title(axes: matplotlib.axes.Axes, label: str, **options: Any) -> Any:
        seen.append(label)
        return original(axes, label, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", set_title)
    return seen


def test_panels(tmp_path: Path, titles: list[str]) -> None:
    """Losses of the last layer and the main metrics; no other layers, no classes."""
    path = tmp_path / "curves.png"
    draw_curves({"run": read_metrics(write_run(tmp_path / "run"))}, path)
    assert titles == ["total_loss", "loss_ce", "lr", "segm/AP", "sem_seg/mIoU"]
    with Image.open(path) as picture:
        assert picture.width == 3 * 460 and picture.height == 2 * 310
        assert np.asarray(picture.convert("L")).std() > 5


def test_resumed_and_unfinished_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.json").open("a") as file:
        file.write('{"iteration": 199, "total_loss": 7.0}\n{"iteration": 219, "total_l')
    found = read_metrics(run)
    assert found["total_loss"][199] == 7.0
    assert sorted(found["segm/AP"].items()) == [(99, 9.9), (199, 19.9)]
    assert "eval/time" not in found and 219 not in found["total_loss"]


def test_writer_draws_at_evaluations_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[int, float]] = []

    def draw(runs: dict[str, curves.Curves], path: Path) -> None:
        assert path == tmp_path / "metrics.png"
        drawn.append(runs[tmp_path.name].get("segm/AP", {}))

    monkeypatch.setattr(curves, "draw_curves", draw)
    writers = [JSONWriter(str(tmp_path / "metrics.json")), CurvesWriter(tmp_path)]
    with EventStorage() as storage:
        for step in range(6):
            storage.iter = step
            storage.put_scalar("total_loss", 1.0)
            if step in (1, 3):
                storage.put_scalars(**{"segm/AP": float(step)}, smoothing_hint=False)
            for writer in writers:
                writer.write()
        for writer in writers:
            writer.close()
    assert drawn == [{1: 1.0}, {1: 1.0, 3: 3.0}, {1: 1.0, 3: 3.0}]


def test_a_drawing_that_fails_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CurvesWriter(tmp_path).close()  # no metrics yet
    assert not caplog.records
    run = write_run(tmp_path / "run")
    (run / "metrics.png").mkdir()  # where the file should go
    CurvesWriter(run).close()
    assert "no curves were drawn: cannot write" in caplog.text


@pytest.fixture
def plot(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    return program(repository / "tools" / "plot_metrics.py", monkeypatch, capsys)


def test_command(plot: Program, tmp_path: Path, titles: list[str]) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", 2.0)
    code, printed = plot(str(first))
    assert code == 0 and printed.strip() == str(first / "metrics.png")
    assert (first / "metrics.png").is_file()
    both = tmp_path / "both.svg"
    titles.clear()
    code, _ = plot(str(first), str(second), "--output", str(both), "--metrics", "loss_ce_0", "segm/AP-person")
    assert code == 0
    assert titles == ["loss_ce_0", "segm/AP-person"]
    assert "<svg" in both.read_text()


def test_mistakes(plot: Program, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    def error(*arguments: str) -> str:
        code, printed = plot(*arguments)
        assert code == 1 and "Traceback" not in printed
        return printed

    assert "give the output folder of a run" in error(str(tmp_path))
    assert "no run has values of 'segm/PQ': there are loss_ce, " in error(str(run), "--metrics", "segm/PQ")
    assert "must end in .png" in error(str(run), "--output", "curves.bmp")
    for text, message in (
        ("", "no values yet"),
        ("[]\n", "not a record"),
        ("{\n{}\n", "line 1 is not valid JSON"),
        ('{"iteration": 1, "data_time": 2}\n', "neither losses nor metrics"),
    ):
        (run / "metrics.json").write_text(text)
        assert message in error(str(run))
    with pytest.raises(UserError, match="not a record"):
        (run / "metrics.json").write_text('{"total_loss": 1}\n')
        read_metrics(run)
