#!/usr/bin/env python
"""How many pictures a second one worker makes, beside the published way of making the same samples.

The published way: Detectron2's transforms on the whole picture one after the other, and one mask at a time. Both run
in this process on one thread, picture by picture in turn, with the same seeds; a sample that differs is an error.

examples (DETECTRON2_DATASETS names the folder with the data sets):
  python benchmarks/mappers.py
  python benchmarks/mappers.py --mappers coco_instance_lsj --rounds 9 --json mappers.json
  python benchmarks/mappers.py --mappers mask_former_semantic --dataset ade20k_sem_seg_train
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import detectron2
import numpy as np
import PIL
import pycocotools.mask as coco_mask
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from detectron2.structures import BitMasks, Boxes, Instances
from machine import describe
from tabulate import tabulate
from torch.nn import functional as F

from mask2former.data import build_mapper
from mask2former.engine import load_config
from mask2former.errors import UserError, command

Sample = dict[str, Any]
Mapper = Callable[[dict[str, Any]], Sample]

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    machine = describe(
        threads=[1],
        numpy=np.__version__,
        pillow=PIL.__version__,
        opencv=cv2.__version__,
        detectron2=detectron2.__version__,
    )
    results = {name: _compare(name, args) for name in args.mappers}
    print(tabulate([_row(name, result) for name, result in results.items()], headers=HEADERS, floatfmt=".1f"))
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    if args.json:
        content = {"machine": machine, "mappers": {name: asdict(result) for name, result in results.items()}}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mappers", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--dataset", metavar="NAME", help="registered data set; default: COCO's, see the table CASES")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=30, metavar="N", help="in a round; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    args = parser.parse_args(arguments)
    for option in ("rounds", "pictures"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} is {getattr(args, option)}, expected at least 1")
    return args


# ------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Result:
    """What was measured on one data set: pictures a second, in each round."""

    dataset: str
    pictures: int
    ours: list[float]
    published: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as many pictures as the published way, in each round."""
        return [ours / published for ours, published in zip(self.ours, self.published, strict=True)]


HEADERS = ["mapper", "pictures", "ours /s", "published /s", "ratio: median", "min", "max"]


def _row(name: str, result: Result) -> list[Any]:
    ratios = [f"{value(result.ratios):.2f}" for value in (statistics.median, min, max)]
    return [name, result.pictures, statistics.median(result.ours), statistics.median(result.published), *ratios]


def _compare(name: str, args: argparse.Namespace) -> Result:
    case = CASES[name]
    dataset = args.dataset or case.dataset
    cfg = load_config(str(CONFIGS / case.config), ["DATASETS.TRAIN", (dataset,)])
    dicts = [{k: v for k, v in d.items() if k in case.keys} for d in _load(dataset)[: args.pictures]]
    missing = case.annotation_keys - set.intersection(*(set(d) for d in dicts))
    if missing:
        raise UserError(f"data set '{dataset}' has no {', '.join(sorted(missing))}, which {name} reads")
    ours, published = build_mapper(cfg, True), case.published(cfg)

    rates = []
    for round_number in range(args.rounds):
        seconds = np.zeros(2)
        for index, dataset_dict in enumerate(dicts):
            seed = round_number * len(dicts) + index
            order = (0, 1) if seed % 2 else (1, 0)  # what runs second finds the files in the cache
            samples: dict[int, Sample] = {}
            for which in order:
                samples[which], spent = _timed((ours, published)[which], dataset_dict, seed)
                seconds[which] += spent
            _check_equal(samples[0], samples[1], f"{name}, '{dataset_dict['file_name']}', seed {seed}")
        rates.append(len(dicts) / seconds)
    return Result(dataset, len(dicts), *np.transpose(rates).tolist())


def _load(dataset: str) -> list[dict[str, Any]]:
    try:
        dicts = DatasetCatalog.get(dataset)
    except (KeyError, FileNotFoundError) as error:
        raise UserError(f"data set '{dataset}' can't be loaded: {error}; is DETECTRON2_DATASETS right?") from error
    if not dicts:
        raise UserError(f"data set '{dataset}' has no pictures")
    return dicts


def _timed(mapper: Mapper, dataset_dict: dict[str, Any], seed: int) -> tuple[Sample, float]:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    sample = mapper(dataset_dict)
    return sample, time.perf_counter() - start


def _check_equal(ours: Sample, published: Sample, what: str) -> None:
    """Same size, channel means within 0.5, same (class, area) but for 8 pixels + 1 %; empty masks don't count."""
    assert ours["image"].shape == published["image"].shape, what
    means, expected_means = (sample["image"].float().mean(dim=(1, 2)) for sample in (ours, published))
    assert (means - expected_means).abs().max() < 0.5, f"{what}: channel means {means}, expected {expected_means}"
    found, expected = _classes_and_areas(ours), _classes_and_areas(published)
    assert len(found) == len(expected), f"{what}: {len(found)} masks, expected {len(expected)}"
    for (label, area), (expected_label, expected_area) in zip(found, expected, strict=True):
        assert label == expected_label, f"{what}: class {label}, expected {expected_label}"
        assert abs(area - expected_area) <= 8 + 0.01 * expected_area, f"{what}: area {area}, expected {expected_area}"


def _classes_and_areas(sample: Sample) -> list[tuple[int, int]]:
    instances = sample["instances"]
    areas = instances.gt_masks.sum(dim=(1, 2)).tolist()
    return sorted(pair for pair in zip(instances.gt_classes.tolist(), areas, strict=True) if pair[1])


# ----------------------------------------------------------------------------------- the published way


