"""COCO AP, against pycocotools and hotcoco used directly and against figures worked out by hand."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from perfect_outputs import make_instances, perfect_instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.errors import UserError
from mask2former.evaluation import InstanceSegEvaluator
from mask2former.structures import CroppedMasks

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny") as names:
        yield names


@pytest.fixture
def made(tmp_path: Path) -> Iterator[str]:
    """A name that a test registers itself, with ``register``."""
    yield "made_instances"
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "made_instances" in catalog.list():
            catalog.remove("made_instances")


def register(name: str, json_file: Path, image_root: Path) -> list[dict[str, Any]]:
    DatasetCatalog.register(name, lambda: load_coco_json(str(json_file), str(image_root), name))
    MetadataCatalog.get(name).set(json_file=str(json_file), image_root=str(image_root), evaluator_type="coco")
    return DatasetCatalog.get(name)


def evaluate(evaluator: InstanceSegEvaluator, records: list[dict[str, Any]], outputs: list[Any]) -> dict[str, Any]:
    evaluator.reset()
    for record, instances in zip(records, outputs, strict=True):
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, where NaN equals NaN."""
    assert found.keys() == expected.keys() == {"segm", "bbox"}
    for task in found:
        assert found[task] == pytest.approx(expected[task], rel=0, abs=0, nan_ok=True)


def perturbed(record: dict[str, Any], rng: np.random.Generator, num_classes: int) -> Any:
    """The picture's instances, moved a little, some missing, doubled or of another class, with random scores."""
    truth = perfect_instances(record)
    masks, classes = [], []
    for mask, label in zip(truth.pred_masks, truth.pred_classes.tolist(), strict=True):
        for _ in range(rng.choice([0, 1, 2], p=[0.15, 0.7, 0.15])):
            shift = tuple(int(v) for v in rng.integers(-3, 4, size=2))
            masks.append(torch.roll(mask, shift, dims=(0, 1)))
            classes.append(label if rng.random() < 0.9 else int(rng.integers(num_classes)))
    stacked = torch.stack(masks) if masks else truth.pred_masks[:0]
    return make_instances(stacked, classes, rng.random(len(masks)).tolist())


def test_ground_truth_as_prediction_scores_100(tiny: TinyNames, tmp_path: Path) -> None:
    records = DatasetCatalog.get(tiny.instances)
    evaluator = InstanceSegEvaluator(tiny.instances, str(tmp_path / "out"))
    results = evaluate(evaluator, records, [perfect_instances(r) for r in records])
    for task in ("segm", "bbox"):
        for metric in ("AP", "AP50", "AP75", "APs", "AP-disc", "AP-square"):
            assert results[task][metric] == pytest.approx(100)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in written} == {1, 3}


def test_masks_made_one_at_a_time_give_the_same(tiny: TinyNames) -> None:
    records = DatasetCatalog.get(tiny.instances)
    rng = np.random.default_rng(1)
    outputs = [perturbed(r, rng, 2) for r in records]
    evaluator = InstanceSegEvaluator(tiny.instances)
    expected = evaluate(evaluator, records, outputs)
    for instances in outputs:
        instances.pred_masks = CroppedMasks.from_masks(instances.pred_masks)
        instances.remove("pred_boxes")
    assert_equal(evaluate(evaluator, records, outputs), expected)
    assert 0 < expected["segm"]["AP"] < 100


def direct(json_file: Path, results_file: Path, task: str) -> tuple[list[float], list[float]]:
    """The six figures in percent by pycocotools and by hotcoco, from files alone."""
    results = json.loads(results_file.read_text())
    if task == "segm":
        for result in results:
            del result["bbox"]
    truth = COCO(str(json_file))
    official = COCOeval(truth, truth.loadRes([dict(r) for r in results]), task)
    other_truth = hotcoco.COCO(str(json_file))
    other = hotcoco.COCOeval(other_truth, other_truth.load_res(results), task)
    for coco_eval in (official, other):
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return [100 * v for v in official.stats[:6]], [100 * v for v in other.stats[:6]]


