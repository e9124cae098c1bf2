"""Which weights of a run are kept: the best, their moving average; and when a run ends early.

TEST.BEST_METRIC, SOLVER.EARLY_STOPPING_PATIENCE and SOLVER.EMA_DECAY reach the recipe, and the recipe the loop.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mask2former.engine import Recipe, evaluate_weights, load_recipe, train
from mask2former.engine.recipe import TestSet as EvaluatedSet  # pytest collects what is called Test*
from mask2former.errors import UserError


class Counter(nn.Module):
    """A model whose weight is the number of steps that it has been trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Any) -> Any:
        return {"loss": -self.weight.sum()} if self.training else [{"weight": self.weight.item()}]


class Scores:
    """An evaluator that gives a list's next score each time, and remembers the weights that it was given."""

    def __init__(self, scores: Sequence[float]) -> None:
        self._scores = iter(scores)
        self.weights: list[float] = []

    def reset(self) -> None: ...

    def process(self, inputs: Any, outputs: Any) -> None:
        self.weights.append(outputs[0]["weight"])

    def evaluate(self) -> dict[str, Any]:
        return {"segm": {"AP": next(self._scores)}}


@pytest.fixture
def base(repository: Path, tmp_path: Path) -> Recipe:
    return ten_steps(repository, tmp_path)


def ten_steps(repository: Path, output_dir: Path) -> Recipe:
    """Ten steps, evaluated after every second one."""
    options = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output_dir), "MODEL.WEIGHTS", "", "TEST.EVAL_PERIOD", "2"]
    return replace(
        load_recipe(str(repository / "configs" / "quick" / "nuclei.yaml"), options),
        max_iter=10,
        build_model=Counter,
        build_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        build_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100),
        build_train_loader=lambda: endless(),
    )


def endless() -> Iterator[list[dict[str, Any]]]:
    while True:
        yield [{}]


def scored(recipe: Recipe, scores: Sequence[float], **values: Any) -> tuple[Recipe, Scores]:
    evaluator = Scores(scores)
    return replace(recipe, test_sets=[EvaluatedSet("set", lambda: [[{}]], lambda: evaluator)], **values), evaluator


def saved(folder: Path, name: str) -> float:
    return torch.load(folder / f"{name}.pth", weights_only=True)["model"]["weight"].item()


def last(folder: Path) -> str:
    return (folder / "last_checkpoint").read_text()


def test_keys_reach_the_recipe(repository: Path) -> None:
    values = {"TEST.BEST_METRIC": "segm/AP", "SOLVER.EARLY_STOPPING_PATIENCE": "3", "SOLVER.EMA_DECAY": "0.9"}
    yaml = repository / "configs" / "coco" / "instance-segmentation" / "maskformer2_R50_bs16_50ep.yaml"
    recipe = load_recipe(str(yaml), [item for pair in values.items() for item in pair])
    lazy_values = ["train.best_metric=segm/AP", "train.early_stopping_patience=3", "train.ema_decay=0.9"]
    lazy = load_recipe(
        str(repository / "configs" / "lazy" / "coco" / "instance-segmentation" / "maskformer2_R50_bs16_50ep.py"),
        lazy_values,
    )
    for found in (recipe, lazy):
        assert (found.best_metric, found.patience, found.ema_decay) == ("segm/AP", 3, 0.9)


def test_nothing_is_on_by_default(base: Recipe, tmp_path: Path) -> None:
    recipe, evaluator = scored(base, [1, 5, 4, 3, 2])
    train(recipe)
    assert evaluator.weights == [2, 4, 6, 8, 10]
    assert {path.name for path in tmp_path.glob("*.pth")} == {"model_final.pth"}
    assert "ema" not in torch.load(tmp_path / "model_final.pth", weights_only=True)


def test_best_weights(base: Recipe, tmp_path: Path) -> None:
    recipe, _ = scored(base, [1, 5, 4, 3, 2], best_metric="segm/AP")
    train(recipe)
    assert saved(tmp_path, "model_best") == 4
    assert json.loads((tmp_path / "model_best.json").read_text()) == {
        "metric": "segm/AP",
        "value": 5,
        "iteration": 3,
    }
    assert saved(tmp_path, "model_final") == 10
    assert last(tmp_path) == "model_final.pth"  # what --resume takes