def _jitter(cfg: CfgNode) -> list[T.Augmentation]:
    size = cfg.INPUT.IMAGE_SIZE
    return [
        T.RandomFlip(),
        T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, size, size),
        T.FixedSizeCrop((size, size)),
    ]


def published_instances(cfg: CfgNode) -> Mapper:
    """Polygons are cut at the crop's border by Detectron2, then each object is filled at the crop's full size."""
    augmentations = _jitter(cfg)

    def mapper(given: dict[str, Any]) -> Sample:
        sample = copy.deepcopy(given)
        picture = _read_picture(sample, cfg)
        image, transforms = T.apply_transform_gens(augmentations, picture)
        inside = transforms.apply_segmentation(np.ones(picture.shape[:2]))
        size = image.shape[:2]
        moved = [
            detection_utils.transform_instance_annotations(annotation, transforms, size)
            for annotation in sample.pop("annotations")
            if not annotation.get("iscrowd", 0)
        ]
        instances = detection_utils.annotations_to_instances(moved, size)
        if moved:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
            instances = detection_utils.filter_empty_instances(instances)
            filled = [
                torch.as_tensor(coco_mask.decode(coco_mask.frPyObjects(polygons, *size))).any(dim=2)
                for polygons in instances.gt_masks.polygons
            ]
            instances.gt_masks = torch.stack(filled) if filled else torch.zeros(0, *size)
        else:
            instances.gt_masks = torch.zeros(0, *size)
        padding = torch.as_tensor(~inside.astype(bool))
        return {**sample, "image": _channels_first(image), "padding_mask": padding, "instances": instances}

    return mapper


def published_panoptic(cfg: CfgNode) -> Mapper:
    """The PNG's three channels are transformed, then each segment is looked for in the ids."""
    augmentations = _jitter(cfg)

    def mapper(given: dict[str, Any]) -> Sample:
        sample = copy.deepcopy(given)
        image, transforms = T.apply_transform_gens(augmentations, _read_picture(sample, cfg))
        colors = detection_utils.read_image(sample.pop("pan_seg_file_name"), "RGB")
        red, green, blue = np.moveaxis(transforms.apply_segmentation(colors).astype(np.int32), 2, 0)
        ids = red + 256 * green + 256 * 256 * blue
        segments = [segment for segment in sample["segments_info"] if not segment["iscrowd"]]
        classes = [segment["category_id"] for segment in segments]
        instances = _to_instances(classes, [ids == segment["id"] for segment in segments], ids.shape)
        return {**sample, "image": _channels_first(image), "instances": instances}

    return mapper


def published_semantic(cfg: CfgNode) -> Mapper:
    """Labels are floating-point numbers until after the crop, and each class in it is looked for."""
    crop, ignore_label = cfg.INPUT.CROP, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    augmentations = [
        T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING),
        T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, ignore_label),
        ColorAugSSDTransform(cfg.INPUT.FORMAT),
        T.RandomFlip(),
    ]

    def mapper(given: dict[str, Any]) -> Sample:
        sample = copy.deepcopy(given)
        picture = _read_picture(sample, cfg)
        labels = detection_utils.read_image(sample.pop("sem_seg_file_name")).astype(np.float64)
        augmented = T.AugInput(picture, sem_seg=labels)
        T.apply_transform_gens(augmentations, augmented)
        height, width = (max(0, cfg.INPUT.SIZE_DIVISIBILITY - length) for length in augmented.image.shape[:2])
        padding = (0, width, 0, height)
        image = F.pad(_channels_first(augmented.image), padding, value=128)
        labels = F.pad(torch.as_tensor(augmented.sem_seg.astype(np.int64)), padding, value=ignore_label).numpy()
        classes = [label for label in np.unique(labels) if label != ignore_label]
        instances = _to_instances(classes, [labels == label for label in classes], labels.shape)
        return {**sample, "image": image, "sem_seg": torch.from_numpy(labels), "instances": instances}

    return mapper


def _read_picture(sample: Sample, cfg: CfgNode) -> np.ndarray:
    image = detection_utils.read_image(sample["file_name"], format=cfg.INPUT.FORMAT)
    detection_utils.check_image_size(sample, image)
    return image


def _channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _to_instances(classes: list[int], masks: list[np.ndarray], size: tuple[int, ...]) -> Instances:
    instances = Instances(size)
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        bit_masks = BitMasks(torch.stack([torch.from_numpy(mask.copy()) for mask in masks]))
        instances.gt_masks, instances.gt_boxes = bit_masks.tensor, bit_masks.get_bounding_boxes()
    else:
        instances.gt_masks, instances.gt_boxes = torch.zeros(0, *size), Boxes(torch.zeros(0, 4))
    return instances


@dataclass(frozen=True)
class Case:
    """A mapper, the recipe that it is measured with, and what it reads of a dataset dict besides the picture."""

    published: Callable[[CfgNode], Mapper]
    config: str
    dataset: str
    annotation_keys: frozenset[str]

    @property
    def keys(self) -> frozenset[str]:
        """What the mapper is given of a dataset dict."""
        return self.annotation_keys | {"file_name", "image_id", "height", "width"}


CASES = {
    "coco_instance_lsj": Case(
        published_instances,
        "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
        "coco_2017_train",
        frozenset({"annotations"}),
    ),
    "coco_panoptic_lsj": Case(
        published_panoptic,
        "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
        "coco_2017_train_panoptic",
        frozenset({"pan_seg_file_name", "segments_info"}),
    ),
    "mask_former_semantic": Case(
        published_semantic,
        "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml",
        "coco_2017_train_panoptic_with_sem_seg",
        frozenset({"sem_seg_file_name"}),
    ),
}


if __name__ == "__main__":
    command(main)
