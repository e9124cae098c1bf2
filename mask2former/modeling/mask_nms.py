"""Non-maximum suppression of masks."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..structures import CroppedMasks

__all__ = ["NearbyMasks", "intersection", "mask_iou", "mask_nms", "suppress"]

CELL = 64  # side in pixels of the squares by which masks are looked up


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
    """Indices kept when, in order, each mask whose ``overlap(kept, mask)`` exceeds the threshold is left out.

    Asks only for overlaps of masks of one class that are near each other: it must be no more than the threshold, 0 or
    more, where masks share no pixel.
    """
    kept = NearbyMasks(masks, classes)
    indices = []
    for index in range(len(masks)):
        if all(overlap(rival, index) <= threshold for rival in kept.near(index)):
            kept.add(index)
            indices.append(index)
    return torch.tensor(indices, dtype=torch.int64, device=classes.device)


class NearbyMasks:
    """Finds, among the masks added so far, those near another one, in a time that doesn't grow with their number.

    Args:
        masks: N masks.
        classes: (N) class ids; masks of different classes are not near each other.
    """

    def __init__(self, masks: CroppedMasks, classes: Tensor) -> None:
        self._boxes = [
            (y, x, y + crop.shape[0], x + crop.shape[1])
            for (y, x), crop in zip(masks.corners, masks.crops, strict=True)
        ]
        self._classes = classes.tolist()
        self._cells: dict[tuple[int, int, int], list[int]] = {}

    def add(self, index: int) -> None:
        """Add the mask with this index."""
        for cell in self._cells_of(index):
            self._cells.setdefault(cell, []).append(index)

    def near(self, index: int) -> list[int]:
        """Indices, in order, of masks that were added whose crops overlap that of mask ``index``."""
        y0, x0, y1, x1 = self._boxes[index]
        near = []
        for other in {other for cell in self._cells_of(index) for other in self._cells.get(cell, ())}:
            other_y0, other_x0, other_y1, other_x1 = self._boxes[other]
            if other_y0 < y1 and y0 < other_y1 and other_x0 < x1 and x0 < other_x1:
                near.append(other)
        return sorted(near)

    def _cells_of(self, index: int) -> Iterator[tuple[int, int, int]]:
        y0, x0, y1, x1 = self._boxes[index]
        for row in range(y0 // CELL, -(-y1 // CELL)):
            for column in range(x0 // CELL, -(-x1 // CELL)):
                yield self._classes[index], row, column


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
