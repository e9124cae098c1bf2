"""The benchmark of the model on tiny pictures, and what it measures with."""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances
from scripts import load_script
from tiny_nuclei_model import build_tiny_model
from torch import Tensor

from mask2former.errors import UserError
from mask2former.modeling import HungarianMatcher, Predictions, SetCriterion
from mask2former.modeling.targets import Targets

LAYERS, PICTURES, QUERIES, CLASSES, CHANNELS, SIDE = 2, 2, 6, 3, 8, 64


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch, one_thread_and_seed: None) -> Path:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))  # as where a program is run by its path
    return repository / "benchmarks"


@pytest.fixture
def model(benchmarks: Path, hugging_face: ModuleType) -> Any:
    return load_script(benchmarks / "model.py")


# -------------------------------------------------------------------------------------------- losses on whole masks


def boxes(*corners: tuple[int, int, int, int]) -> Tensor:
    masks = torch.zeros(len(corners), SIDE, SIDE, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def losses_and_gradients(criterion: torch.nn.Module) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Of random predictions for three objects on two pictures; mask features are smooth, as a model's are."""
    generator = torch.Generator().manual_seed(0)
    features = F.interpolate(torch.randn(PICTURES, CHANNELS, 4, 4, generator=generator), scale_factor=4, mode="bicubic")
    inputs = (
        torch.randn(LAYERS, PICTURES, QUERIES, CLASSES + 1, generator=generator),
        torch.randn(LAYERS, PICTURES, QUERIES, CHANNELS, generator=generator),
        features,
    )
    for tensor in inputs:
        tensor.requires_grad_()
    targets = [
        Targets(torch.tensor([0, 2]), boxes((0, 0, 32, 40), (16, 40, 64, 64))),
        Targets(torch.tensor([1]), boxes((8, 8, 56, 40))),
    ]
    losses = criterion(Predictions(*inputs), targets)
    return losses, torch.autograd.grad(sum(losses.values()), inputs)


def test_losses_on_whole_masks_are_those_at_many_points(benchmarks: Path) -> None:
    """But for borders: points beside a picture's see zeros outside, and those at an object's see it fade."""
    points = 100_000
    matcher = HungarianMatcher(2.0, 5.0, 5.0, num_points=points)
    # Uncertain points aren't the average of all.
    at_points = SetCriterion(CLASSES, matcher, num_points=points, oversample_ratio=1, importance_sample_ratio=0.0)
    on_masks = importlib.import_module("full_mask_losses").FullMaskCriterion(at_points)
    expected, expected_gradients = losses_and_gradients(at_points)
    found, gradients = losses_and_gradients(on_masks)
    assert list(found) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=0.02, atol=0.0)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).norm() < 0.1 * expected_gradient.norm()


# -------------------------------------------------------------------------------------------- parts


def training_loss(model: Any) -> Tensor:
    masks = boxes((0, 0, 32, 40), (16, 40, 64, 64))
    instances = Instances((SIDE, SIDE), gt_classes=torch.tensor([0, 1]), gt_masks=BitMasks(masks))
    return sum(model([{"image": torch.rand(3, SIDE, SIDE) * 255, "instances": instances}]).values())


