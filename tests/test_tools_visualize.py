"""Result files drawn on the pictures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from perfect_outputs import decode, perfect_instances, perfect_semantic
from PIL import Image
from scripts import Program, program
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.evaluation import InstanceSegEvaluator, SemanticEvaluator

FACTOR = 4  # pictures of 64 pixels are drawn four times as large


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny", num_images=2) as names:
        yield names


@pytest.fixture
def visualize(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """The command as a function of its arguments: exit code, and what it prints."""
    return program(repository / "tools" / "visualize_json_results.py", monkeypatch, capsys)


def write_results(tiny: TinyNames, folder: Path) -> tuple[Path, Path]:
    """The ground truth as results of instances, at score 0.9 or 0.3, and of classes."""
    instances = InstanceSegEvaluator(tiny.instances, str(folder))
    semantic = SemanticEvaluator(tiny.panoptic, str(folder), distributed=False)
    for evaluator, name in ((instances, tiny.instances), (semantic, tiny.panoptic)):
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            if evaluator is instances:
                found = perfect_instances(record)
                found.scores[:] = 0.3
                found.scores[0] = 0.9
                output: Any = {"instances": found}
            else:
                output = {"sem_seg": perfect_semantic(record, 3)}
            evaluator.process([record], [output])
        evaluator.evaluate()
    return folder / "coco_instances_results.json", folder / "sem_seg_predictions.json"


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_instances(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    results, _ = write_results(tiny, tmp_path)
    out = tmp_path / "drawn"
    options = ("--input", str(results), "--dataset", tiny.instances, "--output", str(out))
    code, printed = visualize(*options)
    assert code == 0, printed
    assert f"2 pictures in {out}" in printed
    drawn = read(out / "001.png")
    assert drawn.shape == (64 * FACTOR, 2 * 64 * FACTOR, 3)
    predicted, truth = drawn[:, : 64 * FACTOR], drawn[:, 64 * FACTOR :]

    record = DatasetCatalog.get(tiny.instances)[0]
    masks = [decode(annotation["segmentation"], 64, 64) for annotation in record["annotations"]]
    plain = cv2.resize(cv2.imread(record["file_name"])[:, :, ::-1], (64 * FACTOR,) * 2, interpolation=cv2.INTER_CUBIC)

    def is_painted(panel: np.ndarray, mask: np.ndarray) -> bool:
        large = mask.repeat(FACTOR, axis=0).repeat(FACTOR, axis=1)
        return bool((np.abs(panel - plain)[large].max(axis=1) > 3).mean() > 0.75)  # labels cover less

    assert [is_painted(predicted, mask) for mask in masks] == [True] + [False] * (len(masks) - 1)
    assert all(is_painted(truth, mask) for mask in masks)

    code, printed = visualize(*options, "--conf-threshold", "0.2", "--no-ground-truth", "--max-pictures", "1")
    assert "1 pictures in" in printed
    everything = read(out / "001.png")
    assert everything.shape == (64 * FACTOR, 64 * FACTOR, 3)
    assert all(is_painted(everything, mask) for mask in masks)


def test_semantic(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    _, results = write_results(tiny, tmp_path)
    content = json.loads(results.read_text())
    ground = [r for r in content if r["category_id"] == 7]
    results.write_text(json.dumps(ground))
    out = tmp_path / "drawn"
    code, printed = visualize("--input", str(results), "--dataset", tiny.panoptic, "--output", str(out))
    assert code == 0, printed
    drawn = read(out / "002.png")
    assert drawn.shape == (64 * FACTOR, 2 * 64 * FACTOR, 3)
    predicted, truth = drawn[:, : 64 * FACTOR], drawn[:, 64 * FACTOR :]
    mask = decode(next(r for r in ground if "002" in r["file_name"])["segmentation"], 64, 64)
    objects = ~mask.repeat(FACTOR, axis=0).repeat(FACTOR, axis=1)
    assert np.abs(predicted - truth)[objects].mean() > 10  # unpainted, and in the colour of disc or square
    assert np.abs(predicted - truth)[~objects].mean() < 10


def test_mistakes(tiny: TinyNames, visualize: Program, tmp_path: Path) -> None:
    results, semantic = write_results(tiny, tmp_path)

    def error(*options: str) -> str:
        code, printed = visualize("--output", str(tmp_path / "drawn"), "--dataset", tiny.instances, *options)
        assert code == 1 and "Traceback" not in printed
        return printed.splitlines()[-1]

    assert "cannot read" in error("--input", str(tmp_path / "nowhere.json"))
    assert "001.png is not valid JSON" in error("--input", str(tmp_path / "tiny/images/001.png"))
    assert "--conf-threshold is 2.0" in error("--input", str(results), "--conf-threshold", "2")
    assert "--max-pictures is 0, expected at least 1" in error("--input", str(results), "--max-pictures", "0")
    content = json.loads(results.read_text())
    for changed, message in (
        ([{**content[0], "image_id": 99}], "results for none of the pictures of data set 'tiny_instances'"),
        ([{**content[0], "category_id": 99}], "category_id 99, which the data set has no thing class for"),
        ([{"image_id": 1, "bbox": [0, 0, 1, 1]}], "neither a file of instances with masks nor of semantic predictions"),
        ({}, "neither a file of instances"),
        ([], "has no results"),
    ):
        results.write_text(json.dumps(changed))
        assert message in error("--input", str(results))
    classes = json.loads(semantic.read_text())
    assert "'tiny_instances' has no semantic classes" in error("--input", str(semantic))
    semantic.write_text(json.dumps([{**classes[0], "category_id": 99}]))
    assert "prediction of category_id 99" in error("--input", str(semantic), "--dataset", tiny.panoptic)
