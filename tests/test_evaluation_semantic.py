"""Mean IoU against a confusion matrix written out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from perfect_outputs import perfect_semantic
from PIL import Image
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.errors import UserError
from mask2former.evaluation import SemanticEvaluator


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny") as names:
        yield names


def evaluate(evaluator: SemanticEvaluator, records: list[dict[str, Any]], scores: list[torch.Tensor]) -> dict[str, Any]:
    evaluator.reset()
    for record, sem_seg in zip(records, scores, strict=True):
        evaluator.process([record], [{"sem_seg": sem_seg}])
    return evaluator.evaluate()["sem_seg"]


def test_ground_truth_as_prediction_scores_100(tiny: TinyNames, tmp_path: Path) -> None:
    records = DatasetCatalog.get(tiny.panoptic)
    evaluator = SemanticEvaluator(tiny.panoptic, str(tmp_path / "out"))
    results = evaluate(evaluator, records, [perfect_semantic(r, 3) for r in records])
    for metric in ("mIoU", "fwIoU", "mACC", "pACC", "IoU-disc", "IoU-square", "IoU-ground", "ACC-ground"):
        assert results[metric] == pytest.approx(100)
    assert (tmp_path / "out" / "sem_seg_predictions.json").exists()


def test_equals_a_plain_confusion_matrix(tiny: TinyNames) -> None:
    """Noisy scores, a class that is never predicted, and ignored pixels."""
    records = DatasetCatalog.get(tiny.panoptic)
    generator = torch.Generator().manual_seed(0)
    scores, counts = [], np.zeros((3, 3))  # counts[truth, predicted]
    for record in records:
        path = Path(record["sem_seg_file_name"])
        labels = np.array(Image.open(path))
        labels[:9, 5:30] = 255
        Image.fromarray(labels).save(path)
        noise = torch.rand(3, 64, 64, generator=generator) * 1.5
        sem_seg = perfect_semantic(record, 3) + noise
        sem_seg[1] = -1
        scores.append(sem_seg)
        predicted = sem_seg.argmax(0).numpy()
        for truth in range(3):
            for label in range(3):
                counts[truth, label] += ((labels == truth) & (predicted == label)).sum()
    right, there, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = right / (there + found - right)

    results = evaluate(SemanticEvaluator(tiny.panoptic), records, scores)

    assert results["mIoU"] == pytest.approx(100 * iou.mean())
    assert results["fwIoU"] == pytest.approx(100 * (iou * there / there.sum()).sum())
    assert results["mACC"] == pytest.approx(100 * (right / there).mean())
    assert results["pACC"] == pytest.approx(100 * right.sum() / there.sum())
    assert [results[f"IoU-{c}"] for c in ("disc", "square", "ground")] == pytest.approx(list(100 * iou))
    assert results["IoU-square"] == 0 < results["mIoU"] < 90


def test_classes_in_place_of_scores(tiny: TinyNames, tmp_path: Path) -> None:
    records = DatasetCatalog.get(tiny.panoptic)
    generator = torch.Generator().manual_seed(0)
    scores = [perfect_semantic(r, 3) + 2 * torch.rand(3, 64, 64, generator=generator) for r in records]
    labels = [best.argmax(0).int() for best in scores]
    folders = [tmp_path / "scores", tmp_path / "labels"]
    results = [
        evaluate(SemanticEvaluator(tiny.panoptic, str(folder)), records, outputs)
        for folder, outputs in zip(folders, (scores, labels), strict=True)
    ]
    assert results[0] == results[1] and 0 < results[0]["mIoU"] < 100
    texts = [(folder / "sem_seg_predictions.json").read_text() for folder in folders]
    assert texts[0] == texts[1]
    labels[0][5, 5] = 4
    with pytest.raises(UserError, match="predicts 5 classes, but data set 'tiny_panoptic' has 3"):
        evaluate(SemanticEvaluator(tiny.panoptic), records[:1], labels[:1])


def test_label_that_the_data_set_lacks(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.panoptic)[1]
    path = Path(record["sem_seg_file_name"])
    labels = np.array(Image.open(path))
    labels[3, 4] = 9
    Image.fromarray(labels).save(path)
    with pytest.raises(UserError, match=r"002\.png has the label 9: .*'tiny_panoptic' has the labels 0 to 2 and 255"):
        evaluate(SemanticEvaluator(tiny.panoptic), [record], [torch.zeros(3, 64, 64)])


def test_label_picture_that_cannot_be_used(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.panoptic)[1]
    path = Path(record["sem_seg_file_name"])
    evaluator = SemanticEvaluator(tiny.panoptic)
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(UserError, match=r"label map '.*002\.png' is a picture of mode RGB"):
        evaluate(evaluator, [record], [torch.zeros(3, 64, 64)])
    Image.new("L", (32, 64)).save(path)
    with pytest.raises(UserError, match=r"images.002\.png has 64x64 .*semantic.002\.png has 64x32"):
        evaluate(evaluator, [record], [torch.zeros(3, 64, 64)])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"cannot read .*002\.png"):
        evaluate(evaluator, [record], [torch.zeros(3, 64, 32)])
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*002\.png \(No such file"):
        evaluate(evaluator, [record], [torch.zeros(3, 64, 64)])


def test_model_with_other_classes(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.panoptic)[0]
    with pytest.raises(UserError, match=r"predicts 5 classes, but data set 'tiny_panoptic' has 3: .*NUM_CLASSES to 3"):
        evaluate(SemanticEvaluator(tiny.panoptic), [record], [torch.zeros(5, 64, 64)])


def test_data_set_without_label_pictures(tiny: TinyNames) -> None:
    MetadataCatalog.get(tiny.instances).set(stuff_classes=["a"], ignore_label=255)
    with pytest.raises(UserError, match=r"'tiny_instances' has no label PNGs \(sem_seg_file_name\)"):
        SemanticEvaluator(tiny.instances)
