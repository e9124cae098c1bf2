"""Mappers: the published samples, every form of annotation, and pictures of every kind."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from mask2former.config import get_default_config
from mask2former.data import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
    build_mapper,
    read_image,
)
from mask2former.data.annotations import (
    decode_segmentation,
    ids_from_rgb,
    read_instances,
    read_panoptic,
    read_semantic,
    rgb_from_ids,
)
from mask2former.data.augmentation import (
    build_test_augmentations,
    large_scale_jitter,
)
from mask2former.data.datasets import load_panoptic, panoptic_metadata
from mask2former.data.panoptic_files import panoptic_to_semantic
from mask2former.errors import UserError

SAMPLES = json.loads((Path(__file__).parent / "data" / "mapper_samples.json").read_text())


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def lsj_config(name: str) -> CfgNode:
    cfg = get_default_config()
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.FORMAT = "RGB"
    return cfg


def plain_mapper(reader: Any = read_instances, augmentations: Any = ()) -> MaskFormerDatasetMapper:
    return MaskFormerDatasetMapper(augmentations=augmentations, image_format="RGB", annotation_reader=reader)


def save_picture(path: Path, height: int, width: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def instance_dict(folder: Path, segmentations: list[Any], height: int = 40, width: int = 60) -> dict[str, Any]:
    path = save_picture(folder / "picture.png", height, width)
    annotations = [
        {"id": 100 + i, "category_id": i, "iscrowd": 0, "segmentation": s} for i, s in enumerate(segmentations)
    ]
    return {"file_name": str(path), "image_id": 7, "height": height, "width": width, "annotations": annotations}


def rle_of(mask: np.ndarray, compressed: bool) -> dict[str, Any]:
    if compressed:
        return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


# ------------------------------------------------------------------------------------- the published mappers


ADE20K_INPUT = {"CROP.ENABLED": True, "CROP.TYPE": "absolute", "COLOR_AUG_SSD": True, "FORMAT": "RGB"}
TENTHS = np.arange(5, 21)  # of the side that the published recipes name their training sizes by

# What the recipes of the samples set under INPUT.
RECIPES: dict[str, dict[str, Any]] = {
    "coco_instance_lsj": {},
    "coco_panoptic_lsj": {},
    "mask_former_semantic": {
        **ADE20K_INPUT,
        "MIN_SIZE_TRAIN": (TENTHS * 512 // 10).tolist(),
        "MAX_SIZE_TRAIN": 2048,
        "CROP.SIZE": [512, 512],
        "SIZE_DIVISIBILITY": 512,
    },
    "mask_former_semantic_cityscapes": {
        **ADE20K_INPUT,
        "MIN_SIZE_TRAIN": (TENTHS * 1024 // 10).tolist(),
        "MAX_SIZE_TRAIN": 4096,
        "CROP.SIZE": [512, 1024],
    },
    "mask_former_instance": {
        **ADE20K_INPUT,
        "MIN_SIZE_TRAIN": (TENTHS * 640 // 10).tolist(),
        "MAX_SIZE_TRAIN": 2560,
        "CROP.SIZE": [640, 640],
        "SIZE_DIVISIBILITY": 640,
    },
}
RECIPES["mask_former_panoptic"] = RECIPES["mask_former_instance"]


def recipe_config(case: str) -> CfgNode:
    cfg = lsj_config(case.removesuffix("_cityscapes"))
    cfg.merge_from_list([item for key, value in RECIPES[case].items() for item in (f"INPUT.{key}", value)])
    cfg.DATASETS.TRAIN = (SAMPLES[case]["dataset"],)
    return cfg


def coco_dicts(case: str, coco: Path, folder: Path) -> list[dict[str, Any]]:
    """COCO's pictures of the samples; ``folder`` gets their semantic PNGs."""
    files = {sample["file"] for sample in SAMPLES[case]["samples"]}
    if "instance" in case:
        try:
            path = str(coco / "annotations/instances_train2017.json")
            dicts = load_coco_json(path, str(coco / "train2017"), "coco_of_mapper_samples")
            return [d for d in dicts if Path(d["file_name"]).name in files]
        finally:
            MetadataCatalog.remove("coco_of_mapper_samples")

    content = json.loads((coco / "annotations/panoptic_train2017.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["file_name"].replace(".png", ".jpg") in files]
    panoptic_json = folder / "panoptic.json"
    panoptic_json.write_text(json.dumps(content))
    labels = {category["id"]: index for index, category in enumerate(COCO_CATEGORIES)}
    assert not panoptic_to_semantic(panoptic_json, coco / "panoptic_train2017", folder / "semantic", labels)
    paths = [str(panoptic_json), str(coco / "train2017"), str(coco / "panoptic_train2017"), str(folder / "semantic")]
    dicts = load_panoptic(*paths, panoptic_metadata(COCO_CATEGORIES))
    if "semantic" in case:
        for dataset_dict in dicts:
            del dataset_dict["segments_info"], dataset_dict["pan_seg_file_name"]
    return dicts


@pytest.mark.parametrize("case", sorted(SAMPLES))
def test_published_samples(case: str, shared_data: Path, tmp_path: Path) -> None:
    dicts = {Path(d["file_name"]).name: d for d in coco_dicts(case, shared_data / "coco", tmp_path)}
    mapper = build_mapper(recipe_config(case), True)
    for expected in SAMPLES[case]["samples"]:
        seed_everything(expected["seed"])
        sample = mapper(dicts[expected["file"]])
        instances = sample["instances"]

        assert list(sample["image"].shape) == expected["image_shape"]
        means = sample["image"].float().mean(dim=(1, 2)).numpy()
        assert means == pytest.approx(expected["image_mean"], abs=0.5)
        areas = instances.gt_masks.sum(dim=(1, 2)).tolist()
        ours = sorted(zip(instances.gt_classes.tolist(), areas, strict=True))
        published = sorted(pair for pair in zip(expected["classes"], expected["areas"], strict=True) if pair[1])
        assert [c for c, _ in ours] == [c for c, _ in published]
        for (_, area), (_, published_area) in zip(ours, published, strict=True):
            assert area == pytest.approx(published_area, abs=8, rel=0.01)
        assert ("sem_seg" in sample) == ("ignored" in expected)
        if "ignored" in expected:
            assert sample["sem_seg"].dtype == torch.int64
            assert int((sample["sem_seg"] == 255).sum()) == expected["ignored"]


@pytest.mark.parametrize(
    ("published", "name"),
    [
        (COCOInstanceNewBaselineDatasetMapper, "coco_instance_lsj"),
        (COCOPanopticNewBaselineDatasetMapper, "coco_panoptic_lsj"),
        (MaskFormerInstanceDatasetMapper, "mask_former_instance"),
        (MaskFormerPanopticDatasetMapper, "mask_former_panoptic"),
        (MaskFormerSemanticDatasetMapper, "mask_former_semantic"),
    ],
)
def test_published_class_names_are_the_rows_of_the_table(published: Any, name: str) -> None:
    by_class = published(recipe_config(name), True)
    cfg = recipe_config(name)
    cfg.INPUT.DATASET_MAPPER_NAME = "nothing"  # whatever it says
    by_name = build_mapper(lsj_config(name), True)
    assert type(by_class) is published
    assert published(cfg, True).annotation_reader is by_class.annotation_reader is by_name.annotation_reader
    assert by_class.label_map == by_name.label_map == (name in ("mask_former_semantic", "mask_former_panoptic"))


def test_unknown_mapper_is_detectron2s_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mapper = build_mapper(lsj_config("coco_instance_ljs"), True)
    assert type(mapper) is DatasetMapper and mapper.is_train
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'coco_instance_ljs' is not known (did you mean coco_instance_lsj" in message
    assert "mask_former_semantic" in message and "microscopy_panoptic" in message
    with pytest.raises(UserError, match="'coco_instance_ljs'.*coco_instance_lsj.*microscopy_panoptic"):
        MaskFormerDatasetMapper(lsj_config("coco_instance_ljs"), True)


def test_lazy_config_builds_the_same_mapper() -> None:
    node = LazyCall(MaskFormerDatasetMapper)(
        is_train=True,
        augmentations=LazyCall(large_scale_jitter)(image_size=512),
        image_format="RGB",
        annotation_reader=read_panoptic,
    )
    cfg = lsj_config("coco_panoptic_lsj")
    cfg.INPUT.IMAGE_SIZE = 512
    assert str(instantiate(node).augmentations) == str(build_mapper(cfg, True).augmentations)


def test_for_inference_it_is_detectron2s_mapper(tmp_path: Path) -> None:
    dataset_dict = {**instance_dict(tmp_path, []), "image_id": 3}
    cfg = get_default_config()
    ours, theirs = build_mapper(cfg, False)(dataset_dict), DatasetMapper(cfg, False)(dataset_dict)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.pop("image"), theirs.pop("image"))
    assert ours == theirs


def test_scale_test_resizes_by_a_factor(tmp_path: Path) -> None:
    cfg = get_default_config()
    cfg.INPUT.SCALE_TEST = 2.5
    assert len(build_test_augmentations(cfg)) == 1
    sample = build_mapper(cfg, False)(instance_dict(tmp_path, [], height=41, width=60))
    assert sample["image"].shape == (3, 102, 150)
    assert (sample["height"], sample["width"]) == (41, 60)


# ------------------------------------------------------------------------------------------ instance masks


def test_all_coco_polygons_are_filled_as_pycocotools_does(shared_data: Path) -> None:
    coco = json.loads((shared_data / "coco/annotations/instances_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    for annotation in coco["annotations"][:300]:
        height, width = sizes[annotation["image_id"]]
        rle = annotation["segmentation"]
        if isinstance(rle, list):
            rle = coco_mask.merge(coco_mask.frPyObjects(rle, height, width))
        elif isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, height, width)
        ours = decode_segmentation(annotation["segmentation"], height, width, "annotation")
        assert np.array_equal(ours, coco_mask.decode(rle).astype(bool))


POLYGONS = {
    "triangle": [[5, 5, 50, 8, 20, 35]],
    "two parts": [[2, 2, 20, 2, 20, 20, 2, 20], [30, 5, 55, 5, 40, 35]],
    "overlapping parts": [[2, 2, 30, 2, 30, 20, 2, 20], [20, 5, 55, 5, 40, 35]],
    "crosses itself": [[5, 5, 50, 35, 50, 5, 5, 35]],
    "touches itself": [[5, 5, 30, 5, 30, 20, 50, 20, 50, 35, 30, 35, 30, 20, 5, 20]],
    "fractions": [[5.3, 5.7, 50.2, 8.8, 20.1, 35.4]],
    "whole picture": [[0, 0, 60, 0, 60, 40, 0, 40]],
}


@pytest.mark.parametrize("polygons", POLYGONS.values(), ids=POLYGONS.keys())
def test_polygons_against_pycocotools(polygons: list[list[float]], tmp_path: Path) -> None:
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 40, 60))).astype(bool)
    sample = plain_mapper()(instance_dict(tmp_path, [polygons]))
    assert np.array_equal(sample["instances"].gt_masks[0].numpy(), expected)
    assert expected.any()


