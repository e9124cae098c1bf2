"""The one dataset mapper: from a dataset dict to a sample the model takes.

What differs between the published mappers, the augmentations and the kind of annotation, is injected; their
names, as in ``INPUT.DATASET_MAPPER_NAME``, are the rows of ``MAPPERS``.
"""

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from ..errors import UserError
from .annotations import AnnotationReader, read_instances, read_panoptic, read_semantic
from .augmentation import PadToMultiple, build_test_augmentations, large_scale_jitter, microscopy, resize_and_crop
from .images import read_image, read_label_map

__all__ = [
    "MAPPERS",
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MapperRow",
    "MaskFormerDatasetMapper",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "build_mapper",
]


Augmentations = Sequence[T.Augmentation | T.Transform]


@dataclass(frozen=True)
class MapperRow:
    """What one name of ``INPUT.DATASET_MAPPER_NAME`` stands for in training.

    ``label_map``: semantic labels are read too, where there are any. ``pads``: ``INPUT.SIZE_DIVISIBILITY`` is obeyed.
    """

    augmentations: Callable[[CfgNode], Augmentations]
    annotation_reader: AnnotationReader
    label_map: bool = False
    pads: bool = False


def _resize_and_crop_anywhere(cfg: CfgNode) -> Augmentations:
    """Instance annotations have no label for each pixel that ``SINGLE_CATEGORY_MAX_AREA`` could be counted in."""
    return resize_and_crop(cfg, single_category_max_area=1.0)


