"""Panoptic quality of semantic segmentation: all pixels of a class are one segment (all classes are stuff)."""

from dataclasses import dataclass

import numpy as np

from .quality import Quality

__all__ = ["SemanticQuality", "SemanticResults"]


@dataclass(frozen=True)
class SemanticResults(Quality):
    """With the IoU of each class (K), NaN for those that the truth lacks, and the mean of the others."""

    iou: np.ndarray
    mean_iou: float


class SemanticQuality:
    """Adds up pictures: PQ, SQ and RQ (Kirillov et al., "Panoptic Segmentation", 2019, section 4) and mIoU.

    Segments match where their IoU is more than 0.5. Pixels without truth count for nothing, and a predicted segment
    that lies on them by more than half is no false positive.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # truth, prediction
        self._iou_sum = np.zeros(num_classes)
        # Of segments, by class.
        self._matched, self._missed, self._wrong = (np.zeros(num_classes, dtype=np.int64) for _ in range(3))

    def add(self, truth: np.ndarray, predicted: np.ndarray) -> None:
        """Take in a picture: classes (H, W) in [0, K), or K for pixels without one."""
        side = self.num_classes + 1
        pairs = truth.ravel().astype(np.int64) * side + predicted.ravel()
        counts = np.bincount(pairs, minlength=side * side).reshape(side, side)
        classes = counts[:-1, :-1]
        in_truth, in_prediction = counts[:-1].sum(axis=1), counts[:, :-1].sum(axis=0)
        without_truth = counts[-1, :-1]

        union = in_truth + in_prediction - classes.diagonal() - without_truth
        iou = classes.diagonal() / np.maximum(union, 1)
        matched = iou > 0.5
        self._iou_sum += np.where(matched, iou, 0)
        self._matched += matched
        self._missed += (in_truth > 0) & ~matched
        self._wrong += (in_prediction > 0) & ~matched & (2 * without_truth <= in_prediction)
        self._confusion += classes

    def results(self) -> SemanticResults:
        """The figures of all pictures so far."""
        quality = Quality.from_counts(self._iou_sum, self._matched, self._missed, self._wrong)
        both = self._confusion.diagonal()
        in_truth, in_prediction = self._confusion.sum(axis=1), self._confusion.sum(axis=0)
        # As Detectron2's evaluator has it: over the classes of the truth.
        nothing = np.full(self.num_classes, np.nan)
        iou = 100 * np.divide(both, in_truth + in_prediction - both, out=nothing, where=in_truth > 0)
        mean_iou = float(np.nanmean(iou)) if in_truth.any() else float("nan")
        return SemanticResults(quality.pq, quality.sq, quality.rq, iou, mean_iou)