LEAVING = {
    "on the right": [40, 10, 90, 10, 90, 30, 40, 30],
    "all around": [-500, -500, 500, -500, 500, 500, -500, 500],
    "far away": [10, 10, 1e9, 10, 1e9, 30, 10, 30],
    "crossing itself": [-20, 5, 80, 35, 80, 5, -20, 35],
}


@pytest.mark.parametrize("polygon", LEAVING.values(), ids=LEAVING.keys())
def test_polygons_that_leave_the_picture_end_at_its_border(polygon: list[float], tmp_path: Path) -> None:
    clipped = np.array(polygon, dtype=float).clip(-600, 600).tolist()
    larger = coco_mask.decode(coco_mask.frPyObjects([(np.array(clipped) + 600).tolist()], 1240, 1260))[:, :, 0]
    expected = larger[600:640, 600:660].astype(bool)

    dataset_dict = instance_dict(tmp_path, [[polygon]])
    sample = plain_mapper()(dataset_dict)
    assert (sample["instances"].gt_masks[0].numpy() != expected).mean() < 0.01

    padded = plain_mapper(augmentations=[T.FixedSizeCrop((100, 100))])(dataset_dict)
    assert padded["padding_mask"].sum() == 100 * 100 - 40 * 60
    assert not padded["instances"].gt_masks[0, padded["padding_mask"]].any()