MAPPERS: dict[str, MapperRow] = {
    "mask_former_semantic": MapperRow(resize_and_crop, read_semantic, label_map=True, pads=True),
    "mask_former_instance": MapperRow(_resize_and_crop_anywhere, read_instances, pads=True),
    "mask_former_panoptic": MapperRow(resize_and_crop, read_panoptic, label_map=True, pads=True),
    "coco_instance_lsj": MapperRow(large_scale_jitter, read_instances),
    "coco_panoptic_lsj": MapperRow(large_scale_jitter, read_panoptic),
    # Ours: every family of augmentations for every kind of annotation.
    "coco_semantic_lsj": MapperRow(large_scale_jitter, read_semantic, label_map=True),
    "microscopy_instance": MapperRow(microscopy, read_instances),
    "microscopy_panoptic": MapperRow(microscopy, read_panoptic),
    "microscopy_semantic": MapperRow(microscopy, read_semantic, label_map=True),
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
    removed are left out. With ``label_map``, and where the picture has one, ``sem_seg`` is its labels, (H, W) int64.

    Built from a config, ``MaskFormerDatasetMapper(cfg, is_train)``, or from keyword values.
    """

    # The row of ``MAPPERS`` that a subclass stands for; None: the one that the config names.
    row: str | None = None

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: Augmentations,
        image_format: str,
        annotation_reader: AnnotationReader | None = None,
        label_map: bool = False,
        ignore_label: int = 255,
        num_labels: int | None = None,
        size_divisibility: int = -1,
    ) -> None:
        """What training alone needs comes after ``image_format``.

        Args:
            augmentations: run one after the other, on the label map too.
            image_format: "RGB" or "BGR", see ``read_image``.
            annotation_reader: makes the masks; see ``mask2former.data.annotations``.
            label_map: read the semantic labels (``sem_seg_file_name``) where there are any.
            ignore_label: what means "no label" in label maps; padding gets it.
            num_labels: other labels from this on are errors (None: not checked).
            size_divisibility: pictures are padded to multiples of this many pixels at last (-1: they are not).
        """
        if is_train and annotation_reader is None:
            raise ValueError("a mapper for training needs an annotation_reader, got None")
        padding = [PadToMultiple(size_divisibility)] if is_train and size_divisibility > 0 else []
        self.is_train = is_train
        self.augmentations = T.AugmentationList([*augmentations, *padding])
        self.image_format = image_format
        self.annotation_reader = annotation_reader
        self.label_map = label_map
        self.ignore_label = ignore_label
        self.num_labels = num_labels
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
            "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY if row.pads else -1,
            **(_label_values(cfg) if row.label_map else {}),
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Make a sample; ``dataset_dict`` is left as it is.

        Raises ``UserError`` if the picture or its annotation can't be read, their sizes differ, or a label is none.
        """
        image = read_image(dataset_dict["file_name"], self.image_format)
        dataset_dict = _with_size(dataset_dict, image)
        augmented = T.AugInput(image, sem_seg=self._read_labels(dataset_dict))
        transforms = self.augmentations(augmented)

        left_out = _ANNOTATION_KEYS if self.is_train else _TEST_ANNOTATION_KEYS
        sample = {key: value for key, value in dataset_dict.items() if key not in left_out}
        sample["image"] = torch.from_numpy(augmented.image.transpose(2, 0, 1).copy())
        if self.annotation_reader is not None and self.is_train:
            padding = transforms.apply_segmentation(np.ones(image.shape[:2], dtype=np.uint8)) != 1
            sample["padding_mask"] = torch.from_numpy(padding)
            if augmented.sem_seg is not None:
                labels = self._mark_unlabelled(augmented.sem_seg, padding, dataset_dict)
                dataset_dict["sem_seg"] = labels
                sample["sem_seg"] = torch.from_numpy(np.where(labels < 0, self.ignore_label, labels))
            sample["instances"] = _make_instances(*self.annotation_reader(dataset_dict, transforms, padding))
        return sample

    def _read_labels(self, dataset_dict: dict[str, Any]) -> np.ndarray | None:
        """The picture's label map, (H, W) float64, or None."""
        if not (self.is_train and self.label_map and "sem_seg_file_name" in dataset_dict):
            return None
        path = dataset_dict["sem_seg_file_name"]
        # Detectron2 resizes these by another rule than uint8, and the published mappers do so.
        labels = read_label_map(path, np.float64)
        height, width = dataset_dict["height"], dataset_dict["width"]
        if labels.shape != (height, width):
            raise UserError(
                f"label map '{path}' is {labels.shape[1]} x {labels.shape[0]} pixels, but its picture "
                f"'{dataset_dict['file_name']}' is {width} x {height}: make the label map anew from the right picture"
            )
        return labels

    def _mark_unlabelled(self, labels: np.ndarray, padding: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """The labels (H, W) as int64, with -1 where there is none."""
        marked = np.where(padding | (labels == self.ignore_label), -1, labels).astype(np.int64)
        largest = marked.max(initial=-1)
        if self.num_labels is not None and largest >= self.num_labels:
            raise UserError(
                f"label map '{dataset_dict['sem_seg_file_name']}' has the label {largest}, expected 0 to "
                f"{self.num_labels - 1} or {self.ignore_label} (ignored)"
            )
        return marked


def _label_values(cfg: CfgNode) -> dict[str, Any]:
    """What the label maps of the first training set have in them: the metadata tells."""
    name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else None
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog else None
    expected = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    ignore_label = getattr(metadata, "ignore_label", expected)
    if ignore_label != expected:
        logging.getLogger(__name__).warning(
            "MODEL.SEM_SEG_HEAD.IGNORE_VALUE is %d, but data set '%s' marks pixels without a label by %d: set it so",
            expected,
            name,
            ignore_label,
        )
    classes = getattr(metadata, "stuff_classes", None)
    return {
        "label_map": True,
        "ignore_label": ignore_label,
        "num_labels": None if classes is None else len(classes),
    }


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
    # The maximum of bytes is what NumPy finds fastest, many at a time.
    columns = masks.view(np.uint8).max(axis=1, initial=0).view(bool)  # (N, W)
    keep = np.any(columns, axis=1)
    if not keep.all():
        classes, masks, columns = classes[keep], masks[keep], columns[keep]
    rows = masks.view(np.uint8).max(axis=2, initial=0).view(bool)  # (N, H)
    boxes = np.stack([*_extent(columns), *_extent(rows)], axis=1)[:, [0, 2, 1, 3]].astype(np.float32)

    instances = Instances(masks.shape[1:])
    instances.gt_classes = torch.from_numpy(classes)
    instances.gt_masks = torch.from_numpy(masks)
    instances.gt_boxes = Boxes(torch.from_numpy(boxes))
    return instances


def _extent(occupied: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First True along the last axis of (N, L), and one past the last."""
    return occupied.argmax(axis=1), occupied.shape[1] - occupied[:, ::-1].argmax(axis=1)


class MaskFormerSemanticDatasetMapper(MaskFormerDatasetMapper):
    """``mask_former_semantic`` under its published class name: ``MaskFormerSemanticDatasetMapper(cfg, is_train)``."""

    row = "mask_former_semantic"


class MaskFormerInstanceDatasetMapper(MaskFormerDatasetMapper):
    """``mask_former_instance`` under its published class name: ``MaskFormerInstanceDatasetMapper(cfg, is_train)``."""

    row = "mask_former_instance"


class MaskFormerPanopticDatasetMapper(MaskFormerDatasetMapper):
    """``mask_former_panoptic`` under its published class name: ``MaskFormerPanopticDatasetMapper(cfg, is_train)``."""

    row = "mask_former_panoptic"


class COCOInstanceNewBaselineDatasetMapper(MaskFormerDatasetMapper):
    """``coco_instance_lsj`` under its published class name: ``COCOInstanceNewBaselineDatasetMapper(cfg, is_train)``."""

    row = "coco_instance_lsj"


class COCOPanopticNewBaselineDatasetMapper(MaskFormerDatasetMapper):
    """``coco_panoptic_lsj`` under its published class name: ``COCOPanopticNewBaselineDatasetMapper(cfg, is_train)``."""

    row = "coco_panoptic_lsj"


def build_mapper(cfg: CfgNode, is_train: bool = True) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The mapper that ``INPUT.DATASET_MAPPER_NAME`` names, or the one for inference.

    A name that is no row of ``MAPPERS`` stands for Detectron2's own mapper, as in the published code, with a warning.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if is_train and name not in MAPPERS:
        similar = difflib.get_close_matches(name, MAPPERS, n=3)
        logging.getLogger(__name__).warning(
            "INPUT.DATASET_MAPPER_NAME '%s' is not known%s: Detectron2's default mapper is used (known: %s)",
            name,
            f" (did you mean {' or '.join(similar)}?)" if similar else "",
            ", ".join(sorted(MAPPERS)),
        )
        return DatasetMapper(cfg, True)
    return MaskFormerDatasetMapper(cfg, is_train)
