"""Augmentations: their keys and sizes, and the quicker ways beside Detectron2's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from test_data_mapper import (
    GREY,
    IGNORE,
    instance_dict,
    lsj_config,
    panoptic_dict,
    plain_mapper,
    rle_of,
    seed_everything,
    semantic_dict,
    stripes,
)

from mask2former.data import (
    build_mapper,
    read_image,
)
from mask2former.data.annotations import (
    _fill_polygons,
    read_panoptic,
)
from mask2former.data.augmentation import (
    ColorAugSSD,
    PadToMultiple,
    RandomColorCurve,
    RandomScaledCrop,
    large_scale_jitter,
    microscopy,
    resize_and_crop,
)
from mask2former.data.resized_crop import ResizedCrop
from mask2former.errors import UserError

# ------------------------------------------------------------------------------------------ resize and crop


def keys_config(name: str, **values: Any) -> CfgNode:
    """Pictures stay as they are but for the keys that are set."""
    cfg = lsj_config(name)
    cfg.INPUT.MIN_SIZE_TRAIN = 0
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.merge_from_list([item for key, value in values.items() for item in (f"INPUT.{key.replace('__', '.')}", value)])
    return cfg


@pytest.mark.parametrize(("size", "expected"), [(-1, (12, 30)), (16, (16, 32)), (40, (40, 40))])
def test_size_divisibility(size: int, expected: tuple[int, int], tmp_path: Path) -> None:
    dataset_dict = semantic_dict(tmp_path, stripes(1, 2, 255))
    cfg = keys_config("mask_former_semantic", SIZE_DIVISIBILITY=size)
    sample = build_mapper(cfg, True)(dataset_dict)
    assert sample["image"].shape[1:] == sample["sem_seg"].shape == sample["instances"].gt_masks.shape[1:] == expected
    padding = sample["padding_mask"]
    assert int(padding.sum()) == expected[0] * expected[1] - 12 * 30
    assert (sample["image"][:, padding] == GREY).all()
    assert (sample["sem_seg"][padding] == IGNORE).all()
    assert sample["instances"].gt_masks.sum(dim=(1, 2)).tolist() == [120, 120]
    assert np.array_equal(
        sample["image"][:, :12, :30].numpy().transpose(1, 2, 0), read_image(dataset_dict["file_name"])
    )


def test_size_divisibility_pads_instances_and_segments(tmp_path: Path) -> None:
    whole = rle_of(np.ones((40, 60), dtype=bool), True)
    sample = build_mapper(keys_config("mask_former_instance", SIZE_DIVISIBILITY=64), True)(
        instance_dict(tmp_path, [whole, [[5.0, 5, 50, 8, 20, 35]]])
    )
    assert torch.equal(sample["instances"].gt_masks[0], ~sample["padding_mask"])
    dataset_dict, ids = blobs(tmp_path, 90, 110)
    sample = build_mapper(keys_config("mask_former_panoptic", SIZE_DIVISIBILITY=128), True)(dataset_dict)
    assert sample["instances"].gt_masks.shape == (4, 128, 128)
    assert int(sample["instances"].gt_masks.sum()) == ids.size
    assert "sem_seg" not in sample  # the picture has no label map
    with pytest.raises(ValueError, match="divisor"):
        PadToMultiple(0)


def test_crop_keys(tmp_path: Path) -> None:
    dataset_dict = semantic_dict(tmp_path, stripes(1, 2, 3))
    crop = {"CROP__ENABLED": True, "CROP__TYPE": "absolute", "CROP__SIZE": [8, 11]}
    sample = build_mapper(keys_config("mask_former_semantic", **crop), True)(dataset_dict)
    assert sample["image"].shape == (3, 8, 11) and sample["sem_seg"].shape == (8, 11)
    crop = {"CROP__ENABLED": True, "CROP__TYPE": "relative", "CROP__SIZE": [0.5, 0.5]}
    assert build_mapper(keys_config("mask_former_semantic", **crop), True)(dataset_dict)["image"].shape == (3, 6, 15)
    assert build_mapper(keys_config("mask_former_semantic"), True)(dataset_dict)["image"].shape == (3, 12, 30)


def test_single_category_max_area(tmp_path: Path) -> None:
    """Of 200 columns the last 20 have other classes; ignored pixels don't count."""
    labels = np.zeros((20, 200), dtype=np.uint8)
    labels[:, 180:190], labels[:, 190:] = 1, 255
    dataset_dict = semantic_dict(tmp_path, labels)
    crop = {"CROP__ENABLED": True, "CROP__TYPE": "absolute", "CROP__SIZE": [20, 20]}

    def shares(limit: float) -> list[float]:
        mapper = build_mapper(keys_config("mask_former_semantic", **crop, CROP__SINGLE_CATEGORY_MAX_AREA=limit), True)
        seed_everything(0)
        found = []
        for _ in range(60):
            areas = mapper(dataset_dict)["instances"].gt_masks.sum(dim=(1, 2))
            found.append(float(areas.max() / areas.sum()))
        return found

    # A crop has both classes in about one of nine places, so ten attempts find one about two times in three.
    assert np.mean(np.array(shares(1.0)) < 0.95) < 0.3
    assert np.mean(np.array(shares(0.95)) < 0.95) > 0.5