BROKEN = {
    "two points": [5, 5, 20, 20],
    "odd": [5, 5, 20, 20, 30, 5, 7],
    "a line": [5, 5, 20, 20, 35, 35],
    "outside": [100, 100, 120, 100, 120, 120],
    "not a number": [5, 5, float("nan"), 20, 30, 5],
    "empty": [],
}


@pytest.mark.parametrize("polygon", BROKEN.values(), ids=BROKEN.keys())
def test_broken_polygons_are_dropped_with_one_warning(
    polygon: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [[5.0, 5, 50, 8, 20, 35]]
    dataset_dict = instance_dict(tmp_path, [good, [polygon]])
    with caplog.at_level(logging.WARNING, "mask2former.data.annotations"):
        for _ in range(2):
            sample = plain_mapper()(dataset_dict)
    assert sample["instances"].gt_classes.tolist() == [0]
    assert sample["instances"].gt_masks.shape == (1, 40, 60)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "annotation id 101" in warnings[0] and dataset_dict["file_name"] in warnings[0]


def test_polygons_and_both_run_length_encodings_in_one_picture(tmp_path: Path) -> None:
    mask = np.zeros((40, 60), dtype=bool)
    mask[8:30, 15:45] = True
    mask[0, 0] = True
    polygon = [[5.0, 5, 50, 8, 20, 35]]
    dataset_dict = instance_dict(tmp_path, [rle_of(mask, True), polygon, rle_of(mask, False)])
    instances = plain_mapper()(dataset_dict)["instances"]
    assert instances.gt_classes.tolist() == [0, 1, 2]
    assert np.array_equal(instances.gt_masks[0].numpy(), mask)
    assert torch.equal(instances.gt_masks[0], instances.gt_masks[2])
    assert np.array_equal(instances.gt_masks[1].numpy(), decode_segmentation(polygon, 40, 60, ""))
    assert instances.gt_boxes.tensor[0].tolist() == [0, 0, 45, 30]


def test_run_length_encodings_are_no_target_in_the_padding(tmp_path: Path) -> None:
    dataset_dict = instance_dict(tmp_path, [rle_of(np.ones((40, 60), dtype=bool), True)])
    sample = plain_mapper(augmentations=[T.FixedSizeCrop((64, 64))])(dataset_dict)
    assert torch.equal(sample["instances"].gt_masks[0], ~sample["padding_mask"])
    assert sample["padding_mask"].sum() == 64 * 64 - 40 * 60


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "expected 'segmentation'"),
        ({"size": [40, 61], "counts": [40 * 61]}, r"size \[40, 61\].*40 pixels high and 60 wide"),
        ({"size": [40, 60], "counts": [100, 200]}, "add up to 300 pixels, expected 2400"),
    ],
)
def test_broken_segmentations_are_named(segmentation: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"annotation id 100 of picture '.*picture.png'.*{message}"):
        plain_mapper()(instance_dict(tmp_path, [segmentation]))


