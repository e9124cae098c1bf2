"""What an interrupted run leaves, and what a resumed one makes of it."""

import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_selection import Counter, Scores, base, endless, last, saved, scored

from mask2former.engine import Recipe, load_recipe, train
from mask2former.engine.curves import read_metrics
from mask2former.errors import PREEMPTED, UserError

__all__ = ["base"]  # a fixture


class Interrupted(Counter):
    """Gets signals in its forward pass of the fourth step."""

    signals = (signal.SIGTERM,)

    def forward(self, batch: Any) -> Any:
        if self.training and self.weight.item() == 3:
            for number in self.signals:
                signal.raise_signal(number)
        return super().forward(batch)


class PreemptedTwice(Interrupted):
    signals = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT)


class InterruptedTwice(Interrupted):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGINT)


class InterruptedScores(Scores):
    """Gets SIGTERM in the evaluation after the fourth step."""

    def evaluate(self) -> dict[str, Any]:
        if self.weights[-1] == 4:
            signal.raise_signal(signal.SIGTERM)
        return super().evaluate()


def numbered(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model_0*.pth"))


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def preempted(recipe: Recipe) -> None:
    with pytest.raises(SystemExit) as caught:
        train(recipe)
    assert caught.value.code == PREEMPTED


def test_sigterm_saves_after_the_step(base: Recipe, tmp_path: Path) -> None:
    recipe, evaluator = scored(base, [5, 4, 3, 2], best_metric="segm/AP")
    preempted(replace(recipe, build_model=Interrupted))
    assert evaluator.weights == [2] and last(tmp_path) == "model_0000003.pth" and saved(tmp_path, "model_0000003") == 4

    recipe, evaluator = scored(base, [6, 3, 2, 1], best_metric="segm/AP")
    train(recipe, resume=True)
    assert evaluator.weights == [4, 6, 8, 10]  # that of step 4, which was due, too
    assert saved(tmp_path, "model_best") == 4


def test_sigterm_in_an_evaluation(base: Recipe, tmp_path: Path) -> None:
    recipe, _ = scored(base, [], best_metric="segm/AP")
    evaluator = InterruptedScores([5, 4])
    preempted(replace(recipe, test_sets=[replace(recipe.test_sets[0], build_evaluator=lambda: evaluator)]))
    assert last(tmp_path) == "model_0000003.pth"
    recipe, evaluator = scored(base, [6, 3, 2, 1], best_metric="segm/AP")
    train(recipe, resume=True)
    assert evaluator.weights == [4, 6, 8, 10]


def test_a_signal_that_comes_twice_from_the_cluster_and_its_launcher(base: Recipe, tmp_path: Path) -> None:
    preempted(replace(base, build_model=PreemptedTwice, test_sets=[]))
    assert saved(tmp_path, "model_0000003") == 4


def test_sigterm_in_the_last_step(base: Recipe, tmp_path: Path) -> None:
    """The last evaluation waits for --resume."""
    recipe, evaluator = scored(base, [], best_metric="segm/AP", max_iter=4, eval_period=0)
    preempted(replace(recipe, build_model=Interrupted))
    assert evaluator.weights == [] and saved(tmp_path, "model_final") == 4
    recipe, evaluator = scored(base, [5], best_metric="segm/AP", max_iter=4, eval_period=0)
    assert train(recipe, resume=True) == {"segm": {"AP": 5}}
    assert evaluator.weights == [4] and saved(tmp_path, "model_best") == 4
    assert read_metrics(tmp_path)["segm/AP"] == {4: 5}


def test_results_are_written_at_once(base: Recipe, tmp_path: Path) -> None:
    """Not with the next line of losses, before which the run could be killed."""
    written: list[int] = []

    class Reading(Scores):
        def evaluate(self) -> dict[str, Any]:
            if self.weights[-1] > 2:
                written.extend(step for step in read_metrics(tmp_path)["segm/AP"] if step not in written)
            return super().evaluate()

    evaluator = Reading([5, 4, 3, 2, 1])
    recipe, _ = scored(base, [])
    train(replace(recipe, test_sets=[replace(recipe.test_sets[0], build_evaluator=lambda: evaluator)]))
    assert written == [1, 3, 5, 7]
    assert list(read_metrics(tmp_path)["segm/AP"]) == [1, 3, 5, 7, 10]


def test_what_a_killed_run_left_undone_behind_its_checkpoint(base: Recipe, tmp_path: Path) -> None:
    """A line of losses that was due, of which half was written."""
    recipe = replace(base, test_sets=[], log_period=2, checkpoint_period=4)
    train(recipe)
    whole = read_metrics(tmp_path)
    lines = (tmp_path / "metrics.json").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.json").write_text("".join(lines[:3]) + lines[3][:20])
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    train(recipe, resume=True)
    assert read_metrics(tmp_path)["total_loss"] == whole["total_loss"]
    assert list(whole["total_loss"]) == [1, 3, 5, 7, 9]


def test_an_evaluation_is_not_done_twice(base: Recipe) -> None:
    train(scored(base, [5, 4], max_iter=4)[0])
    recipe, evaluator = scored(base, [3, 2, 1])
    train(recipe, resume=True)
    assert evaluator.weights == [6, 8, 10]


def test_a_second_interrupt_stops_at_once(base: Recipe, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(replace(base, build_model=InterruptedTwice, test_sets=[]))
    assert not list(tmp_path.glob("*.pth"))


def test_old_checkpoints_are_removed(base: Recipe, repository: Path, tmp_path: Path) -> None:
    """Those of the run's first part too; and what a killed process left half-written."""
    recipe = replace(base, test_sets=[], checkpoint_period=2)
    train(replace(recipe, max_iter=6))
    assert numbered(tmp_path) == ["model_0000001.pth", "model_0000003.pth", "model_0000005.pth"]
    (tmp_path / "model_0000007.pth.part").write_bytes(b"half")
    (tmp_path / "model_best.pth").write_bytes(b"another's")
    train(replace(recipe, max_checkpoints=2), resume=True)
    assert numbered(tmp_path) == ["model_0000007.pth", "model_0000009.pth"]
    assert {path.name for path in tmp_path.glob("model_[!0]*")} == {"model_best.pth", "model_final.pth"}

    with pytest.raises(UserError, match="SOLVER.CHECKPOINTS_TO_KEEP is -1, expected 0"):
        train(replace(recipe, max_checkpoints=-1))
    path = str(repository / "configs" / "quick" / "nuclei.yaml")
    assert load_recipe(path).max_checkpoints is None
    assert load_recipe(path, ["SOLVER.CHECKPOINTS_TO_KEEP", "2"]).max_checkpoints == 2


@pytest.mark.parametrize("lacks", ["checkpoint", "loader", "nothing"])
def test_checkpoints_of_before(base: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, lacks: str) -> None:
    """They lack seed and position in the data, and go on with other data than without an interruption."""

    class Loader:
        position = 0

        def __iter__(self) -> Iterator[list[dict[str, Any]]]:
            for batch in endless():
                self.position += 1
                yield batch

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    loaders: list[Any] = []

    def build_loader() -> Any:
        loaders.append(endless() if lacks == "loader" else Loader())
        return loaders[-1]

    recipe = replace(base, test_sets=[], build_train_loader=build_loader)
    train(replace(recipe, max_iter=4))
    if lacks == "checkpoint":
        content = torch.load(tmp_path / "model_final.pth", weights_only=True)
        content["trainer"]["hooks"] = {"LRScheduler": content["trainer"]["hooks"]["LRScheduler"]}
        torch.save(content, tmp_path / "model_final.pth")
    with caplog.at_level(logging.WARNING):
        train(recipe, resume=True)
    assert saved(tmp_path, "model_final") == 10
    warned = [message for message in caplog.messages if "lacks a position in the data" in message]
    assert len(warned) == (lacks != "nothing")
    if lacks == "nothing":
        assert loaders[1].position == 10
