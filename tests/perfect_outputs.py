"""Model outputs that equal the ground truth, for tests of what comes after a model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BitMasks, Instances
from PIL import Image

__all__ = ["decode", "make_instances", "perfect_instances", "perfect_panoptic", "perfect_semantic", "read_segment_ids"]


def make_instances(masks: torch.Tensor, classes: Sequence[int], scores: Sequence[float]) -> Instances:
    """An "instances" output of (N, H, W) bool masks, with boxes around them."""
    instances = Instances(tuple(masks.shape[1:]))
    instances.pred_masks = masks
    instances.pred_boxes = BitMasks(masks).get_bounding_boxes()
    instances.pred_classes = torch.as_tensor(classes, dtype=torch.int64)
    instances.scores = torch.as_tensor(scores, dtype=torch.float32)
    return instances


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(H, W) bool mask of polygons, or of a compressed or plain RLE."""
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(segmentation).astype(bool)


def perfect_instances(record: dict[str, Any]) -> Instances:
    """The instances of a dict of Detectron2's COCO loader; crowd regions left out."""
    size = record["height"], record["width"]
    annotations = [a for a in record["annotations"] if not a["iscrowd"]]
    masks = torch.zeros(len(annotations), *size, dtype=torch.bool)
    for mask, annotation in zip(masks, annotations, strict=True):
        mask.copy_(torch.from_numpy(decode(annotation["segmentation"], *size)))
    return make_instances(masks, [a["category_id"] for a in annotations], [1.0] * len(annotations))


def read_segment_ids(path: str) -> np.ndarray:
    """(H, W) ids of a COCO panoptic PNG."""
    rgb = np.array(Image.open(path)).astype(np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 256**2 * rgb[..., 2]


def perfect_panoptic(record: dict[str, Any]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The "panoptic_seg" output for a dict of Detectron2's COCO panoptic loader; crowd regions left out."""
    segment_ids = read_segment_ids(record["pan_seg_file_name"])
    segments = [s for s in record["segments_info"] if not s["iscrowd"]]
    segment_ids[~np.isin(segment_ids, [s["id"] for s in segments])] = 0
    described = [{k: s[k] for k in ("id", "category_id", "isthing")} | {"score": 0.9} for s in segments]
    return torch.from_numpy(segment_ids.astype(np.int32)), described


def perfect_semantic(record: dict[str, Any], num_classes: int) -> torch.Tensor:
    """The "sem_seg" output, scores (K, H, W), for the dict's label PNG; ignored pixels get class 0."""
    labels = torch.from_numpy(np.array(Image.open(record["sem_seg_file_name"])).astype(np.int64))
    labels[labels >= num_classes] = 0
    return torch.nn.functional.one_hot(labels, num_classes).permute(2, 0, 1).float()
