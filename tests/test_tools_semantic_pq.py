"""PQ of semantic segmentation, against panopticapi on files, and mIoU against Detectron2's evaluator."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from perfect_outputs import perfect_semantic
from PIL import Image
from scripts import Program, program
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.evaluation import SemanticEvaluator
from mask2former.evaluation.semantic_quality import SemanticQuality

CLASSES = 6


def random_labels(rng: np.random.Generator, classes: int = CLASSES) -> np.ndarray:
    """Blocks of random classes, some of them ``classes``: none."""
    blocks = rng.integers(0, classes + 1, (6, 8))
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def make_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Truth and a prediction that equals it on two thirds of the pixels, roughly."""
    truth = random_labels(rng)
    other = random_labels(rng)
    return truth, np.where(rng.random((6, 8)).repeat(8, axis=0).repeat(8, axis=1) < 0.3, other, truth)


def as_panoptic(folder: Path, name: str, classes: np.ndarray) -> dict[str, Any]:
    """Write the PNG in which segment c + 1 is all of class c and 0 is nothing, and describe it."""
    ids = np.where(classes == CLASSES, 0, classes + 1)
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.stack([ids, ids * 0, ids * 0], axis=-1).astype(np.uint8)).save(folder / name)
    segments = [
        {"id": int(i), "category_id": int(i) - 1, "iscrowd": 0, "area": int((ids == i).sum())}
        for i in np.unique(ids)
        if i
    ]
    return {"image_id": 1, "file_name": name, "segments_info": segments}


def test_equals_panopticapi(tmp_path: Path) -> None:
    api = pytest.importorskip(
        "panopticapi.evaluation", reason="needs panopticapi: pip install --no-deps panopticapi-lite"
    )
    rng = np.random.default_rng(0)
    quality = SemanticQuality(CLASSES)
    pairs = []
    for number in range(8):
        truth, predicted = make_pair(rng)
        quality.add(truth, predicted)
        name = f"{number}.png"
        pairs.append((as_panoptic(tmp_path / "truth", name, truth), as_panoptic(tmp_path / "found", name, predicted)))
    categories = {i: {"id": i, "name": str(i), "isthing": 0} for i in range(CLASSES)}
    expected = api.pq_compute_single_core(0, pairs, str(tmp_path / "truth"), str(tmp_path / "found"), categories)
    average, by_class = expected.pq_average(categories, isthing=None)
    results = quality.results()
    assert results.found.sum() == average["n"] == CLASSES
    for metric in ("pq", "sq", "rq"):
        assert results.mean(metric) == pytest.approx(100 * average[metric])
        assert getattr(results, metric) == pytest.approx([100 * by_class[i][metric] for i in range(CLASSES)])
    assert 20 < results.mean("pq") < 80


def test_by_hand() -> None:
    """Class 0 matches by 6 of 10 pixels, class 1 is missed, class 2 is wrong, class 3 is nowhere."""
    truth = np.array([[0] * 8 + [1] * 6 + [4] * 6])
    predicted = np.array([[0] * 6 + [2] * 2 + [0] * 2 + [2] * 4 + [4] * 6])
    quality = SemanticQuality(4)
    quality.add(truth, predicted)
    results = quality.results()
    assert results.pq == pytest.approx([60, 0, 0, np.nan], nan_ok=True)
    assert results.sq == pytest.approx([60, 0, 0, np.nan], nan_ok=True)
    assert results.rq == pytest.approx([100, 0, 0, np.nan], nan_ok=True)
    assert results.found.sum() == 3
    assert results.mean("pq") == pytest.approx(20)
    assert results.mean_iou == pytest.approx(30)  # over classes 0 and 1, as Detectron2 has it


def test_a_segment_mostly_without_truth_is_not_wrong() -> None:
    truth = np.array([[4] * 6 + [1] * 4])
    for on_truth, classes_found in ((2, 1), (3, 2), (4, 2)):
        predicted = np.full_like(truth, 1)
        predicted[0, 3 : 6 + on_truth] = 0  # 3 pixels without truth
        quality = SemanticQuality(4)
        quality.add(truth, predicted)
        assert quality.results().found.sum() == classes_found