@pytest.mark.parametrize(
    ("json_name", "images", "count"),
    [
        ("coco/annotations/instances_val2017.json", "coco/val2017", 30),
        ("nuclei/annotations/val.json", "nuclei/val", 10),
    ],
)
def test_equals_pycocotools_on_real_pictures(
    json_name: str, images: str, count: int, shared_data: Path, made: str, tmp_path: Path
) -> None:
    content = json.loads((shared_data / json_name).read_text())
    kept = sorted(image["id"] for image in content["images"])[:count]
    content["images"] = [i for i in content["images"] if i["id"] in kept]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    json_file = tmp_path / "truth.json"
    json_file.write_text(json.dumps(content))
    records = register(made, json_file, shared_data / images)
    rng = np.random.default_rng(0)
    outputs = [perturbed(r, rng, len(content["categories"])) for r in records]

    results = evaluate(InstanceSegEvaluator(made, str(tmp_path)), records, outputs)

    for task in ("segm", "bbox"):
        official, other = direct(json_file, tmp_path / "coco_instances_results.json", task)
        ours = [results[task][metric] if not math.isnan(results[task][metric]) else -100 for metric in METRICS]
        assert ours == pytest.approx(official, abs=1e-9)
        assert ours == pytest.approx(other, abs=1e-9)
        assert 5 < results[task]["AP"] < 95


def test_no_prediction_at_all_scores_0(tiny: TinyNames, caplog: pytest.LogCaptureFixture) -> None:
    records = DatasetCatalog.get(tiny.instances)
    nothing = make_instances(torch.zeros(0, 64, 64, dtype=torch.bool), [], [])
    results = evaluate(InstanceSegEvaluator(tiny.instances), records, [nothing] * len(records))
    for task in ("segm", "bbox"):
        assert results[task]["AP"] == results[task]["AP50"] == results[task]["AP-square"] == 0
    assert "No instance was predicted in 4 pictures of 'tiny_instances'" in caplog.text


def test_an_empty_mask_is_a_wrong_instance(tiny: TinyNames) -> None:
    records = DatasetCatalog.get(tiny.instances)
    outputs = []
    for record in records:
        truth = perfect_instances(record)
        masks = torch.cat([truth.pred_masks, torch.zeros(1, 64, 64, dtype=torch.bool)])
        outputs.append(make_instances(masks, [*truth.pred_classes.tolist(), 0], [*truth.scores.tolist(), 0.1]))
    results = evaluate(InstanceSegEvaluator(tiny.instances), records, outputs)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_ground_truth_with_masks_only(tiny: TinyNames, made: str, tmp_path: Path) -> None:
    """No info, areas, boxes or crowd flags, and ids from 0."""
    json_file = Path(MetadataCatalog.get(tiny.instances).json_file)
    records = DatasetCatalog.get(tiny.instances)
    rng = np.random.default_rng(2)
    outputs = [perturbed(r, rng, 2) for r in records]
    expected = evaluate(InstanceSegEvaluator(tiny.instances), records, outputs)

    content = json.loads(json_file.read_text())
    content["annotations"] = [
        {"id": a["id"] - 1, **{k: a[k] for k in ("image_id", "category_id", "segmentation")}}
        for a in content["annotations"]
    ]
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(content))
    DatasetCatalog.register(made, lambda: records)
    MetadataCatalog.get(made).set(json_file=str(bare), thing_classes=["disc", "square"])
    assert_equal(evaluate(InstanceSegEvaluator(made), records, outputs), expected)


def test_categories_are_named_by_id(tiny: TinyNames, made: str, tmp_path: Path) -> None:
    """``thing_classes`` lists stuff too, contiguous ids have gaps and another order than the dataset's ids."""
    meta = MetadataCatalog.get(tiny.instances)
    content = json.loads(Path(meta.json_file).read_text())
    content["categories"] = [{"id": 9, "name": "nowhere"}, *reversed(content["categories"])]
    json_file = tmp_path / "reordered.json"
    json_file.write_text(json.dumps(content))
    records = DatasetCatalog.get(tiny.instances)
    DatasetCatalog.register(made, lambda: records)
    MetadataCatalog.get(made).set(
        json_file=str(json_file),
        thing_classes=["square", "ground", "sky", "disc"],
        thing_dataset_id_to_contiguous_id={1: 3, 3: 0},
        stuff_dataset_id_to_contiguous_id={1: 3, 3: 0, 7: 1, 8: 2},
    )
    outputs = []
    for record in records:
        discs = perfect_instances(record)
        discs = discs[discs.pred_classes == 0]
        # A disc as class 3, and stuff, which COCO's instances don't know.
        classes = [3] * len(discs) + [1]
        masks = torch.cat([discs.pred_masks, torch.ones(1, 64, 64, dtype=torch.bool)])
        outputs.append(make_instances(masks, classes, [0.9] * len(classes)))
    results = evaluate(InstanceSegEvaluator(made), records, outputs)["segm"]
    assert results["AP-disc"] == pytest.approx(100)
    assert results["AP-square"] == 0
    assert math.isnan(results["AP-nowhere"])
    assert results["AP"] == pytest.approx(50)


