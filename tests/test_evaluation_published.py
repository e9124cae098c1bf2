"""Evaluators of the published data sets: what is right scores 100, a mistake counted by hand its value."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from perfect_outputs import make_instances, perfect_instances, perfect_panoptic, perfect_semantic
from PIL import Image
from published_layouts import HEIGHT, WIDTH, make_ade20k, make_mapillary_vistas, make_semantic, registered_at, stripes
from tiny_dataset import tiny_dataset

from mask2former.data import check_dataset
from mask2former.data.annotations import rgb_from_ids
from mask2former.data.datasets import cityscapes
from mask2former.errors import UserError
from mask2former.evaluation import CityscapesInstanceSegEvaluator, CityscapesSemanticEvaluator, build_evaluator

Output = dict[str, Any]


def perfect(record: dict[str, Any], num_classes: int) -> Output:
    segment_ids, segments = perfect_panoptic(record)
    things = [segment for segment in segments if segment["isthing"]]
    masks = [segment_ids == segment["id"] for segment in things]
    return {
        "panoptic_seg": (segment_ids, segments),
        "instances": make_instances(torch.stack(masks), [s["category_id"] for s in things], [0.9] * len(things)),
        "sem_seg": perfect_semantic(record, num_classes),
    }


def evaluate(
    name: str, outputs: Callable[[dict[str, Any]], Output], output_dir: str | None = None, **off: bool
) -> dict[str, dict[str, float]]:
    evaluator = build_evaluator(
        name, output_dir, **{"semantic_on": True, "panoptic_on": True, "instance_on": True, **off}
    )
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [outputs(record)])
    return evaluator.evaluate()


# ------------------------------------------------------------------------------------------------- ADE20K


@pytest.fixture
def ade20k(tmp_path: Path) -> Iterator[str]:
    make_ade20k(tmp_path)
    with registered_at(tmp_path):
        yield "ade20k_panoptic_val"


def test_perfect_on_ade20k_panoptic(ade20k: str, tmp_path: Path) -> None:
    results = evaluate(ade20k, lambda record: perfect(record, 150), str(tmp_path / "out"))
    assert list(results) == ["sem_seg", "panoptic_seg", "bbox", "segm"]
    for metric in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st"):
        assert results["panoptic_seg"][metric] == pytest.approx(100)
    for metric in ("mIoU", "fwIoU", "mACC", "pACC"):
        assert results["sem_seg"][metric] == pytest.approx(100)
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)
    per_class = {key: value for key, value in results["segm"].items() if key.startswith("AP-") and value == value}
    assert per_class == {"AP-bed": pytest.approx(100), "AP-person": pytest.approx(100)}
    saved = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {a["image_id"] for a in saved["annotations"]} == {"ADE_val_00000001", "ADE_val_00000002"}


def test_a_mistake_on_ade20k_panoptic(ade20k: str) -> None:
    """In the first picture floor (3) is taken for wall (0), and the bed (7) is missed."""

    def mistaken(record: dict[str, Any]) -> Output:
        output = perfect(record, 150)
        if record["image_id"] == "ADE_val_00000001":
            segment_ids, segments = output["panoptic_seg"]
            wall, bed, floor, person = segments
            segment_ids = segment_ids.masked_fill(segment_ids == floor["id"], wall["id"])
            segment_ids = segment_ids.masked_fill(segment_ids == bed["id"], 0)
            output["panoptic_seg"] = segment_ids, [wall, person]
            output["sem_seg"][0] += 2 * output["sem_seg"][3]
            output["instances"] = output["instances"][1:]
        return output

    results = evaluate(ade20k, mistaken)
    # Wall: half of the prediction is right, which is no match: 1 TP, 1 FP, 1 FN. Floor, bed: 1 TP, 1 FN. Person: all.
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100 * np.mean([1 / 2, 1 / 1.5, 1 / 1.5, 1]))
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx(100 * np.mean([1 / 1.5, 1]))
    # Stripes are 15 columns wide in the first picture, 10 in the second.
    ious = {"wall": 25 / 40, "floor": 10 / 25, "bed": 1, "person": 1}
    assert results["sem_seg"]["mIoU"] == pytest.approx(100 * np.mean(list(ious.values())))
    assert results["sem_seg"]["IoU-floor"] == pytest.approx(40)
    assert results["segm"]["AP-person"] == pytest.approx(100)
    assert results["segm"]["AP-bed"] == pytest.approx(100 * 51 / 101)  # one of two found: recall points up to 0.5


def test_perfect_on_ade20k_instance(ade20k: str) -> None:
    name = "ade20k_instance_val"
    contiguous = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    panoptic = {record["image_id"]: record for record in DatasetCatalog.get(ade20k)}

    def outputs(record: dict[str, Any]) -> Output:
        instances = perfect(panoptic[record["image_id"]], 150)["instances"]
        instances.pred_classes = torch.tensor([contiguous[c] for c in instances.pred_classes.tolist()])
        return {"instances": instances}

    results = evaluate(name, outputs)
    assert list(results) == ["bbox", "segm"]
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP-person"] == results["segm"]["AP-bed"] == pytest.approx(100)


# --------------------------------------------------------------------------- Mapillary Vistas, label maps


def test_perfect_on_mapillary_vistas(tmp_path: Path) -> None:
    make_mapillary_vistas(tmp_path)
    with registered_at(tmp_path):
        name = "mapillary_vistas_panoptic_val"
        results = evaluate(name, lambda record: perfect(record, 65), instance_on=False)
        assert results["panoptic_seg"]["PQ"] == results["panoptic_seg"]["PQ_th"] == pytest.approx(100)
        assert results["sem_seg"]["mIoU"] == pytest.approx(100)
        with pytest.raises(UserError, match="lacks json_file: .*INSTANCE_ON to False"):
            evaluate(name, lambda record: perfect(record, 65))
        results = evaluate("mapillary_vistas_sem_seg_val", lambda record: {"sem_seg": perfect_semantic(record, 65)})
        assert results["sem_seg"]["mIoU"] == results["sem_seg"]["pACC"] == pytest.approx(100)


def test_perfect_on_16_bit_label_maps(tmp_path: Path) -> None:
    folder = tmp_path / "ADE20K_2021_17_01"
    labels = [stripes([846, 65535, 255, 0], np.uint16), stripes([845, 3, 2, 0], np.uint16)]
    make_semantic(folder / "images_detectron2/validation", folder / "annotations_detectron2/validation", labels, "tif")
    with registered_at(tmp_path):
        check_dataset("ade20k_full_sem_seg_val", 847)
        results = evaluate("ade20k_full_sem_seg_val", lambda record: {"sem_seg": perfect_semantic(record, 847)})
    assert results["sem_seg"]["mIoU"] == results["sem_seg"]["pACC"] == pytest.approx(100)


# --------------------------------------------------------------------------------------------------- LVIS


@pytest.fixture
def lvis(tmp_path: Path) -> Iterator[str]:
    """The tiny instances with what LVIS' annotations have besides."""
    with tiny_dataset(tmp_path / "tiny", num_images=3) as names:
        path = tmp_path / "tiny/instances.json"
        content = json.loads(path.read_text())
        for image in content["images"]:
            image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        for category, frequency in zip(content["categories"], "rf", strict=True):
            category["frequency"] = frequency
        path.write_text(json.dumps(content))
        MetadataCatalog.get(names.instances).__dict__["evaluator_type"] = "lvis"
        yield names.instances


