"""Non-maximum suppression of masks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..structures import CroppedMasks

__all__ = ["intersection", "mask_iou", "mask_nms", "suppress"]


def mask_nms(masks: CroppedMasks, classes: Tensor, threshold: float) -> Tensor:
    """Leave out each mask that overlaps a better one of its class by more than an IoU of ``threshold``.

    Args:
        masks: N masks, best first.
        classes: (N) class ids.

    Returns:
        Indices of the masks to keep, in order.
    """
    areas = masks.areas().tolist()
    return suppress(masks, classes, lambda better, worse: mask_iou(masks, areas, better, worse), threshold)


def suppress(masks: CroppedMasks, classes: Tensor, overlap: Callable[[int, int], float], threshold: float) -> Tensor:
    """Indices kept when, in order, each mask whose ``overlap(kept, mask)`` exceeds the threshold is left out."""
    boxes = masks.boxes().tensor
    labels = classes.cpu()
    kept: list[int] = []
    for index in range(len(masks)):
        earlier = torch.tensor(kept, dtype=torch.int64)
        x0, y0, x1, y1 = boxes[earlier].unbind(1)
        near = (x0 < boxes[index, 2]) & (boxes[index, 0] < x1) & (y0 < boxes[index, 3]) & (boxes[index, 1] < y1)
        rivals = earlier[near & (labels[earlier] == labels[index])].tolist()
        if all(overlap(rival, index) <= threshold for rival in rivals):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=classes.device)


def mask_iou(masks: CroppedMasks, areas: Sequence[int], i: int, j: int) -> float:
    """Intersection over union of two masks with these areas."""
    shared = intersection(masks, i, j)
    return shared / max(areas[i] + areas[j] - shared, 1)


def intersection(masks: CroppedMasks, i: int, j: int) -> int:
    """Pixels that two masks share."""
    (yi, xi), (yj, xj) = masks.corners[i], masks.corners[j]
    first, second = masks.crops[i], masks.crops[j]
    y0, x0 = max(yi, yj), max(xi, xj)
    y1, x1 = min(yi + first.shape[0], yj + second.shape[0]), min(xi + first.shape[1], xj + second.shape[1])
    if y0 >= y1 or x0 >= x1:
        return 0
    return int((first[y0 - yi : y1 - yi, x0 - xi : x1 - xi] & second[y0 - yj : y1 - yj, x0 - xj : x1 - xj]).sum())
