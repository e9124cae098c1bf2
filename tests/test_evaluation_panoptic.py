"""Panoptic quality, against panopticapi and hotcoco on files and against figures worked out by hand."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from detectron2.utils import comm
from hotcoco.panoptic import pq_compute
from perfect_outputs import perfect_panoptic
from PIL import Image
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.data.annotations import rgb_from_ids
from mask2former.errors import UserError
from mask2former.evaluation import PanopticEvaluator

Panoptic = tuple[torch.Tensor, list[dict[str, Any]]]
KEYS = ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path / "tiny") as names:
        yield names


@pytest.fixture
def made() -> Iterator[str]:
    """A name whose metadata a test sets itself."""
    yield "made_panoptic"
    if "made_panoptic" in MetadataCatalog.list():
        MetadataCatalog.remove("made_panoptic")


def evaluate(evaluator: PanopticEvaluator, records: list[dict[str, Any]], outputs: list[Panoptic]) -> dict[str, float]:
    evaluator.reset()
    for record, output in zip(records, outputs, strict=True):
        evaluator.process([record], [{"panoptic_seg": output}])
    results = evaluator.evaluate()
    assert results is not None
    return results["panoptic_seg"]


def perturbed(record: dict[str, Any], rng: np.random.Generator) -> Panoptic:
    """The ground truth, shifted by a few pixels, with segments dropped, merged and of another class."""
    segment_ids, segments = perfect_panoptic(record)
    segment_ids = torch.roll(segment_ids, tuple(int(v) for v in rng.integers(-6, 7, size=2)), dims=(0, 1))
    kept: list[dict[str, Any]] = []
    for segment in segments:
        fate = rng.random()
        if fate < 0.1:
            segment_ids[segment_ids == segment["id"]] = 0
        elif fate < 0.2 and kept:
            segment_ids[segment_ids == segment["id"]] = kept[0]["id"]
        elif fate < 0.3 and kept:
            kept.append({**segment, **{k: kept[0][k] for k in ("category_id", "isthing")}})
        else:
            kept.append(segment)
    return segment_ids, kept


def write_pngs(folder: Path, name: str, records: list[dict[str, Any]], outputs: list[Panoptic]) -> None:
    """The outputs as files named like those of the ground truth."""
    content = json.loads(Path(MetadataCatalog.get(name).panoptic_json).read_text())
    file_names = {annotation["image_id"]: annotation["file_name"] for annotation in content["annotations"]}
    folder.mkdir()
    for record, (ids, _) in zip(records, outputs, strict=True):
        Image.fromarray(rgb_from_ids(ids.numpy())).save(folder / file_names[record["image_id"]])


def by_panopticapi(name: str, predictions: Path, pngs: Path) -> dict[str, float]:
    """The figures of files: a panoptic result JSON and a folder of PNGs."""
    api = pytest.importorskip(
        "panopticapi.evaluation", reason="needs panopticapi: pip install --no-deps panopticapi-lite"
    )
    meta = MetadataCatalog.get(name)
    truth = json.loads(Path(meta.panoptic_json).read_text())
    by_picture = {a["image_id"]: a for a in json.loads(predictions.read_text())["annotations"]}
    pairs = [(a, by_picture[a["image_id"]]) for a in truth["annotations"]]
    categories = {c["id"]: c for c in truth["categories"]}
    stat = api.pq_compute_single_core(0, pairs, meta.panoptic_root, str(pngs), categories)
    groups = {"": None, "_th": True, "_st": False}
    averages = {suffix: stat.pq_average(categories, isthing=isthing)[0] for suffix, isthing in groups.items()}
    return {name: 100 * averages[name[2:]][name[:2].lower()] for name in KEYS}


def by_hotcoco(name: str, predictions: Path, pngs: Path) -> dict[str, float]:
    """The figures of files, as ``by_panopticapi`` has them."""
    meta = MetadataCatalog.get(name)
    results = pq_compute(meta.panoptic_json, str(predictions), gt_folder=meta.panoptic_root, pred_folder=str(pngs))
    groups = {"": "All", "_th": "Things", "_st": "Stuff"}
    return {name: 100 * results[groups[name[2:]]][name[:2].lower()] for name in KEYS}


def test_ground_truth_as_prediction_scores_100(tiny: TinyNames) -> None:
    records = DatasetCatalog.get(tiny.panoptic)
    results = evaluate(PanopticEvaluator(tiny.panoptic), records, [perfect_panoptic(r) for r in records])
    assert list(results) == KEYS
    assert list(results.values()) == pytest.approx([100] * 9)


@pytest.mark.parametrize("other", [by_panopticapi, by_hotcoco])
def test_equals_others(tiny: TinyNames, tmp_path: Path, other: Callable[..., dict[str, float]]) -> None:
    records = DatasetCatalog.get(tiny.panoptic)
    rng = np.random.default_rng(3)
    outputs = [perturbed(r, rng) for r in records]
    results = evaluate(PanopticEvaluator(tiny.panoptic, str(tmp_path)), records, outputs)
    write_pngs(tmp_path / "predicted", tiny.panoptic, records, outputs)
    files = tmp_path / "predictions.json", tmp_path / "predicted"
    assert results == pytest.approx(other(tiny.panoptic, *files), abs=1e-9)
    assert 10 < results["PQ"] < 90


@pytest.mark.parametrize("other", [by_panopticapi, by_hotcoco])
def test_equals_others_on_coco(
    shared_data: Path, made: str, tmp_path: Path, other: Callable[..., dict[str, float]]
) -> None:
    content = json.loads((shared_data / "coco/annotations/panoptic_val2017.json").read_text())
    content["annotations"] = content["annotations"][:30]
    kept = {a["image_id"] for a in content["annotations"]}
    content["images"] = [i for i in content["images"] if i["id"] in kept]
    json_file = tmp_path / "truth.json"
    json_file.write_text(json.dumps(content))
    things = [c["id"] for c in content["categories"] if c["isthing"]]
    every = things + [c["id"] for c in content["categories"] if not c["isthing"]]
    root = str(shared_data / "coco/panoptic_val2017")
    meta = MetadataCatalog.get(made).set(
        panoptic_json=str(json_file),
        panoptic_root=root,
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(things)},
        stuff_dataset_id_to_contiguous_id={c: i for i, c in enumerate(every)},
    )
    records = load_coco_panoptic_json(str(json_file), str(shared_data / "coco/val2017"), root, meta.as_dict())
    rng = np.random.default_rng(4)
    outputs = [perturbed(r, rng) for r in records]
    results = evaluate(PanopticEvaluator(made, str(tmp_path)), records, outputs)
    write_pngs(tmp_path / "predicted", made, records, outputs)
    files = tmp_path / "predictions.json", tmp_path / "predicted"
    assert results == pytest.approx(other(made, *files), abs=1e-9)
    assert 10 < results["PQ"] < 90


def write_truth(folder: Path, segment_ids: np.ndarray, categories: dict[int, int], name: str) -> dict[str, Any]:
    """One picture: ``categories`` {segment id: category}, of which 1 is a thing, 2 and 3 are stuff. Its record."""
    rgb = np.stack([segment_ids % 256, segment_ids // 256, segment_ids * 0], -1).astype(np.uint8)
    Image.fromarray(rgb).save(folder / "a.png")
    segments = [
        {"id": s, "category_id": c, "iscrowd": 0, "area": int((segment_ids == s).sum()), "bbox": [0, 0, 1, 1]}
        for s, c in categories.items()
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": segment_ids.shape[0], "width": segment_ids.shape[1]}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": c, "name": f"c{c}", "isthing": int(c == 1)} for c in (1, 2, 3)],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    MetadataCatalog.get(name).set(
        panoptic_json=str(folder / "truth.json"),
        panoptic_root=str(folder),
        thing_dataset_id_to_contiguous_id={1: 0},
        stuff_dataset_id_to_contiguous_id={1: 0, 2: 1, 3: 2},
    )
    return {"file_name": "pictures/a.jpg", "image_id": 1}


def segment(number: int, category: int) -> dict[str, Any]:
    return {"id": number, "isthing": category == 0, "category_id": category, "score": 0.5}


def test_worked_example(made: str, tmp_path: Path) -> None:
    truth = np.full((10, 10), 700)
    truth[:4] = 900  # 40 pixels of a thing on 60 of stuff 2
    record = write_truth(tmp_path, truth, {700: 2, 900: 1}, made)
    found = torch.full((10, 10), 5, dtype=torch.int32)
    found[:3] = 300  # 30 of the thing's 40 pixels
    found[9, :] = 6  # a thing where none is
    segments = [segment(5, 1), segment(300, 0), segment(6, 0)]

    results = evaluate(PanopticEvaluator(made), [record], [(found, segments)])

    # Stuff: 60 pixels each, 50 shared, so 70 in the union. Thing: 30 of 40, and one that is not there.
    assert results["SQ_st"] == results["PQ_st"] == pytest.approx(100 * 50 / 70)
    assert results["SQ_th"] == pytest.approx(75)
    assert results["RQ_th"] == pytest.approx(100 / 1.5)
    assert results["PQ_th"] == pytest.approx(50)
    assert results["PQ"] == pytest.approx((50 + 100 * 50 / 70) / 2)  # stuff 3 is nowhere: not counted


def test_group_without_a_category_is_nan(made: str, tmp_path: Path) -> None:
    record = write_truth(tmp_path, np.full((4, 4), 1), {1: 2}, made)
    results = evaluate(PanopticEvaluator(made), [record], [(torch.ones(4, 4, dtype=torch.int32), [segment(1, 1)])])
    assert results["PQ_st"] == results["PQ"] == pytest.approx(100)
    assert math.isnan(results["PQ_th"])


def test_nothing_predicted_scores_0(tiny: TinyNames) -> None:
    records = DatasetCatalog.get(tiny.panoptic)
    nothing: Panoptic = (torch.zeros(64, 64, dtype=torch.int32), [])
    results = evaluate(PanopticEvaluator(tiny.panoptic), records, [nothing] * len(records))
    assert list(results.values()) == [0] * 9


def test_the_models_output_is_left_alone_and_segments_without_pixels_too(tiny: TinyNames) -> None:
    records = DatasetCatalog.get(tiny.panoptic)
    outputs = [perfect_panoptic(r) for r in records]
    for _, segments in outputs:
        segments.append(segment(200, 0))
    before = copy.deepcopy(outputs)
    results = evaluate(PanopticEvaluator(tiny.panoptic), records, outputs)
    assert results["PQ"] == pytest.approx(100)
    for (ids, segments), (ids_before, segments_before) in zip(outputs, before, strict=True):
        assert torch.equal(ids, ids_before)
        assert segments == segments_before


def test_the_output_may_change_once_it_is_taken_in(tiny: TinyNames) -> None:
    """It is compared in the background, where a later evaluator, or the model, may have changed it."""
    evaluator = PanopticEvaluator(tiny.panoptic, threads=1)
    evaluator.reset()
    for record in DatasetCatalog.get(tiny.panoptic):
        ids, segments = perfect_panoptic(record)
        evaluator.process([record], [{"panoptic_seg": (ids, segments)}])
        ids.zero_()
        for segment in segments:
            segment.clear()
    results = evaluator.evaluate()
    assert results is not None and results["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_a_picture_that_two_ranks_had_counts_once(
    tiny: TinyNames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = DatasetCatalog.get(tiny.panoptic)
    nothing: Panoptic = (torch.zeros(64, 64, dtype=torch.int32), [])
    outputs = [nothing, *(perfect_panoptic(record) for record in records[1:])]
    alone = evaluate(PanopticEvaluator(tiny.panoptic), records, outputs)
    # The second rank had the first picture, too.
    monkeypatch.setattr(comm, "gather", lambda judged: [judged, dict(list(judged.items())[:1])])
    assert evaluate(PanopticEvaluator(tiny.panoptic, str(tmp_path)), records, outputs) == alone
    written = json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    assert [annotation["image_id"] for annotation in written] == [1, 2, 3, 4]


def test_missing_picture_is_named(tiny: TinyNames) -> None:
    records = DatasetCatalog.get(tiny.panoptic)[2:]
    with pytest.raises(UserError, match=r"001\.png \(image_id 1\) and 1 other pictures of .*panoptic\.json"):
        evaluate(PanopticEvaluator(tiny.panoptic), records, [perfect_panoptic(r) for r in records])


def test_size_that_differs_from_the_ground_truth_is_named(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.panoptic)[0]
    output: Panoptic = torch.zeros(32, 48, dtype=torch.int32), []
    with pytest.raises(UserError, match=r"images.001\.png has 32x48 .*panoptic.001\.png has 64x64"):
        evaluate(PanopticEvaluator(tiny.panoptic), [record], [output])


def test_class_that_the_data_set_lacks(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.panoptic)[0]
    output = torch.ones(64, 64, dtype=torch.int32), [{"id": 1, "isthing": True, "category_id": 2}]
    with pytest.raises(UserError, match=r"thing segment of class 2 .*'tiny_panoptic' .*NUM_CLASSES"):
        evaluate(PanopticEvaluator(tiny.panoptic), [record], [output])


def test_ground_truth_of_an_unknown_category(tiny: TinyNames) -> None:
    path = Path(MetadataCatalog.get(tiny.panoptic).panoptic_json)
    content = json.loads(path.read_text())
    content["annotations"][1]["segments_info"][0]["category_id"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"panoptic\.json: segment 1 of 002\.png has category_id 99"):
        PanopticEvaluator(tiny.panoptic)


def test_pixels_of_a_segment_that_is_not_listed(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.panoptic)[0]
    with pytest.raises(ValueError, match=r"pixels of segments \[7\]"):
        evaluate(PanopticEvaluator(tiny.panoptic), [record], [(torch.full((64, 64), 7), [segment(1, 0)])])


def test_ground_truth_that_cannot_be_read(tiny: TinyNames) -> None:
    record = DatasetCatalog.get(tiny.panoptic)[0]
    output = perfect_panoptic(record)
    meta = MetadataCatalog.get(tiny.panoptic)
    evaluator = PanopticEvaluator(tiny.panoptic)
    png = Path(meta.panoptic_root) / "001.png"
    png.write_text("no picture")
    with pytest.raises(UserError, match=r"001\.png is not a picture"):
        evaluate(evaluator, [record], [output])
    png.unlink()
    with pytest.raises(UserError, match=r"cannot read .*001\.png \(No such file"):
        evaluate(evaluator, [record], [output])
    Path(meta.panoptic_json).unlink()
    with pytest.raises(
        UserError, match=r"panoptic annotations of data set 'tiny_panoptic': cannot read .*panoptic\.json"
    ):
        PanopticEvaluator(tiny.panoptic)