def test_single_category_max_area_needs_labels(tmp_path: Path) -> None:
    crop = {"CROP__ENABLED": True, "CROP__TYPE": "absolute", "CROP__SIZE": [20, 20]}
    crop["CROP__SINGLE_CATEGORY_MAX_AREA"] = 0.75
    dataset_dict, _ = blobs(tmp_path, 90, 110)
    with pytest.raises(UserError, match=r"SINGLE_CATEGORY_MAX_AREA is 0\.75, which needs semantic labels"):
        build_mapper(keys_config("mask_former_panoptic", **crop), True)(dataset_dict)
    # Instances have none, so the published mapper doesn't look at the key.
    sample = build_mapper(keys_config("mask_former_instance", **crop), True)(instance_dict(tmp_path, []))
    assert sample["image"].shape == (3, 20, 20)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_color_aug_ssd(image_format: str, tmp_path: Path) -> None:
    dataset_dict = semantic_dict(tmp_path, stripes(1, 2, 3))
    image = torch.from_numpy(read_image(dataset_dict["file_name"], image_format).transpose(2, 0, 1).copy())
    plain = build_mapper(keys_config("mask_former_semantic", FORMAT=image_format), True)
    assert torch.equal(plain(dataset_dict)["image"], image)
    colored = build_mapper(keys_config("mask_former_semantic", FORMAT=image_format, COLOR_AUG_SSD=True), True)
    seed_everything(4)
    sample = colored(dataset_dict)
    assert not torch.equal(sample["image"], image)
    assert np.array_equal(sample["sem_seg"].numpy(), stripes(1, 2, 3))
    seed_everything(4)
    red_first = sample["image"] if image_format == "RGB" else sample["image"].flip(0)
    reference = build_mapper(keys_config("mask_former_semantic", FORMAT="RGB", COLOR_AUG_SSD=True), True)
    assert torch.equal(red_first, reference(dataset_dict)["image"])


def test_flip_and_sizes_of_resize_and_crop() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    shapes, flipped = set(), 0
    for seed in range(40):
        seed_everything(seed)
        augmented = T.AugInput(image)
        T.AugmentationList(resize_and_crop(min_size=[30, 60], max_size=70))(augmented)
        shapes.add(augmented.image.shape[:2])
        flipped += bool(np.array_equal(augmented.image, image[:, ::-1]))
    assert shapes == {(30, 40), (53, 70)}  # the longer side is at most 70
    assert 5 < flipped < 20  # half of those that keep their size
    with pytest.raises(UserError, match="INPUT.RANDOM_FLIP is 'sideways', expected horizontal, vertical or none"):
        resize_and_crop(min_size=30, max_size=70, flip="sideways")


# ------------------------------------------------------------- quicker ways, beside those they stand for

QUICK = np.random.default_rng(3).integers(0, 256, (61, 83, 3), dtype=np.uint8)