def test_no_picture() -> None:
    assert np.isnan(SemanticQuality(3).results().mean("pq"))


@pytest.fixture
def evaluate(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """The command as a function of its arguments: exit code, and what it prints."""
    return program(repository / "tools" / "evaluate_pq_for_semantic_segmentation.py", monkeypatch, capsys)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny") as names:
        yield names


@pytest.fixture
def predictions(tiny: TinyNames, tmp_path: Path) -> tuple[Path, float]:
    """A file of predictions for the tiny data set, and their mIoU."""
    evaluator = SemanticEvaluator(tiny.panoptic, str(tmp_path), distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get(tiny.panoptic):
        scores = torch.roll(perfect_semantic(record, 3), (3, -2), dims=(1, 2))
        evaluator.process([record], [{"sem_seg": scores}])
    return tmp_path / "sem_seg_predictions.json", evaluator.evaluate()["sem_seg"]["mIoU"]


def figures(printed: str, name: str) -> list[float]:
    line = next(line for line in printed.splitlines() if line.startswith(f"| {name} "))
    return [float(cell) for cell in line.strip("|").split("|")[1:]]


def test_command(tiny: TinyNames, evaluate: Program, predictions: tuple[Path, float]) -> None:
    path, mean_iou = predictions
    code, printed = evaluate("--dataset-name", tiny.panoptic, "--json-file", str(path), "--per-class")
    assert code == 0, printed
    pq, sq, rq, iou, classes = figures(printed, "all")
    assert iou == pytest.approx(mean_iou, abs=1e-3) and 30 < iou < 99
    assert classes == 3
    by_class = [figures(printed, name) for name in ("disc", "square", "ground")]
    assert pq == pytest.approx(np.mean([row[0] for row in by_class]), abs=1e-3)
    assert all(row[0] == pytest.approx(row[1] * row[2] / 100, abs=1e-3) for row in by_class)
    assert "only these count" not in printed


def test_some_of_the_pictures(tiny: TinyNames, evaluate: Program, predictions: tuple[Path, float]) -> None:
    content = json.loads(predictions[0].read_text())
    kept = [prediction for prediction in content if prediction["file_name"] == content[0]["file_name"]]
    predictions[0].write_text(json.dumps(kept))
    code, printed = evaluate("--dataset-name", tiny.panoptic, "--json-file", str(predictions[0]))
    assert code == 0, printed
    assert "has 1 of the data set's 4 pictures: only these count" in printed


def test_mistakes(tiny: TinyNames, evaluate: Program, predictions: tuple[Path, float], tmp_path: Path) -> None:
    def error(path: Path, name: str = tiny.panoptic) -> str:
        code, printed = evaluate("--dataset-name", name, "--json-file", str(path))
        assert code == 1 and "Traceback" not in printed
        return printed.splitlines()[-1]

    path, _ = predictions
    assert "'nowhere' is not registered" in error(path, "nowhere")
    assert "has no label PNGs" in error(path, tiny.instances)
    assert "cannot read" in error(tmp_path / "nowhere.json")
    content = json.loads(path.read_text())
    for change, message in (
        ({"category_id": 99}, "prediction of category_id 99"),
        ({"file_name": "other.png"}, "has predictions for other, which data set 'tiny_panoptic' does not have"),
    ):
        path.write_text(json.dumps([{**content[0], **change}]))
        assert message in error(path)
    path.write_text("[]")
    assert "has no predictions" in error(path)
    for other in ("[{}]", "[1]", "{}"):
        path.write_text(other)
        assert "is not a file of semantic predictions" in error(path)
    path.write_text(json.dumps(content))
    label_file = DatasetCatalog.get(tiny.panoptic)[0]["sem_seg_file_name"]
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(label_file)
    assert "has the label 9" in error(path)