def test_crowds_are_no_targets(tmp_path: Path) -> None:
    dataset_dict = instance_dict(tmp_path, [[[5.0, 5, 50, 8, 20, 35]], rle_of(np.ones((40, 60), dtype=bool), True)])
    dataset_dict["annotations"][1]["iscrowd"] = 1
    assert plain_mapper()(dataset_dict)["instances"].gt_classes.tolist() == [0]


def test_empty_pictures(tmp_path: Path) -> None:
    sample = plain_mapper()(instance_dict(tmp_path, []))
    instances = sample["instances"]
    assert instances.gt_classes.shape == (0,) and instances.gt_classes.dtype == torch.int64
    assert instances.gt_masks.shape == (0, 40, 60) and instances.gt_masks.dtype == torch.bool
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert {"file_name", "image_id", "height", "width", "image", "padding_mask", "instances"} == sample.keys()


def test_objects_that_the_crop_removed_are_left_out(tmp_path: Path) -> None:
    dataset_dict = instance_dict(tmp_path, [[[2.0, 2, 10, 2, 10, 10]], [[40.0, 20, 55, 20, 55, 35]]])
    instances = plain_mapper(augmentations=[T.CropTransform(30, 10, 30, 30)])(dataset_dict)["instances"]
    assert instances.gt_classes.tolist() == [1]


