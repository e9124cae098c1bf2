"""Panoptic quality of semantic segmentation: all pixels of a class are one segment (all classes are stuff)."""

from dataclasses import dataclass

import numpy as np

__all__ = ["SemanticQuality"]


@dataclass(frozen=True)
class QualityResults:
    """Figures in percent; those of each class (K) are NaN where there is none of it.

    ``num_classes`` have segments in truth or predictions; the means of PQ, SQ and RQ are over these, the mean IoU over
    the classes of the truth.
    """

    pq: np.ndarray
    sq: np.ndarray
    rq: np.ndarray
    iou: np.ndarray
    num_classes: int
    mean_iou: float

    def mean(self, metric: str) -> float:
        """Of "pq", "sq" or "rq", over the classes that are found."""
        values = getattr(self, metric)
        return float(np.nanmean(values)) if self.num_classes else float("nan")


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

    def results(self) -> QualityResults:
        """The figures of all pictures so far."""
        found = self._matched + self._missed + self._wrong > 0
        weights = self._matched + (self._missed + self._wrong) / 2
        nothing = np.full(self.num_classes, np.nan)
        pq = np.divide(self._iou_sum, weights, out=nothing.copy(), where=found)
        sq = np.where(found, self._iou_sum / np.maximum(self._matched, 1), np.nan)
        rq = np.divide(self._matched, weights, out=nothing.copy(), where=found)

        both = self._confusion.diagonal()
        in_truth, in_prediction = self._confusion.sum(axis=1), self._confusion.sum(axis=0)
        # As Detectron2's evaluator has it: over the classes of the truth.
        iou = np.divide(both, in_truth + in_prediction - both, out=nothing.copy(), where=in_truth > 0)
        mean_iou = float(np.nanmean(iou)) if in_truth.any() else float("nan")
        return QualityResults(100 * pq, 100 * sq, 100 * rq, 100 * iou, int(found.sum()), 100 * mean_iou)
