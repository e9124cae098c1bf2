"""Values of wrong types in COCO's formats are named with file and record, wherever the file is read."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.data import check_dataset
from mask2former.data.annotations import check_segmentation, decode_segmentation
from mask2former.data.datasets.cityscapes import check_polygon_files
from mask2former.data.datasets.coco_format import load_instances_json, load_json, load_panoptic_json
from mask2former.data.images import read_label_map
from mask2former.errors import UserError
from mask2former.evaluation import InstanceSegEvaluator, PanopticEvaluator


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path) as names:
        yield names


def change(path: Path, place: str, value: Any) -> None:
    """Put ``value`` where ``place`` ("images/0/id") is; None removes what is there."""
    content = json.loads(path.read_text())
    *parents, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    target = content
    for key in parents:
        target = target[key]
    if value is None:
        del target[last]
    else:
        target[last] = value
    path.write_text(json.dumps(content))


INSTANCES = {
    "images": ({"1": {}}, "not in COCO's instance format"),
    "images/0": (5, "picture number 1 is 5, expected a record"),
    "images/0/id": ([1], r"picture 001\.png has id a list of 1, expected an integer or text"),
    "images/0/file_name": ("a\0", "expected the name of a file"),
    "images/1/height": (0, r"picture 002\.png has height 0, expected a whole number of at least 1"),
    "images/1/width": (None, r"picture 002\.png lacks 'width'"),
    "categories": ([], "has no 'categories'"),
    "categories/0/name": (3, "has name 3, expected text"),
    "categories/1/id": (1, "category square is there twice"),
    "annotations/0": ("text", "annotation number 1 is 'text'"),
    "annotations/0/image_id": (99, r"annotation 1 \(of picture 99\) is of a picture that is not among"),
    "annotations/0/category_id": (True, "has category_id True, expected an integer"),
    "annotations/0/iscrowd": ("no", "has iscrowd 'no', expected 0 or 1"),
    "annotations/0/bbox": ([1, 2, 3, math.nan], "has bbox a list of 4, expected x, y, width, height"),
    "annotations/0/area": (-1, "has area -1"),
    "annotations/0/segmentation": ({"counts": "0"}, "has segmentation a dict of 1, expected polygons or"),
}
UNUSED = ("images/0/file_name", "images/1/width")  # by evaluation


@pytest.mark.parametrize("place", INSTANCES)
def test_instances(place: str, tiny: TinyNames, tmp_path: Path) -> None:
    value, message = INSTANCES[place]
    change(tmp_path / "instances.json", place, value)
    readers: list[Callable[[], Any]] = [lambda: load_instances_json(tmp_path / "instances.json")]
    if place not in UNUSED:
        readers.append(lambda: InstanceSegEvaluator(tiny.instances))
    for read in readers:
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert "instances.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["annotations/0/category_id", "annotations/0/iscrowd", "images/1/width", "images/0/id"]
)
def test_instances_by_name(place: str, tiny: TinyNames, tmp_path: Path) -> None:
    """Detectron2 reads these."""
    change(tmp_path / "instances.json", place, {"a": 1})
    with pytest.raises(UserError, match=r"instances\.json|\.png'"):
        check_dataset(tiny.instances, 2)


PANOPTIC = {
    "annotations/0/segments_info": ({}, r"'001\.png' has segments_info a dict of 0, expected a list"),
    "annotations/0/segments_info/0": (1, r"'001\.png': segment number 1 is 1"),
    "annotations/0/segments_info/0/id": (2**24, "expected an integer from 0 to 16777215"),
    "annotations/0/segments_info/0/category_id": ("1", "segment 1 has category_id '1', expected an integer"),
    "annotations/0/image_id": ("x", r"'001\.png' has image_id x, which is not among its 'images'"),
    "annotations/0/file_name": (None, "lacks 'file_name'"),
}


@pytest.mark.parametrize("place", PANOPTIC)
def test_panoptic(place: str, tiny: TinyNames, tmp_path: Path) -> None:
    value, message = PANOPTIC[place]
    change(tmp_path / "panoptic.json", place, value)
    for read in (lambda: load_panoptic_json(tmp_path / "panoptic.json"), lambda: PanopticEvaluator(tiny.panoptic)):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert "panoptic.json" in str(caught.value)


def test_panoptic_truth_needs_kinds(tiny: TinyNames, tmp_path: Path) -> None:
    change(tmp_path / "panoptic.json", "categories/0/isthing", None)
    with pytest.raises(UserError, match="category disc lacks 'isthing'"):
        PanopticEvaluator(tiny.panoptic)


def test_whole_numbers_may_have_a_point(tiny: TinyNames, tmp_path: Path) -> None:
    """Some programs write 1.0 for 1."""
    for place, value in {"images/0/id": 1.0, "images/0/height": 64.0, "annotations/0/category_id": 1.0}.items():
        change(tmp_path / "instances.json", place, value)
    assert len(load_instances_json(tmp_path / "instances.json")["images"]) == len(check_dataset(tiny.instances, 2)) == 4


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5000, '{"a": ', "\ufeff{}", "\x00"], ids=["nested", "long", "cut", "mark", "binary"]
)
def test_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot read '.*a\.json' as JSON"):
        load_json(tmp_path / "a.json")


SHAPES = {
    "text in a polygon": ([[1, 1, "5", 1, 5, 5]], "it has the polygon"),
    "points as lists": ([[[1, 1], [5, 1], [5, 5]]], "expected numbers x, y"),
    "no polygon": ([5], "it has the polygon 5"),
    "a letter that is none": ({"size": [8, 8], "counts": "\x7f"}, "expected a list or COCO's text"),
    "a number that goes on": ({"size": [8, 8], "counts": "oooo"}, "expected a list or COCO's text"),
    "a size of text": ({"size": "88", "counts": "0"}, "has size 88"),
    "runs of text": ({"size": [8, 8], "counts": ["64"]}, "has the run 64, expected integers"),
    "runs below 0": ({"size": [8, 8], "counts": [-1, 65]}, "has the run -1"),
    "nothing": (None, "expected 'segmentation' with polygons"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_segmentations(case: str) -> None:
    shape, message = SHAPES[case]
    readers: list[Callable[..., Any]] = [decode_segmentation, check_segmentation]
    for read in readers:
        with pytest.raises(UserError, match=f"annotation 7: .*{message}"):
            read(shape, 8, 8, "annotation 7")


def test_polygons_far_away_take_no_memory() -> None:
    with pytest.raises(UserError, match="expected points in its picture, which is 8 x 8"):
        check_segmentation([[0, 0, 1e12, 0, 5, 5]], 8, 8, "annotation 7")
    assert decode_segmentation([[0, 0, 1e12, 0, 0, 1e12]], 8, 8, "annotation 7").all()


@pytest.mark.parametrize("value", [math.nan, -5])
def test_label_maps_of_no_labels(value: float, tmp_path: Path) -> None:
    dtype = np.float32 if math.isnan(value) else np.int32
    Image.fromarray(np.full((4, 4), value, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif' (holds floating-point numbers|has the label -5)"):
        read_label_map(tmp_path / "a.tif")


CITYSCAPES = {
    "[]": "expected integers imgHeight and imgWidth",
    '{"imgHeight": 1, "imgWidth": 1, "objects": [{"label": "cat", "polygon": []}]}': "object 1 has the label 'cat'",
    '{"imgHeight": 1, "imgWidth": 1, "objects": [{"label": "cargroup", "polygon": []}]}': r"object 1 .* has no",
}


@pytest.mark.parametrize("text", CITYSCAPES)
def test_cityscapes(text: str, tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    (tmp_path / "a_polygons.json").write_text(text)
    with pytest.raises(UserError, match=rf"a_polygons\.json': {CITYSCAPES[text]}"):
        check_polygon_files(str(tmp_path))