def test_the_dataset_dict_is_left_as_it_is(tmp_path: Path) -> None:
    dataset_dict = instance_dict(tmp_path, [[[5.0, 5, 50, 8, 20, 35]]])
    before = json.dumps(dataset_dict)
    plain_mapper(augmentations=[T.HFlipTransform(60)])(dataset_dict)
    assert json.dumps(dataset_dict) == before


def test_a_wrong_kind_of_annotation_is_named(tmp_path: Path) -> None:
    dataset_dict = instance_dict(tmp_path, [])
    with pytest.raises(UserError, match=r"picture\.png' has no panoptic annotation"):
        plain_mapper(read_panoptic)(dataset_dict)
    del dataset_dict["annotations"]
    with pytest.raises(UserError, match=r"picture\.png' has no instance annotations"):
        plain_mapper()(dataset_dict)


@pytest.mark.parametrize("reader", [read_panoptic, read_semantic])
def test_a_picture_without_the_annotation_is_named(reader: Any, tmp_path: Path) -> None:
    dataset_dict = instance_dict(tmp_path, [])
    with pytest.raises(UserError, match=r"picture\.png' has no (panoptic|semantic) annotation"):
        plain_mapper(reader)(dataset_dict)


def test_a_size_that_differs_from_the_annotation_is_named(tmp_path: Path) -> None:
    dataset_dict = {**instance_dict(tmp_path, []), "width": 61}
    with pytest.raises(UserError, match=r"picture\.png' is 60 x 40 pixels, but its annotation says 61 x 40"):
        plain_mapper()(dataset_dict)


# ------------------------------------------------------------------------------------------ panoptic masks


def panoptic_dict(folder: Path, ids: np.ndarray, segments: list[dict[str, Any]], image: np.ndarray) -> dict[str, Any]:
    Image.fromarray(image).save(folder / "picture.png")
    Image.fromarray(rgb_from_ids(ids)).save(folder / "panoptic.png")
    return {
        "file_name": str(folder / "picture.png"),
        "image_id": 1,
        "height": image.shape[0],
        "width": image.shape[1],
        "pan_seg_file_name": str(folder / "panoptic.png"),
        "segments_info": segments,
    }


def test_ids_go_to_rgb_and_back() -> None:
    panopticapi = pytest.importorskip("panopticapi.utils")
    ids = np.random.default_rng(0).integers(0, 1 << 24, (20, 30)).astype(np.uint32)
    assert np.array_equal(ids_from_rgb(rgb_from_ids(ids)), ids)
    assert np.array_equal(panopticapi.rgb2id(rgb_from_ids(ids)), ids)


