"""What a run shows on the way: the console's line, and Weights & Biases (WANDB_PROJECT)."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage
from test_engine_selection import base

from mask2former.engine import Recipe, load_recipe, train
from mask2former.engine import hooks as engine_hooks
from mask2former.engine.hooks import ConsoleWriter, LossHistory
from mask2former.errors import UserError

__all__ = ["base"]  # a fixture

# --------------------------------------------------------------------------------------------- console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time of day, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(engine_hooks.time, "perf_counter", lambda: now[0])
    yield now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("step ")]


@pytest.mark.parametrize("start", [0, 40])
def test_time_left(start: int, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """By the steps of this process alone: an earlier part of the run doesn't count. Evaluations do."""
    writer = ConsoleWriter(start + 60)
    with EventStorage(start) as storage, caplog.at_level(logging.INFO):
        for step in range(start, start + 40):
            storage.iter = step
            clock[0] += 2
            storage.put_scalars(total_loss=1.0, lr=0.1, time=2.0, data_time=0.25)
            if step == start + 30:
                clock[0] += 100  # an evaluation
            if (step + 1) % 20 == 0:
                writer.write()
        writer.write()  # as at the end of a run that failed
    first, second = lines(caplog)
    assert first.startswith(f"step {start + 20}/{start + 60}  eta 0:01:20  total_loss 1  lr 0.1  time 2.000 s")
    assert second.startswith(f"step {start + 40}/{start + 60}  eta 0:02:20  ")  # 20 steps of (40 + 100) / 20 s
    assert "data_time 0.250 s" in second


def test_memory(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is resident, as the system has it; on a GPU what torch has taken there."""
    writer = ConsoleWriter(10)
    with EventStorage() as storage, caplog.at_level(logging.INFO):
        writer.write()
        if not Path("/proc/self/status").is_file():
            pytest.skip("the system doesn't tell the memory of a process: needs Linux")
        (line,) = lines(caplog)
        shown = int(re.search(r"memory (\d+) MiB$", line)[1])
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        assert resident - 2 < shown < 20 * resident
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
        storage.step()
        writer.write()
    assert lines(caplog)[1].endswith("memory 3 MiB")


def test_histories_stay_short(base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossHistory, "KEPT", 30)
    lengths: list[int] = []

    class Watched(ConsoleWriter):
        def write(self) -> None:
            super().write()
            storage = engine_hooks.get_event_storage()
            lengths.append(max(len(history.values()) for history in storage.histories().values()))

    monkeypatch.setattr("mask2former.engine.trainer.ConsoleWriter", Watched)
    train(replace(base, test_sets=[], max_iter=100, log_period=10))
    assert max(lengths) <= 60 and lengths[-1] >= 30


# ------------------------------------------------------------------------------------ Weights & Biases


class Wandb(ModuleType):
    """Stands for the package: remembers the runs and what they got."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[Any] = []
        self.problem: Exception | None = None

    def init(self, **arguments: Any) -> Any:
        if self.problem:
            raise self.problem
        self.runs.append(WandbRun(arguments, f"run{len(self.runs)}"))
        return self.runs[-1]


class WandbRun:
    def __init__(self, arguments: dict[str, Any], own_id: str) -> None:
        self.arguments = arguments
        self.id = arguments["id"] or own_id
        self.axes: dict[str, str] = {}
        self.rows: list[dict[str, float]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def asking(base: Recipe, **values: Any) -> Recipe:
    return replace(base, **{"test_sets": [], "wandb_project": "cells", "log_period": 1, "max_iter": 4, **values})


def test_scalars_go_to_the_project(base: Recipe, wandb: Wandb, tmp_path: Path) -> None:
    train(asking(base))
    (run,) = wandb.runs
    assert run.arguments["project"] == "cells" and run.arguments["dir"] == str(tmp_path)
    assert run.arguments["config"]["SOLVER"]["MAX_ITER"] == 4000
    assert run.axes == {"*": "iteration"}
    assert [row["iteration"] for row in run.rows] == [0, 1, 2, 3]
    assert [row["total_loss"] for row in run.rows] == pytest.approx([0, -0.5, -1, -1.5])  # medians of 0, -1, -2, -3
    assert all(row["lr"] == 1 for row in run.rows)
    assert run.finished


def test_a_resumed_run_goes_on_with_its_own(base: Recipe, wandb: Wandb) -> None:
    train(asking(base))
    train(asking(base, max_iter=6), resume=True)
    train(asking(base))
    assert [run.arguments["id"] for run in wandb.runs] == [None, "run0", None]
    assert [row["iteration"] for row in wandb.runs[1].rows] == [4, 5]


def test_it_is_off_unless_asked_for(base: Recipe, wandb: Wandb) -> None:
    train(asking(base, wandb_project=""))
    assert not wandb.runs


def test_the_key_reaches_the_recipe(repository: Path) -> None:
    """A LazyConfig's too, which holds classes."""
    yaml, lazy = (
        repository / "configs" / path / "coco" / "instance-segmentation" / f"maskformer2_R50_bs16_50ep.{ending}"
        for path, ending in ((".", "yaml"), ("lazy", "py"))
    )
    assert load_recipe(str(yaml)).wandb_project == load_recipe(str(lazy)).wandb_project == ""
    assert load_recipe(str(yaml), ["WANDB_PROJECT", "cells"]).wandb_project == "cells"
    assert load_recipe(str(lazy), ["train.wandb_project=cells"]).wandb_project == "cells"


def test_a_lazy_config_is_shown(base: Recipe, wandb: Wandb, repository: Path) -> None:
    lazy = repository / "configs" / "lazy" / "coco" / "instance-segmentation" / "maskformer2_R50_bs16_50ep.py"
    train(asking(base, config=load_recipe(str(lazy)).config))
    assert wandb.runs[0].arguments["config"]["train"]["max_iter"] == 368750


def test_it_has_to_be_installed(base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="WANDB_PROJECT is 'cells', but Weights & Biases isn't installed: pip install"):
        train(asking(base))


def test_what_it_refuses(base: Recipe, wandb: Wandb) -> None:
    wandb.problem = wandb.Error("no API key\nconfigured")
    with pytest.raises(UserError, match="^Weights & Biases: no API key configured: call 'wandb login', or set"):
        train(asking(base))


def test_the_package_itself(base: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network it writes a folder for each part of a run, which 'wandb sync' puts together by the id."""
    package = pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(asking(base))
    train(asking(base, max_iter=6), resume=True)
    package.teardown()  # its own process writes, after the run's end too
    run_id = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(folders) == 2
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        assert b"total_loss" in file.read_bytes()
