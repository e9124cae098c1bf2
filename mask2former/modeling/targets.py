"""Ground truth in the form the losses read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks
from torch import Tensor

__all__ = ["Targets", "prepare_targets"]


@dataclass
class Targets:
    """The objects of one picture.

    Attributes:
        classes: (N) int64, contiguous class ids.
        masks: (N, H, W) bool, at the padded size of the batch.
        name: the picture's file, for messages.
    """

    classes: Tensor
    masks: Tensor
    name: str = "a picture without a file name"

    def __len__(self) -> int:
        return len(self.classes)


def prepare_targets(samples: Sequence[dict[str, Any]], size: tuple[int, int], device: torch.device) -> list[Targets]:
    """Targets of mapped samples, padded to the batch's (height, width).

    Args:
        samples: dicts with ``instances``, an ``Instances`` with ``gt_classes`` and ``gt_masks``.

    Raises:
        TypeError: if the masks are polygons: they must be bitmaps (``INPUT.MASK_FORMAT: bitmask``).
    """
    height, width = size
    targets = []
    for sample in samples:
        instances = sample["instances"]
        masks = instances.gt_masks
        if isinstance(masks, BitMasks):
            masks = masks.tensor
        if not isinstance(masks, Tensor):
            raise TypeError(
                f"gt_masks must be a (N, H, W) tensor or BitMasks, but is {type(masks).__name__}: "
                "set INPUT.MASK_FORMAT to bitmask"
            )
        masks = F.pad(masks.to(device), (0, width - masks.shape[-1], 0, height - masks.shape[-2]))
        targets.append(Targets(instances.gt_classes.to(device), masks.bool(), sample.get("file_name", Targets.name)))
    return targets