def test_panoptic_reader(tmp_path: Path) -> None:
    ids = np.zeros((20, 30), dtype=np.uint32)
    ids[2:10, 3:9], ids[12:, :], ids[0:2, 20:] = 70000, 300, 16777215
    segments = [
        {"id": 70000, "category_id": 4, "iscrowd": 0},
        {"id": 300, "category_id": 9, "iscrowd": 0},
        {"id": 16777215, "category_id": 5, "iscrowd": 0},  # the id that padding looks like
        {"id": 12, "category_id": 5, "iscrowd": 0},  # not in the PNG
    ]
    dataset_dict = panoptic_dict(tmp_path, ids, segments, np.zeros((20, 30, 3), dtype=np.uint8))
    sample = plain_mapper(read_panoptic, [T.FixedSizeCrop((32, 32))])(dataset_dict)
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == [4, 9, 5]
    for mask, segment in zip(instances.gt_masks.numpy(), segments, strict=False):
        assert np.array_equal(mask[:20, :30], ids == segment["id"])
        assert mask.sum() == (ids == segment["id"]).sum()
    assert instances.gt_boxes.tensor[0].tolist() == [3, 2, 9, 10]
    assert not {"pan_seg_file_name", "segments_info"} & sample.keys()

    segments[1]["iscrowd"] = 1
    assert plain_mapper(read_panoptic)(dataset_dict)["instances"].gt_classes.tolist() == [4, 5]