def test_lvis(lvis: str, tmp_path: Path) -> None:
    results = evaluate(lvis, lambda record: {"instances": perfect_instances(record)}, str(tmp_path / "out"))
    assert list(results) == ["bbox", "segm"]
    for metric in ("AP", "AP50", "APr", "APf"):
        assert results["segm"][metric] == pytest.approx(100)
    assert (tmp_path / "out/lvis_instances_results.json").exists()

    def no_squares(record: dict[str, Any]) -> Output:
        instances = perfect_instances(record)
        return {"instances": instances[instances.pred_classes == 0]}

    results = evaluate(lvis, no_squares)
    assert results["segm"]["APr"] == pytest.approx(100) and results["segm"]["APf"] == pytest.approx(0)
    assert results["segm"]["AP"] == pytest.approx(50)


def test_lvis_without_annotations(lvis: str, tmp_path: Path) -> None:
    (tmp_path / "tiny/instances.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*instances\.json"):
        build_evaluator(lvis, None, semantic_on=False, panoptic_on=False, instance_on=True)


# --------------------------------------------------------------------------------------------- Cityscapes


@pytest.mark.parametrize("kind", [CityscapesInstanceSegEvaluator, CityscapesSemanticEvaluator])
def test_cityscapes_names_the_package_that_it_needs(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cityscapes, "find_spec", lambda name: None)
    evaluator = kind("cityscapes_fine_panoptic_val")  # builds all the same
    with pytest.raises(UserError, match="needs the package cityscapesscripts: pip install cityscapesscripts"):
        evaluator.reset()