def test_more_than_100_instances_in_a_picture(made: str, tmp_path: Path) -> None:
    boxes = [(x, y) for y in range(0, 120, 12) for x in range(0, 144, 12)]  # 120 squares
    masks = torch.zeros(120, 120, 144, dtype=torch.bool)
    for mask, (x, y) in zip(masks, boxes, strict=True):
        mask[y : y + 10, x : x + 10] = True
    json_file = tmp_path / "many.json"
    annotations = [
        {
            "id": i + 1,
            "image_id": 5,
            "category_id": 1,
            "iscrowd": 0,
            "area": 100,
            "bbox": [x, y, 10, 10],
            "segmentation": [[x, y, x + 10, y, x + 10, y + 10, x, y + 10]],
        }
        for i, (x, y) in enumerate(boxes)
    ]
    images = [{"id": 5, "file_name": "5.png", "height": 120, "width": 144}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    json_file.write_text(json.dumps(content))
    records = register(made, json_file, tmp_path)
    outputs = [make_instances(masks, [0] * 120, np.linspace(1, 0.5, 120).tolist())]

    cut = evaluate(InstanceSegEvaluator(made), records, outputs)
    # COCO's 101 recall thresholds 0, 0.01, ...: 84 of them are at most 100 / 120.
    assert cut["segm"]["AP"] == pytest.approx(100 * 84 / 101)
    whole = evaluate(InstanceSegEvaluator(made, max_dets_per_image=200), records, outputs)
    assert whole["segm"]["AP"] == whole["bbox"]["AP"] == pytest.approx(100)


def test_class_that_the_data_set_lacks(tiny: TinyNames) -> None:
    records = DatasetCatalog.get(tiny.instances)[:1]
    outputs = [make_instances(torch.ones(1, 64, 64, dtype=torch.bool), [2], [1.0])]
    with pytest.raises(UserError, match=r"class 2 .* 'tiny_instances' has 2 thing classes .*NUM_CLASSES"):
        evaluate(InstanceSegEvaluator(tiny.instances), records, outputs)


def test_picture_that_does_not_fit(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.instances)[0]
    outputs = [make_instances(torch.ones(1, 32, 64, dtype=torch.bool), [0], [1.0])]
    evaluator = InstanceSegEvaluator(tiny.instances)
    with pytest.raises(UserError, match=r"001\.png has 32x64 pixels .*instances\.json says 64x64"):
        evaluate(evaluator, [record], outputs)
    with pytest.raises(UserError, match=r"001\.png was evaluated with image_id 77, which .*instances\.json"):
        evaluate(evaluator, [{**record, "image_id": 77}], outputs)


def test_annotations_that_cannot_be_read(tiny: TinyNames) -> None:
    path = Path(MetadataCatalog.get(tiny.instances).json_file)
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"'tiny_instances': .*instances\.json is not valid JSON"):
        InstanceSegEvaluator(tiny.instances)
    path.unlink()
    with pytest.raises(UserError, match=r"'tiny_instances': cannot read .*instances\.json \(No such file"):
        InstanceSegEvaluator(tiny.instances)


def test_without_annotations_the_predictions_are_written(tiny: TinyNames, tmp_path: Path) -> None:
    path = Path(MetadataCatalog.get(tiny.instances).json_file)
    records = DatasetCatalog.get(tiny.instances)
    content = json.loads(path.read_text())
    del content["annotations"]
    path.write_text(json.dumps(content))
    outputs = [perfect_instances(r) for r in records]
    assert evaluate(InstanceSegEvaluator(tiny.instances, str(tmp_path)), records, outputs) == {}
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(written) == sum(len(o) for o in outputs)