def test_a_panoptic_png_of_another_size_is_named(tmp_path: Path) -> None:
    dataset_dict = panoptic_dict(tmp_path, np.zeros((20, 31), dtype=np.uint32), [], np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(UserError, match=r"panoptic\.png' is 31 x 20 pixels.*picture\.png' is 30 x 20"):
        plain_mapper(read_panoptic)(dataset_dict)


# ------------------------------------------------------------------------------------------ semantic masks

GREY, IGNORE = 128, 255


def semantic_dict(folder: Path, labels: np.ndarray) -> dict[str, Any]:
    Image.fromarray(labels).save(folder / "labels.png")
    path = save_picture(folder / "picture.png", *labels.shape)
    return {"file_name": str(path), "sem_seg_file_name": str(folder / "labels.png")}


def semantic_mapper(augmentations: Any = (), **options: Any) -> MaskFormerDatasetMapper:
    return MaskFormerDatasetMapper(
        augmentations=augmentations,
        image_format="RGB",
        annotation_reader=read_semantic,
        label_map=True,
        **options,
    )


def stripes(*labels: int, dtype: Any = np.uint8) -> np.ndarray:
    """Label map of 12 rows with stripes of 10 columns."""
    return np.repeat(np.array(labels, dtype=dtype), 10)[None].repeat(12, axis=0)


def test_semantic_reader(tmp_path: Path) -> None:
    labels = stripes(7, 255, 0, 7)
    sample = semantic_mapper()(semantic_dict(tmp_path, labels))
    assert sample["instances"].gt_classes.tolist() == [0, 7]
    assert sample["instances"].gt_classes.dtype == torch.int64
    assert np.array_equal(sample["instances"].gt_masks.numpy(), [labels == 0, labels == 7])
    assert sample["sem_seg"].dtype == torch.int64
    assert np.array_equal(sample["sem_seg"].numpy(), labels)
    assert "sem_seg_file_name" not in sample


def test_a_picture_of_ignored_pixels_alone(tmp_path: Path) -> None:
    instances = semantic_mapper()(semantic_dict(tmp_path, stripes(255, 255)))["instances"]
    assert instances.gt_classes.shape == (0,) and instances.gt_masks.shape == (0, 12, 20)


def test_more_than_256_labels_and_another_ignore_label(tmp_path: Path) -> None:
    """ADE20K full: labels up to 846 in 16 bits, 65535 for "ignore"; 255 is a class."""
    labels = stripes(846, 255, 65535, dtype=np.uint16)
    mapper = semantic_mapper([T.FixedSizeCrop((16, 32))], ignore_label=65535, num_labels=847)
    sample = mapper(semantic_dict(tmp_path, labels))
    assert sample["instances"].gt_classes.tolist() == [255, 846]
    assert sample["instances"].gt_masks.sum(dim=(1, 2)).tolist() == [120, 120]
    assert np.array_equal(sample["sem_seg"][:12, :30].numpy(), labels)
    assert (sample["sem_seg"][12:] == 65535).all() and (sample["sem_seg"][:, 30:] == 65535).all()


def test_labels_that_the_data_set_lacks_are_named(tmp_path: Path) -> None:
    dataset_dict = semantic_dict(tmp_path, stripes(7, 255, 150))
    with pytest.raises(UserError, match=r"labels\.png' has the label 150, expected 0 to 149 or 255 \(ignored\)"):
        semantic_mapper(num_labels=150)(dataset_dict)
    assert semantic_mapper(num_labels=151)(dataset_dict)["instances"].gt_classes.tolist() == [7, 150]


def test_label_maps_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    dataset_dict = semantic_dict(tmp_path, stripes(1, 2, 3))
    Image.new("L", (31, 12)).save(dataset_dict["sem_seg_file_name"])
    with pytest.raises(UserError, match=r"labels\.png' is 31 x 12 pixels.*picture\.png' is 30 x 12"):
        semantic_mapper()(dataset_dict)
    Image.new("RGB", (30, 12)).save(dataset_dict["sem_seg_file_name"])
    with pytest.raises(UserError, match=r"labels\.png' is a picture of mode RGB"):
        semantic_mapper()(dataset_dict)
    with pytest.raises(ValueError, match="label_map=True"):
        plain_mapper(read_semantic)(dataset_dict)


def test_ignore_label_and_labels_come_from_the_training_sets_metadata(caplog: pytest.LogCaptureFixture) -> None:
    try:
        MetadataCatalog.get("labels_of_five").set(ignore_label=65, stuff_classes=list("abcde"))
        cfg = lsj_config("mask_former_semantic")
        cfg.DATASETS.TRAIN = ("labels_of_five",)
        mapper = build_mapper(cfg, True)
        assert (mapper.ignore_label, mapper.num_labels) == (65, 5)
        warning = "IGNORE_VALUE is 255, but data set 'labels_of_five' marks pixels without a label by 65"
        assert warning in caplog.text
    finally:
        MetadataCatalog.remove("labels_of_five")
    cfg.DATASETS.TRAIN = ()
    mapper = build_mapper(cfg, True)
    assert (mapper.ignore_label, mapper.num_labels) == (255, None)


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (12, 17), dtype=np.uint8)
    rgb = np.random.default_rng(1).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    three = np.repeat(grey[:, :, None], 3, axis=2)

    def saved(image: Image.Image, name: str, **options: Any) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name, "RGB")

    assert np.array_equal(saved(Image.fromarray(grey), "grey.png"), three)
    assert np.array_equal(saved(Image.fromarray(grey.astype(np.uint16) * 257), "grey16.png"), three)
    assert np.array_equal(saved(Image.fromarray(grey.astype(np.uint16) * 257), "grey16.tif"), three)
    assert np.array_equal(saved(Image.fromarray(np.dstack([rgb, grey])), "transparent.png"), rgb)
    assert np.array_equal(saved(Image.fromarray(grey).convert("P"), "palette.png"), three)
    rotated = Image.Exif()
    rotated[274] = 6  # to be shown turned clockwise by a quarter
    assert np.array_equal(saved(Image.fromarray(rgb), "rotated.png", exif=rotated), np.rot90(rgb, -1))
    assert np.array_equal(read_image(tmp_path / "transparent.png", "BGR"), rgb[:, :, ::-1])


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*absent\.png' does not exist"):
        read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"cannot read picture '.*text\.png'"):
        read_image(tmp_path / "text.png")
    whole = save_picture(tmp_path / "whole.png", 50, 50).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read picture '.*half\.png'"):
        read_image(tmp_path / "half.png")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float\.tif' holds floating-point numbers"):
        read_image(tmp_path / "float.tif")
