"""PQ, SQ and RQ from counts of segments (Kirillov et al., "Panoptic Segmentation", 2019, section 4.1)."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Quality"]


@dataclass(frozen=True)
class Quality:
    """Figures of each class (K) in percent; NaN where neither truth nor predictions have a segment of it."""

    pq: np.ndarray
    sq: np.ndarray
    rq: np.ndarray

    @classmethod
    def from_counts(cls, iou_sum: np.ndarray, matched: np.ndarray, missed: np.ndarray, wrong: np.ndarray) -> "Quality":
        """Of each class (K): the sum of the matched pairs' IoU, and numbers of pairs and of segments without one."""
        segments = matched + (missed + wrong) / 2
        found = segments > 0
        nothing = np.full(len(segments), np.nan)
        return cls(
            pq=100 * np.divide(iou_sum, segments, out=nothing.copy(), where=found),
            sq=100 * np.where(found, iou_sum / np.maximum(matched, 1), np.nan),
            rq=100 * np.divide(matched, segments, out=nothing.copy(), where=found),
        )

    @property
    def found(self) -> np.ndarray:
        """Whether a class (K) has segments in truth or predictions."""
        return ~np.isnan(self.pq)

    def mean(self, metric: str, among: np.ndarray | None = None) -> float:
        """Of "pq", "sq" or "rq", over the classes that are found ``among`` some, (K) bool, or all; NaN without one."""
        counted = self.found if among is None else self.found & among
        return float(getattr(self, metric)[counted].mean()) if counted.any() else float("nan")