def test_a_resumed_run_knows_the_best(base: Recipe, tmp_path: Path) -> None:
    recipe, _ = scored(base, [1, 5, 4], best_metric="segm/AP", max_iter=6)
    train(recipe)
    recipe, _ = scored(base, [4.5, 4.9], best_metric="segm/AP")
    train(recipe, resume=True)
    assert saved(tmp_path, "model_best") == 4
    recipe, _ = scored(base, [6], best_metric="segm/AP", max_iter=12)
    train(recipe, resume=True)
    assert saved(tmp_path, "model_best") == 12


def test_a_new_run_does_not(base: Recipe, tmp_path: Path) -> None:
    train(scored(base, [5], best_metric="segm/AP", max_iter=2)[0])
    train(scored(base, [1, 3], best_metric="segm/AP", max_iter=4)[0])
    assert saved(tmp_path, "model_best") == 4


def test_unknown_metric(base: Recipe) -> None:
    recipe, _ = scored(base, [1], best_metric="segm/PQ")
    with pytest.raises(UserError, match=r"BEST_METRIC is 'segm/PQ', which the evaluation lacks: it gives segm/AP"):
        train(recipe)


def test_early_stopping(base: Recipe, tmp_path: Path) -> None:
    recipe, evaluator = scored(base, [1, 5, 4, 3, 2], best_metric="segm/AP", patience=2)
    assert train(recipe) == {"segm": {"AP": 3}}
    assert evaluator.weights == [2, 4, 6, 8]
    assert saved(tmp_path, "model_best") == 4
    assert saved(tmp_path, "model_final") == 8
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["segm/AP"] == 3


def test_no_early_stopping_while_it_gets_better(base: Recipe) -> None:
    recipe, evaluator = scored(base, [2, 1, 3, 2.5, 4], best_metric="segm/AP", patience=2)
    train(recipe)
    assert evaluator.weights == [2, 4, 6, 8, 10]


def averages(decay: float, steps: int) -> list[float]:
    """After each step, for weights 1, 2, 3, ..."""
    values = [1.0]
    for weight in range(2, steps + 1):
        values.append(decay * values[-1] + (1 - decay) * weight)
    return values


def test_moving_average(base: Recipe, tmp_path: Path) -> None:
    recipe, evaluator = scored(base, [1, 5, 4, 3, 2], ema_decay=0.75, best_metric="segm/AP")
    train(recipe)
    expected = averages(0.75, 10)
    assert evaluator.weights == pytest.approx(expected[1::2])
    assert saved(tmp_path, "model_ema") == pytest.approx(expected[9])
    assert saved(tmp_path, "model_best") == pytest.approx(expected[3])
    assert saved(tmp_path, "model_final") == 10  # from which the run is resumed

    recipe, evaluator = scored(base, [1, 1], ema_decay=0.75)
    evaluate_weights(recipe, resume=True)
    evaluate_weights(replace(recipe, weights=str(tmp_path / "model_ema.pth")))
    assert evaluator.weights == pytest.approx([expected[9]] * 2)


def test_moving_average_is_resumed(base: Recipe, tmp_path: Path) -> None:
    train(scored(base, [1, 1], ema_decay=0.75, max_iter=4)[0])
    recipe, evaluator = scored(base, [1, 1, 1], ema_decay=0.75)
    train(recipe, resume=True)
    assert evaluator.weights == pytest.approx(averages(0.75, 10)[5::2])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema_decay": 1.0}, "SOLVER.EMA_DECAY is 1.0, expected 0"),
        ({"patience": 2}, "PATIENCE is 2, which needs TEST.BEST_METRIC"),
        ({"patience": 2, "best_metric": "segm/AP", "eval_period": 0}, "TEST.EVAL_PERIOD, now 0"),
        ({"best_metric": "segm/AP", "test_sets": []}, "no test set"),
    ],
)
def test_mistakes(base: Recipe, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(replace(base, **values))