ROAD, CAR, PERSON = 7, 26, 24  # ids of Cityscapes' labels
TRAIN_IDS = {category["id"]: category["trainId"] for category in CITYSCAPES_CATEGORIES}


def make_cityscapes(root: Path) -> dict[str, Any]:
    """Two pictures in Cityscapes' layout, registered metadata for them, and their dataset dicts."""
    pictures = {"aachen_000000_000019": [ROAD, CAR, PERSON, 0], "aachen_000001_000019": [ROAD, CAR, CAR, PERSON]}
    gt_dir, panoptic_root = root / "gtFine/val", root / "gtFine/cityscapes_panoptic_val"
    (gt_dir / "aachen").mkdir(parents=True)
    panoptic_root.mkdir()
    annotations, dicts = [], []
    for stem, labels in pictures.items():
        ids = [label * 1000 + place if label in (CAR, PERSON) else label for place, label in enumerate(labels)]
        prefix = str(gt_dir / "aachen" / f"{stem}_gtFine_")
        Image.fromarray(stripes(labels)).save(f"{prefix}labelIds.png")
        Image.fromarray(stripes(ids, np.uint16)).save(f"{prefix}instanceIds.png")
        Image.fromarray(stripes([TRAIN_IDS.get(label, 255) for label in labels])).save(f"{prefix}labelTrainIds.png")
        file = f"{stem}_gtFine_panoptic.png"
        Image.fromarray(rgb_from_ids(stripes(ids, np.uint32))).save(panoptic_root / file)
        pairs = [(i, label) for i, label in zip(ids, labels, strict=True) if label]
        segments = [{"id": i, "category_id": label, "iscrowd": 0} for i, label in pairs]
        annotations.append({"image_id": stem, "file_name": file, "segments_info": segments})
        dicts.append(
            {
                "file_name": f"{root}/leftImg8bit/val/aachen/{stem}_leftImg8bit.png",
                "image_id": stem,
                "pan_seg_file_name": str(panoptic_root / file),
                "sem_seg_file_name": f"{prefix}labelTrainIds.png",
                "segments_info": [
                    {**s, "category_id": TRAIN_IDS[s["category_id"]], "isthing": s["category_id"] != ROAD}
                    for s in segments
                ],
            }
        )
    classes = [{"id": c["id"], "name": c["name"], "isthing": c["isthing"]} for c in CITYSCAPES_CATEGORIES]
    images = [{"id": a["image_id"], "file_name": "", "height": HEIGHT, "width": WIDTH} for a in annotations]
    panoptic_json = root / "panoptic.json"
    panoptic_json.write_text(json.dumps({"images": images, "annotations": annotations, "categories": classes}))
    published = MetadataCatalog.get("cityscapes_fine_panoptic_val").as_dict()
    own = {"panoptic_root": str(panoptic_root), "panoptic_json": str(panoptic_json), "gt_dir": str(gt_dir)}
    return {"dicts": dicts, "metadata": {k: v for k, v in published.items() if k != "name"} | own}


def test_perfect_on_cityscapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cityscapesscripts", reason="needs cityscapesscripts, Cityscapes' own metrics")
    made = make_cityscapes(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    name = "cityscapes_of_stripes"
    try:
        DatasetCatalog.register(name, lambda: made["dicts"])
        MetadataCatalog.get(name).set(**made["metadata"])
        results = evaluate(name, lambda record: perfect(record, 19))
        assert list(results) == ["panoptic_seg", "sem_seg", "segm"]
        assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
        assert results["sem_seg"]["IoU"] == results["sem_seg"]["IoU_sup"] == pytest.approx(100)
        assert results["segm"]["AP"] == results["segm"]["AP50"] == pytest.approx(100)
        assert not list(Path().iterdir())  # cityscapesscripts would leave a file here

        def with_classes(record: dict[str, Any]) -> Output:
            output = perfect(record, 19)
            return {**output, "sem_seg": output["sem_seg"].argmax(0).int()}

        assert evaluate(name, with_classes) == results

        def without_persons(record: dict[str, Any]) -> Output:
            output = perfect(record, 19)
            instances = output["instances"]
            output["instances"] = instances[instances.pred_classes != TRAIN_IDS[PERSON]]
            output["sem_seg"][TRAIN_IDS[PERSON]] = -1
            return output

        results = evaluate(name, without_persons, panoptic_on=False)
        assert results["segm"]["AP"] == pytest.approx(50)  # of cars and persons
        assert results["sem_seg"]["IoU"] < 75
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
