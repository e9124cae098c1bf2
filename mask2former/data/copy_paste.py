"""Copy-paste augmentation: objects of another training sample put on this one.

"Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", Ghiasi et al., CVPR 2021. As there,
both samples have gone through large-scale jitter before, and edges are not blurred (section 3).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.structures import Boxes, Instances

from ..errors import UserError
from ..structures import mask_boxes
from .annotations import read_semantic

__all__ = ["CopyPaste", "paste"]

Sample = dict[str, Any]


class CopyPaste:
    """Mapper that pastes some objects of a random other sample on a share of the samples.

    Each object of the other sample is taken with probability 1/2. In panoptic data sets these are things alone.

    Args:
        mapper: makes the samples; see ``MaskFormerDatasetMapper``.
        dataset_dicts: what the other samples are made of.
        probability: of pasting, in [0, 1].

    Raises:
        UserError: if the probability is out of range, or the mapper makes regions of classes and not objects.
    """

    def __init__(
        self, mapper: Callable[[Sample], Sample], dataset_dicts: Sequence[Sample], *, probability: float
    ) -> None:
        if not 0 <= probability <= 1:
            raise UserError(f"INPUT.COPY_PASTE_PROBABILITY is {probability}, expected 0 to 1")
        if isinstance(mapper, DatasetMapper) or getattr(mapper, "annotation_reader", None) is read_semantic:
            raise UserError(
                f"INPUT.COPY_PASTE_PROBABILITY is {probability}, but only instance and panoptic mappers of this "
                "package make objects to paste: set it to 0, or choose another INPUT.DATASET_MAPPER_NAME"
            )
        self.probability = probability
        # What the loader asks a mapper for.
        self.label_map = getattr(mapper, "label_map", False)
        self._mapper = mapper
        self._dicts = DatasetFromList(list(dataset_dicts))  # packed, so that workers share its memory
        self._things = _thing_classes(dataset_dicts)

    def __call__(self, dataset_dict: Sample) -> Sample:
        """Make a sample, with or without pasted objects."""
        sample = self._mapper(dataset_dict)
        if np.random.uniform() >= self.probability:
            return sample
        other = self._mapper(self._dicts[np.random.randint(len(self._dicts))])
        objects = other["instances"]
        taken = torch.from_numpy(np.random.uniform(size=len(objects)) < 0.5)
        if self._things is not None:
            taken &= torch.isin(objects.gt_classes, self._things)
        return paste(other["image"], objects[taken], sample)


def _thing_classes(dataset_dicts: Sequence[Sample]) -> torch.Tensor | None:
    """Contiguous ids of the things, or None where there is nothing but things."""
    if not any("segments_info" in dataset_dict for dataset_dict in dataset_dicts):
        return None
    segments = (segment for dataset_dict in dataset_dicts for segment in dataset_dict.get("segments_info", ()))
    return torch.tensor(sorted({s["category_id"] for s in segments if s["isthing"]}), dtype=torch.int64)


def paste(image: torch.Tensor, objects: Instances, sample: Sample) -> Sample:
    """The sample with objects of a picture on top, at the places where they are in that picture.

    What they hide is taken from the sample's masks, and masks of which nothing is left go. Where the pictures' sizes
    differ, their upper left corners lie on each other, and what is outside the sample is cut off.

    Args:
        image: (3, h, w), the picture of the objects.
        objects: with ``gt_classes`` (M) and ``gt_masks`` (M, h, w).
        sample: see ``MaskFormerDatasetMapper``; it is left as it is.
    """
    height, width = sample["image"].shape[1:]
    rows, columns = min(height, image.shape[1]), min(width, image.shape[2])
    masks = torch.zeros(len(objects), height, width, dtype=torch.bool)
    masks[:, :rows, :columns] = objects.gt_masks[:, :rows, :columns]
    covered = masks.any(dim=0)  # (H, W)

    pasted = dict(sample)
    pasted["image"] = sample["image"].clone()
    inside = covered[:rows, :columns]
    pasted["image"][:, :rows, :columns][:, inside] = image[:, :rows, :columns][:, inside]
    pasted["padding_mask"] = sample["padding_mask"] & ~covered
    if "sem_seg" in sample:
        pasted["sem_seg"] = sample["sem_seg"].clone()
        for mask, class_id in zip(masks, objects.gt_classes, strict=True):
            pasted["sem_seg"][mask] = class_id
    below = sample["instances"]
    classes = torch.cat([below.gt_classes, objects.gt_classes])
    pasted["instances"] = _make_instances(classes, torch.cat([below.gt_masks & ~covered, masks]))
    return pasted


def _make_instances(classes: torch.Tensor, masks: torch.Tensor) -> Instances:
    """``Instances`` of the masks (N, H, W) that are not empty."""
    kept = masks.flatten(1).any(dim=1)
    masks = masks[kept]
    boxes = Boxes(mask_boxes(masks).float())
    return Instances((masks.shape[1], masks.shape[2]), gt_classes=classes[kept], gt_masks=masks, gt_boxes=boxes)
