"""Plain data of outputs, compared with pycocotools and shapely."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import shapely
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import Boxes, Instances

from mask2former.results import Classes, Region, confident, instance_regions, label_regions, to_json
from mask2former.structures import CroppedMasks

METADATA = Metadata(
    thing_classes=["cat", "dog"],
    stuff_classes=["cat", "dog", "sky"],
    stuff_colors=[[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    thing_dataset_id_to_contiguous_id={17: 0, 18: 1},
    stuff_dataset_id_to_contiguous_id={17: 0, 18: 1, 90: 2},
)


def ring(height=20, width=30):
    mask = np.zeros((height, width), dtype=bool)
    mask[3:15, 5:25] = True
    mask[6:10, 8:20] = False
    return mask


def make_outputs(cropped=False):
    """Two instances that overlap, three segments, three classes."""
    masks = torch.stack([torch.from_numpy(ring()), torch.zeros(20, 30, dtype=torch.bool)])
    masks[1, 10:20, 20:30] = True
    instances = Instances((20, 30))
    instances.pred_masks = CroppedMasks.from_masks(masks) if cropped else masks
    instances.pred_boxes = Boxes([[5, 3, 25, 15], [20, 10, 30, 20]])
    instances.scores = torch.tensor([0.25, 0.75])
    instances.pred_classes = torch.tensor([1, 0])

    segment_ids = torch.full((20, 30), 3, dtype=torch.int32)
    segment_ids[masks[0]] = 1
    segment_ids[masks[1]] = 2
    segment_ids[0, 0] = 0
    segments = [
        {"id": 1, "isthing": True, "category_id": 1, "score": 0.9},
        {"id": 2, "isthing": True, "category_id": 0, "score": torch.tensor(0.8)},
        {"id": 3, "isthing": False, "category_id": 2},
    ]
    sem_seg = torch.nn.functional.one_hot((segment_ids.long() - 1).clamp(min=0), 3).permute(2, 0, 1).float()
    return {"instances": instances, "panoptic_seg": (segment_ids, segments), "sem_seg": sem_seg}


@pytest.mark.parametrize(("cropped", "labels"), [(False, False), (True, False), (False, True)])
def test_records(cropped, labels):
    outputs = make_outputs(cropped)
    if labels:
        outputs["sem_seg"] = outputs["sem_seg"].argmax(0).int()
    document = json.loads(json.dumps(to_json(outputs, METADATA, file="a.jpg", polygons=True)))
    assert (document["file"], document["width"], document["height"]) == ("a.jpg", 30, 20)

    best, other = document["instances"]
    assert (best["category_id"], best["class"], best["score"]) == (17, "cat", 0.75)
    assert (best["area"], best["bbox"]) == (100, [20, 10, 10, 10])
    assert (other["category_id"], other["class"], other["score"]) == (18, "dog", 0.25)
    np.testing.assert_array_equal(mask_util.decode(other["segmentation"]), ring())

    assert [record["id"] for record in document["panoptic"]] == [1, 2, 3]
    assert [record["isthing"] for record in document["panoptic"]] == [True, True, False]
    assert [record["class"] for record in document["panoptic"]] == ["dog", "cat", "sky"]
    assert "score" not in document["panoptic"][2]
    assert document["panoptic"][1]["score"] == 0.8
    assert sum(record["area"] for record in document["panoptic"]) == 20 * 30 - 1

    assert [record["category_id"] for record in document["semantic"]] == [17, 18, 90]
    assert sum(record["area"] for record in document["semantic"]) == 20 * 30

    for record in [*document["instances"], *document["panoptic"], *document["semantic"]]:
        assert record["area"] == mask_util.area(record["segmentation"])
        assert record["bbox"] == mask_util.toBbox(record["segmentation"]).tolist()
        assert shapely.geometry.shape(record["polygons"]).area == record["area"]


def test_only_what_is_there():
    outputs = make_outputs()
    assert to_json({"sem_seg": outputs["sem_seg"]}, METADATA).keys() == {"file", "width", "height", "semantic"}
    document = to_json({"panoptic_seg": outputs["panoptic_seg"]}, METADATA)
    assert document.keys() == {"file", "width", "height", "panoptic"}
    assert "polygons" not in document["panoptic"][0]


def test_no_instances():
    instances = make_outputs()["instances"][:0]
    assert to_json({"instances": instances}, METADATA)["instances"] == []


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_are_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    labels = rng.integers(0, 3, (height, width)) if seed % 2 else rng.integers(0, 2, (1, width)).repeat(height, 0)
    for value, region in label_regions(labels):
        mask = labels == value
        expected = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        rle = region.rle(int(height), int(width))
        assert rle == {"size": [height, width], "counts": expected["counts"].decode()}
        x0, y0, x1, y1 = region.box
        assert [x0, y0, x1 - x0, y1 - y0] == mask_util.toBbox(expected).tolist()
        assert region.area == mask.sum()


def test_a_region_without_pixels():
    region = instance_regions_of(torch.zeros(1, 4, 5, dtype=torch.bool))[0]
    assert region.area == 0
    assert mask_util.area(region.rle(4, 5)) == 0
    assert shapely.geometry.shape(region.geojson()).is_empty


def instance_regions_of(masks):
    instances = Instances(tuple(masks.shape[1:]))
    instances.pred_masks = masks
    return instance_regions(instances)


def test_outlines_cover_exactly_the_mask_holes_included():
    mask = ring()
    mask[16:18, 0:3] = True  # a second part
    mask[2, 4] = True  # touches the first part at a corner
    (region,) = instance_regions_of(torch.from_numpy(mask)[None])
    outline = shapely.geometry.shape(region.geojson())
    assert outline.is_valid
    rows, columns = np.indices(mask.shape)
    np.testing.assert_array_equal(shapely.contains_xy(outline, columns + 0.5, rows + 0.5), mask)
    assert sum(len(part.interiors) for part in outline.geoms) == 1
    # Straight lines have no points in the middle.
    assert len(Region(np.ones((5, 7), dtype=bool), 2, 3).geojson()["coordinates"][0]) == 5


def test_label_regions_are_in_order_and_complete():
    labels = np.array([[7, 7, 0], [0, 2, 2]])
    found = dict(label_regions(labels))
    assert list(found) == [0, 2, 7]
    assert sum(region.area for region in found.values()) == labels.size
    assert found[2].box == (1, 1, 3, 2)


def test_confident():
    outputs = make_outputs(cropped=True)
    kept = confident(outputs, 0.5)
    assert kept["instances"].scores.tolist() == [0.75]
    assert len(outputs["instances"]) == 2
    assert kept["sem_seg"] is outputs["sem_seg"]
    assert "instances" not in confident({"sem_seg": outputs["sem_seg"]}, 0.5)


def test_classes_of_metadata_with_gaps():
    assert Classes.of(Metadata()).describe(3) == {"category_id": 3, "class": "3"}
    things = Classes.of(Metadata(thing_classes=["cat", "dog"], thing_colors=[[1, 2, 3]]))
    assert things.name(1) == "dog"
    assert things.colors == []
    assert Classes.of(METADATA).colors == [(1, 2, 3), (4, 5, 6), (7, 8, 9)]


def test_classes_of_the_registered_data_sets():
    nuclei = Classes.of(MetadataCatalog.get("nuclei_val"))
    assert nuclei.names == ["nucleus", "background"]
    coco = Classes.of(MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg"))
    assert coco.describe(79) == {"category_id": 90, "class": "toothbrush"}
    assert len(coco.names) == len(coco.colors) == 133
