"""Masks of many small objects in a large picture."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes
from pycocotools import mask as coco_mask
from torch import Tensor

__all__ = ["CroppedMasks", "boxes_around", "mask_boxes"]


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes (N, 4), int64 (x0, y0, x1, y1), ends exclusive, around masks (N, H, W); zeros for an empty mask."""
    return boxes_around(masks.any(dim=2), masks.any(dim=1))


def boxes_around(rows: Tensor, columns: Tensor) -> Tensor:
    """Boxes as :func:`mask_boxes` makes them, of the rows (N, H) and columns (N, W) that hold something."""
    extents = []
    for occupied in (columns, rows):
        first = occupied.int().argmax(1)
        last = occupied.shape[1] - occupied.flip(1).int().argmax(1)
        empty = ~occupied.any(1)
        extents.append((first.masked_fill(empty, 0), last.masked_fill(empty, 0)))
    (x0, x1), (y0, y1) = extents
    return torch.stack([x0, y0, x1, y1], dim=1)


class CroppedMasks(Sequence[Tensor]):
    """A sequence of (H, W) bool masks, each kept as its crop, and made whole when it is asked for.

    It takes the place of a (N, H, W) tensor in ``Instances.pred_masks`` where N masks of the picture's
    size would not fit in memory.

    Args:
        crops: bool tensors (h_i, w_i).
        corners: (y, x) of each crop's top left pixel in the picture.
        size: height and width of the picture; every crop lies inside.
    """

    def __init__(self, crops: Sequence[Tensor], corners: Sequence[tuple[int, int]], size: tuple[int, int]) -> None:
        self.crops = list(crops)
        self.corners = list(corners)
        self.size = size

    @staticmethod
    def from_masks(masks: Tensor, *, copy: bool = True) -> "CroppedMasks":
        """Crop masks (N, H, W) to their boxes; without a copy the crops are parts of ``masks``, and keep all of it."""
        boxes = mask_boxes(masks).tolist()
        crops = [mask[y0:y1, x0:x1] for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True)]
        if copy:
            crops = [crop.clone() for crop in crops]
        return CroppedMasks(crops, [(y0, x0) for x0, y0, _, _ in boxes], (masks.shape[1], masks.shape[2]))

    @staticmethod
    def cat(parts: Sequence["CroppedMasks"]) -> "CroppedMasks":
        """Join masks of one picture."""
        crops = [crop for part in parts for crop in part.crops]
        return CroppedMasks(crops, [corner for part in parts for corner in part.corners], parts[0].size)

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: Any) -> Any:
        """One mask (H, W) for an int; ``CroppedMasks`` for a slice, or for a tensor of indices or bools."""
        if isinstance(index, int):
            crop = self.crops[index]
            y, x = self.corners[index]
            mask = torch.zeros(self.size, dtype=torch.bool, device=crop.device)
            mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
            return mask
        chosen = torch.arange(len(self))[index if isinstance(index, slice) else torch.as_tensor(index).cpu()].tolist()
        return CroppedMasks([self.crops[i] for i in chosen], [self.corners[i] for i in chosen], self.size)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        masks = np.zeros((len(self), *self.size), dtype=bool)
        for index, mask in enumerate(self):
            masks[index] = mask.cpu().numpy()
        return masks if dtype is None else masks.astype(dtype)

    def to(self, *args: Any, **kwargs: Any) -> "CroppedMasks":
        """Move the crops, as ``Tensor.to`` does."""
        return CroppedMasks([crop.to(*args, **kwargs) for crop in self.crops], self.corners, self.size)

    def boxes(self) -> Boxes:
        """Boxes around the masks, in pixels; an empty mask has a box without area."""
        boxes = torch.zeros(len(self), 4)
        for box, crop, (y, x) in zip(boxes, self.crops, self.corners, strict=True):
            if crop.numel():
                around = mask_boxes(crop[None])[0].cpu()
                box.copy_(around + torch.tensor([x, y, x, y]))
        return Boxes(boxes)

    def areas(self) -> Tensor:
        """Area (N) of each mask in pixels."""
        return torch.tensor([int(crop.sum()) for crop in self.crops], dtype=torch.int64)

    def rle(self) -> list[dict[str, Any]]:
        """The masks in COCO's compressed run-length form, ``counts`` as bytes."""
        return [coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8))) for mask in self]