def assert_nearly_equal(image: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for one grey level in a few pixels of a hundred: where rounding decides."""
    difference = np.abs(image.astype(int) - expected)
    assert image.shape == expected.shape and difference.max() <= 1 and (difference > 0).mean() < 0.02


def augmented_by(augmentations: Any, seed: int, image: np.ndarray, labels: np.ndarray | None) -> T.AugInput:
    seed_everything(seed)
    augmented = T.AugInput(image, sem_seg=labels)
    augmented.transforms = T.AugmentationList(augmentations)(augmented)
    return augmented


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_large_scale_jitter_is_detectron2s(dtype: Any) -> None:
    labels = np.random.default_rng(4).integers(0, 255, QUICK.shape[:2]).astype(dtype)
    theirs = [T.RandomFlip(), T.ResizeScale(0.1, 2.0, 96, 96), T.FixedSizeCrop((96, 96))]
    for seed in range(40):
        image = QUICK if seed % 2 else QUICK.transpose(1, 0, 2)
        ours = augmented_by(large_scale_jitter(image_size=96), seed, image, labels if seed % 2 else labels.T)
        expected = augmented_by(theirs, seed, image, labels if seed % 2 else labels.T)
        assert_nearly_equal(ours.image, expected.image)
        assert ours.sem_seg.dtype == dtype and np.array_equal(ours.sem_seg, expected.sem_seg)
        points = np.random.default_rng(seed).uniform(-5, 100, (9, 2))
        moved = ours.transforms.apply_coords(points.copy())
        assert np.allclose(moved, expected.transforms.apply_coords(points.copy()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("area", [0.3, 0.75, 1.0])
def test_resize_and_crop_is_detectron2s(area: float) -> None:
    labels = np.random.default_rng(5).integers(0, 4, (6, 8)).repeat(11, axis=0).repeat(11, axis=1)[:61, :83]
    labels = np.where(labels == 3, IGNORE, labels).astype(np.float64)
    theirs = [
        T.ResizeShortestEdge([30, 61, 100, 122], 150, "choice"),
        T.RandomCrop_CategoryAreaConstraint("absolute", (50, 60), area, IGNORE),
    ]
    ours = resize_and_crop(
        min_size=[30, 61, 100, 122],
        max_size=150,
        crop_type="absolute",
        crop_size=(50, 60),
        single_category_max_area=area,
    )
    for seed in range(40):
        found, expected = (augmented_by(a, seed, QUICK, labels) for a in (ours[:1], theirs))
        assert_nearly_equal(found.image, expected.image)
        assert np.array_equal(found.sem_seg, expected.sem_seg)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_colors_are_detectron2s_to_the_bit(image_format: str) -> None:
    for seed in range(60):
        seed_everything(seed)
        ours = ColorAugSSD(image_format).apply_image(QUICK)
        seed_everything(seed)
        assert np.array_equal(ours, ColorAugSSDTransform(image_format).apply_image(QUICK))


def test_other_pictures_are_resized_in_turn() -> None:
    resize, crop = T.ResizeTransform(61, 83, 122, 150), T.CropTransform(20, 30, 64, 48)
    for image in (QUICK[:, :, :1], QUICK.astype(np.float32), QUICK[:, :, 0]):
        expected = crop.apply_image(resize.apply_image(image))
        assert np.array_equal(ResizedCrop(resize, crop).apply_image(image), expected)


@pytest.mark.parametrize("scale", [0.3, 1.7])
def test_polygons_are_filled_in_their_window_as_in_the_whole_picture(scale: float, shared_data: Path) -> None:
    coco = json.loads((shared_data / "coco/annotations/instances_val2017.json").read_text())
    checked = 0
    for annotation in coco["annotations"][:150]:
        if annotation["iscrowd"]:
            continue
        rings = [np.reshape(polygon, (-1, 2)) * scale - (150, 70) for polygon in annotation["segmentation"]]
        mask = np.zeros((300, 400), dtype=bool)
        _fill_polygons([[ring] for ring in rings], mask)
        whole = coco_mask.decode(coco_mask.frPyObjects([ring.ravel() for ring in rings], 300, 400)).any(axis=2)
        assert np.count_nonzero(mask != whole) <= 2  # where a coordinate is halfway between two of COCO's grid
        checked += whole.any()
    assert checked > 20


def test_more_segments_than_numbers_of_one_byte(tmp_path: Path) -> None:
    ids = np.arange(1, 601, dtype=np.uint32).reshape(20, 30) * 977
    segments = [{"id": int(i), "category_id": 0, "iscrowd": 0} for i in ids.ravel()]
    picture = np.zeros((20, 30, 3), dtype=np.uint8)
    for count in (254, 255, 600):
        sample = plain_mapper(read_panoptic, [T.FixedSizeCrop((32, 32))])(
            panoptic_dict(tmp_path, ids, segments[:count], picture)
        )
        masks = sample["instances"].gt_masks
        assert masks.shape == (count, 32, 32) and (masks.sum(dim=(1, 2)) == 1).all()
        assert torch.equal(masks[:, :20, :30].flatten(1).float().argmax(dim=1), torch.arange(count))


# ---------------------------------------------------------------------------------------------- microscopy


def blobs(folder: Path, height: int, width: int) -> tuple[dict[str, Any], np.ndarray]:
    """A picture whose grey value is 60 times the segment's number, and its panoptic annotation."""
    y, x = np.mgrid[:height, :width]
    ids = np.full((height, width), 1, dtype=np.uint32)
    ids[(y - 20) ** 2 + (x - 25) ** 2 < 150] = 2
    ids[(y > 30) & (x > 40) & (x < 60)] = 3
    ids[(y > height - 25) & (x > width - 40)] = 4
    image = np.repeat((ids * 60).astype(np.uint8)[:, :, None], 3, axis=2)
    segments = [{"id": i, "category_id": i - 1, "iscrowd": 0} for i in range(1, 5)]
    return panoptic_dict(folder, ids, segments, image), ids


@pytest.mark.parametrize("seed", range(8))
def test_microscopy_labels_follow_the_picture(seed: int, tmp_path: Path) -> None:
    dataset_dict, _ = blobs(tmp_path, 90, 110)
    geometry = microscopy(image_size=64, min_scale=1, max_scale=1)[:-1]
    seed_everything(seed)
    sample = plain_mapper(read_panoptic, geometry)(dataset_dict)
    assert sample["image"].shape == (3, 64, 64)
    for label, mask in zip(sample["instances"].gt_classes, sample["instances"].gt_masks, strict=True):
        assert torch.equal(mask, sample["image"][0] == 60 * (label + 1))


@pytest.mark.parametrize("seed", range(8))
def test_microscopy_enlarged_labels_follow_the_picture(seed: int, tmp_path: Path) -> None:
    dataset_dict, _ = blobs(tmp_path, 90, 110)
    geometry = microscopy(image_size=160, min_scale=1.5, max_scale=3)[:-1]
    seed_everything(seed)
    sample = plain_mapper(read_panoptic, geometry)(dataset_dict)
    painted = torch.full((160, 160), 128.0)
    for label, mask in zip(sample["instances"].gt_classes, sample["instances"].gt_masks, strict=True):
        painted[mask] = 60.0 * (label + 1)
    assert (painted - sample["image"][0]).abs().gt(30).float().mean() < 0.02  # edges are smooth in the picture


def test_microscopy_padding_is_neither_background_nor_object(tmp_path: Path) -> None:
    dataset_dict, ids = blobs(tmp_path, 90, 110)
    sample = plain_mapper(read_panoptic, microscopy(image_size=256, min_scale=2, max_scale=2))(dataset_dict)
    padding = sample["padding_mask"]
    assert int(padding.sum()) == 256 * 256 - 4 * ids.size
    assert torch.equal(sample["instances"].gt_masks.any(dim=0), ~padding)


def test_scales_are_drawn_from_the_whole_range() -> None:
    image = np.zeros((300, 300, 3), dtype=np.uint8)
    crop = RandomScaledCrop(64, 1.5, 3)
    np.random.seed(0)
    scales = [64 / crop.get_transform(image).transforms[0].w for _ in range(400)]
    assert 1.48 < min(scales) < 1.55 and 2.9 < max(scales) < 3.05
    assert np.mean(np.log(scales)) == pytest.approx(np.log(np.sqrt(1.5 * 3)), abs=0.03)
    with pytest.raises(ValueError, match="min_scale"):
        RandomScaledCrop(64, 2, 1)


def test_color_curve_keeps_order_or_inverts_it() -> None:
    ramp = np.repeat(np.arange(0, 250, 10, dtype=np.uint8)[None, :, None], 3, axis=2)
    keep, invert = RandomColorCurve(invert_probability=0), RandomColorCurve(invert_probability=1)
    np.random.seed(0)
    for _ in range(20):
        assert (np.diff(keep.get_transform(ramp).apply_image(ramp).astype(int), axis=1) >= 0).all()
        assert (np.diff(invert.get_transform(ramp).apply_image(ramp).astype(int), axis=1) <= 0).all()
    nothing = RandomColorCurve(1, 0, 0, 0, 0).get_transform(ramp)
    assert np.array_equal(nothing.apply_image(ramp), ramp)
