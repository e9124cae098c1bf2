"""The one dataset mapper: from a dataset dict to a sample the model takes.

What differs between the published mappers, the augmentations and the kind of annotation, is injected; their
names, as in ``INPUT.DATASET_MAPPER_NAME``, are the rows of ``MAPPERS``.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from ..errors import UserError
from .annotations import AnnotationReader, read_instances, read_panoptic
from .augmentation import build_test_augmentations, large_scale_jitter, microscopy
from .images import read_image

__all__ = [
    "MAPPERS",
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MapperRow",
    "MaskFormerDatasetMapper",
    "build_mapper",
]


@dataclass(frozen=True)
class MapperRow:
    """What one name of ``INPUT.DATASET_MAPPER_NAME`` stands for in training."""

    augmentations: Callable[[CfgNode], list[T.Augmentation]]
    annotation_reader: AnnotationReader


MAPPERS: dict[str, MapperRow] = {
    "coco_instance_lsj": MapperRow(large_scale_jitter, read_instances),
    "coco_panoptic_lsj": MapperRow(large_scale_jitter, read_panoptic),
    "microscopy_panoptic": MapperRow(microscopy, read_panoptic),
}

# Left out of training samples, which have the augmented targets instead.
_ANNOTATION_KEYS = {"annotations", "pan_seg_file_name", "segments_info", "sem_seg_file_name"}
# Left out of test samples, as Detectron2's mapper does.
_TEST_ANNOTATION_KEYS = {"annotations", "sem_seg_file_name"}


class MaskFormerDatasetMapper:
    """Callable that turns a dataset dict in Detectron2's format into a sample.

    A sample has ``image``, (3, H, W) uint8 in the order of ``image_format``, and what the dataset dict says about the
    picture (``file_name``, ``image_id``, and ``height`` and ``width`` of the picture as it is on disk). In training it
    also has ``padding_mask``, (H, W) bool, True = padding, and ``instances`` with ``gt_classes`` (N) int64,
    ``gt_masks`` (N, H, W) bool tensor and ``gt_boxes`` (XYXY, in pixels, around the masks). Objects that the crop
    removed are left out.

    Built from a config, ``MaskFormerDatasetMapper(cfg, is_train)``, or from keyword values.
    """

    # The row of ``MAPPERS`` that a subclass stands for; None: the one that the config names.
    row: str | None = None

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        annotation_reader: AnnotationReader | None = None,
    ) -> None:
        """``annotation_reader`` (see ``mask2former.data.annotations``) is needed in training only."""
        if is_train and annotation_reader is None:
            raise ValueError("a mapper for training needs an annotation_reader, got None")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.annotation_reader = annotation_reader
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info(f"Augmentations used in {mode}: {self.augmentations}")

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Keyword values for the mapper that ``cfg`` names, or for inference if not ``is_train``."""
        if not is_train:
            return {
                "is_train": False,
                "augmentations": build_test_augmentations(cfg),
                "image_format": cfg.INPUT.FORMAT,
            }
        name = cls.row or cfg.INPUT.DATASET_MAPPER_NAME
        if name not in MAPPERS:
            raise UserError(f"INPUT.DATASET_MAPPER_NAME is '{name}', expected one of {', '.join(sorted(MAPPERS))}")
        row = MAPPERS[name]
        return {
            "is_train": True,
            "augmentations": row.augmentations(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "annotation_reader": row.annotation_reader,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Make a sample; ``dataset_dict`` is left as it is.

        Raises ``UserError`` if the picture or its annotation can't be read, or their sizes differ.
        """
        image = read_image(dataset_dict["file_name"], self.image_format)
        dataset_dict = _with_size(dataset_dict, image)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)

        left_out = _ANNOTATION_KEYS if self.is_train else _TEST_ANNOTATION_KEYS
        sample = {key: value for key, value in dataset_dict.items() if key not in left_out}
        sample["image"] = torch.from_numpy(augmented.image.transpose(2, 0, 1).copy())
        if self.annotation_reader is not None and self.is_train:
            padding = transforms.apply_segmentation(np.ones(image.shape[:2], dtype=np.uint8)) != 1
            sample["padding_mask"] = torch.from_numpy(padding)
            sample["instances"] = _make_instances(*self.annotation_reader(dataset_dict, transforms, padding))
        return sample


def _with_size(dataset_dict: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
    """The dataset dict with ``height`` and ``width`` of the picture, which must agree with those it has."""
    height, width = image.shape[:2]
    expected_height, expected_width = dataset_dict.get("height", height), dataset_dict.get("width", width)
    if (height, width) != (expected_height, expected_width):
        raise UserError(
            f"picture '{dataset_dict['file_name']}' is {width} x {height} pixels, but its annotation says "
            f"{expected_width} x {expected_height}: correct width and height, or use the picture that was annotated"
        )
    return {**dataset_dict, "height": height, "width": width}


def _make_instances(classes: np.ndarray, masks: np.ndarray) -> Instances:
    """``Instances`` of the masks (N, H, W) that are not empty."""
    columns = np.any(masks, axis=1)  # (N, W)
    keep = np.any(columns, axis=1)
    if not keep.all():
        classes, masks, columns = classes[keep], masks[keep], columns[keep]
    rows = np.any(masks, axis=2)  # (N, H)
    boxes = np.stack([*_extent(columns), *_extent(rows)], axis=1)[:, [0, 2, 1, 3]].astype(np.float32)

    instances = Instances(masks.shape[1:])
    instances.gt_classes = torch.from_numpy(classes)
    instances.gt_masks = torch.from_numpy(masks)
    instances.gt_boxes = Boxes(torch.from_numpy(boxes))
    return instances


def _extent(occupied: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First True along the last axis of (N, L), and one past the last."""
    return occupied.argmax(axis=1), occupied.shape[1] - occupied[:, ::-1].argmax(axis=1)


class COCOInstanceNewBaselineDatasetMapper(MaskFormerDatasetMapper):
    """``coco_instance_lsj`` under its published class name: ``COCOInstanceNewBaselineDatasetMapper(cfg, is_train)``."""

    row = "coco_instance_lsj"


class COCOPanopticNewBaselineDatasetMapper(MaskFormerDatasetMapper):
    """``coco_panoptic_lsj`` under its published class name: ``COCOPanopticNewBaselineDatasetMapper(cfg, is_train)``."""

    row = "coco_panoptic_lsj"


def build_mapper(cfg: CfgNode, is_train: bool = True) -> MaskFormerDatasetMapper:
    """The mapper that ``INPUT.DATASET_MAPPER_NAME`` names, or the one for inference.

    Raises ``UserError`` for a name that is no row of ``MAPPERS``.
    """
    return MaskFormerDatasetMapper(cfg, is_train)