def test_parts_share_all_operations(benchmarks: Path) -> None:
    parts = importlib.import_module("model_parts")
    model = build_tiny_model()
    with parts.counted_flops() as counter, parts.metered(model, counter.get_total_flops) as flops:
        loss = training_loss(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert sum(flops.values()) == counter.get_total_flops()
    assert list(flops) == [
        "rest",
        "backbone",
        "pixel decoder",
        "transformer decoder",
        "losses",
        "matching",
        "losses, backward",
        "transformer decoder, backward",
        "pixel decoder, backward",
        "backbone, backward",
        "clipping, optimizer",
    ]
    # A product has two in its backward pass; the picture has no gradient, and attention makes its weights again.
    assert flops["pixel decoder, backward"] == 2 * flops["pixel decoder"]
    assert flops["losses, backward"] == 2 * flops["losses"]
    stem = 2 * (SIDE // 2) ** 2 * 16 * 7 * 7 * 3
    assert flops["backbone, backward"] == 2 * flops["backbone"] - stem
    assert flops["transformer decoder, backward"] == pytest.approx(2 * flops["transformer decoder"], rel=0.2)
    assert flops["rest"] == flops["clipping, optimizer"] == 0


def test_parts_of_inference(benchmarks: Path) -> None:
    parts = importlib.import_module("model_parts")
    model = build_tiny_model().eval().requires_grad_(False)
    forwards = [module.forward for module in model.modules()]
    ticks = iter(range(100))
    with torch.inference_mode(), parts.metered(model, lambda: next(ticks)) as spent:
        model([{"image": torch.rand(3, SIDE, SIDE)}])
    # Each begins and ends once; what isn't theirs is before them, between them or, at last, post-processing.
    assert spent == {"rest": 3, "backbone": 1, "pixel decoder": 1, "transformer decoder": 1, "post-processing": 1}
    assert [module.forward for module in model.modules()] == forwards


def test_attention_is_counted(benchmarks: Path) -> None:
    query = torch.randn(2, 4, 10, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 4, 30, 8, requires_grad=True)
    bias = torch.zeros(2, 1, 10, 30)
    product = 2 * (2 * 4) * 10 * 30 * 8
    with importlib.import_module("model_parts").counted_flops() as counter:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        assert counter.get_total_flops() == 2 * product
        attended.sum().backward()
    assert counter.get_total_flops() == 7 * product


# -------------------------------------------------------------------------------------------- the program


def one_mebibyte_each(pairs: Sequence[Any], threads: int) -> Iterator[int]:
    return (1 << 20 for _ in pairs)


@pytest.mark.slow
def test_prints_tables_and_writes_files(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "_memory_in_another_process", one_mebibyte_each)  # they take seconds
    files = [tmp_path / "model.json", tmp_path / "model.png"]
    model.main(["--quick", "--threads", "1", "--json", str(files[0]), "--plot", str(files[1])])
    printed = capsys.readouterr().out
    for words in ("inference, 128 x 160, scores", "training, 64 x 64, 100 masks", "Matching and loss, 64 x 64", "100%"):
        assert words in printed
    assert files[1].stat().st_size > 10_000

    written = json.loads(files[0].read_text())
    assert written["machine"]["threads"] == [1] and written["machine"]["best matrix product, GFLOP/s"] > 1
    results = {result["name"]: result for result in written["results"]}
    assert len(results) == 5 + 6
    inference = results["inference, 128 x 160"]
    assert set(inference["seconds"]) == {"ours", "ours, scores", "huggingface"} == set(inference["memory"])
    assert sum(inference["part_seconds"].values()) == pytest.approx(inference["seconds"]["ours"][0], rel=0.1)
    assert results["training, 64 x 64, 50 masks"]["memory"] == {"ours": 1 << 20, "full masks": 1 << 20}
    assert {name: [point["value"] for point in points] for name, points in written["growth"].items()} == {
        "side": [64, 128],
        "masks": [1, 4],
        "queries": [4, 8],
    }
    for small, large in written["growth"].values():
        assert small["gigaflop"] < large["gigaflop"] and set(large["seconds"]) == {"ours", "huggingface"}


def test_an_interrupted_run_keeps_what_it_measured(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def take_turns(task: Any, names: Sequence[str], *_: Any) -> Any:
        if task.work == "loss":
            raise KeyboardInterrupt
        return model.Result(task, {name: [1.0, 2.0] for name in names}, {}, {"backbone": 1.0}, {"backbone": 4.0}, 8.0)

    monkeypatch.setattr(model, "_take_turns", take_turns)
    path = tmp_path / "model.json"
    with pytest.raises(KeyboardInterrupt):
        model.main(["--threads", "1", "--json", str(path)])
    names = [result["name"] for result in json.loads(path.read_text())["results"]]
    assert names == ["inference, 800 x 1088", *(f"training, {side} x {side}, 10 masks" for side in (512, 1024))]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Rounds, seconds of both, their ratio, no memory; a floor of 4 GFLOP at 8 GFLOP/s, and how many times as long.
    figures = ["2", "1.50", "1.50", "1.00", "(1.00", "to", "1.00)", "0.500", "3.00"]
    assert ["training,", "1024", "x", "1024,", "10", "masks", *figures] in rows


@pytest.mark.slow
def test_memory_is_measured_in_another_process(model: Any) -> None:
    task = model.Task("training", (64, 64))
    if not model.can_measure_memory():
        pytest.skip("the system doesn't tell a process's peak")
    (added,) = model._memory_in_another_process([("ours", task)], 1)
    gradients = 4 * 44e6
    assert gradients < added < 3 * gradients


@pytest.mark.slow
def test_another_result_is_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SetCriterion, "forward", lambda *_: {"loss": torch.tensor(1.0, requires_grad=True)})
    with pytest.raises(RuntimeError, match="the sum of losses is 1.0, but Hugging Face's"):
        model.main(["--work", "loss", "--sizes", "64", "--threads", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--sizes", "64", "32"], "--sizes has 32, expected at least 64"),
        (["--json", "nowhere/model.json"], "no folder 'nowhere'"),
        (["--plot", "model.txt"], "expected a name that ends in .png"),
        (["--plot", "model.png", "--work", "loss"], "--plot draws growth"),
    ],
)
def test_options_that_do_not_fit_are_named(model: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.main(arguments)
