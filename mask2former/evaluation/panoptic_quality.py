"""Panoptic quality of a picture, with the same matches as ``panopticapi``."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["VOID", "Overlaps", "SegmentCounts", "TruthSegment", "count_overlaps", "count_segments"]

VOID = 0  # id of pixels that belong to no segment

# Pixels of each pair (truth id, predicted id) that occurs.
Overlaps = Mapping[tuple[int, int], int]


class TruthSegment(NamedTuple):
    """A segment of the ground truth."""

    category: int
    crowd: bool  # several objects in one region, which nobody has to find
    area: int  # pixels, as annotated; 0: not known


@dataclass(slots=True)
class SegmentCounts:
    """What a category's PQ, SQ and RQ are made of."""

    iou_sum: float = 0.0  # of the matched pairs
    matched: int = 0
    missed: int = 0  # truth that nothing predicted matches
    wrong: int = 0  # predicted, matching no truth

    def __iadd__(self, other: "SegmentCounts") -> "SegmentCounts":
        self.iou_sum += other.iou_sum
        self.matched += other.matched
        self.missed += other.missed
        self.wrong += other.wrong
        return self


def count_overlaps(truth: np.ndarray, predicted: np.ndarray) -> Overlaps:
    """Compare two (H, W) maps of segment ids in [0, 2**32)."""
    truth, predicted = truth.ravel(), predicted.ravel()
    # A segment is a run of pixels in each of its rows, and there are far fewer runs than pixels.
    changes = (truth[1:] != truth[:-1]) | (predicted[1:] != predicted[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    lengths = np.diff(starts, append=truth.size)
    both = truth[starts].astype(np.uint64) << np.uint64(32) | predicted[starts].astype(np.uint32)
    pairs = np.unique(both)
    pixels = np.bincount(np.searchsorted(pairs, both), weights=lengths)  # quicker than np.unique's own inverse
    return {(pair >> 32, pair & 0xFFFFFFFF): int(n) for pair, n in zip(pairs.tolist(), pixels.tolist(), strict=True)}


def count_segments(
    overlaps: Overlaps, truth: Mapping[int, TruthSegment], predicted: Mapping[int, int]
) -> dict[int, SegmentCounts]:
    """The counts of each category that a picture has in its truth or its prediction.

    Segments of one category match where their IoU is more than 0.5; pixels without truth are no part of a predicted
    segment then. One that lies on them and on the crowd region of its category by more than half is not wrong (Kirillov
    et al., "Panoptic Segmentation", 2019, sections 4.1 and 4.2). Of several crowd regions of a category the last one
    counts, as in ``panopticapi``.

    Args:
        overlaps: of the two maps of ids.
        truth: the segments by their ids.
        predicted: the categories of the segments by their ids.
    """
    truth_area: dict[int, int] = defaultdict(int)
    predicted_area: dict[int, int] = defaultdict(int)
    for (truth_id, predicted_id), pixels in overlaps.items():
        truth_area[truth_id] += pixels
        predicted_area[predicted_id] += pixels

    counts: dict[int, SegmentCounts] = defaultdict(SegmentCounts)
    missed = {truth_id for truth_id, segment in truth.items() if not segment.crowd}
    unmatched = set(predicted)
    for (truth_id, predicted_id), pixels in overlaps.items():
        segment = truth.get(truth_id)
        if segment is None or segment.crowd or segment.category != predicted.get(predicted_id):
            continue
        area = segment.area or truth_area[truth_id]
        union = area + predicted_area[predicted_id] - pixels - overlaps.get((VOID, predicted_id), 0)
        if 2 * pixels > union:
            counts[segment.category].iou_sum += pixels / union
            counts[segment.category].matched += 1
            missed.discard(truth_id)
            unmatched.discard(predicted_id)

    for truth_id in missed:
        counts[truth[truth_id].category].missed += 1
    crowds = {segment.category: truth_id for truth_id, segment in truth.items() if segment.crowd}
    for predicted_id in unmatched:
        category = predicted[predicted_id]
        excused = overlaps.get((VOID, predicted_id), 0)
        if category in crowds:
            excused += overlaps.get((crowds[category], predicted_id), 0)
        if 2 * excused <= predicted_area[predicted_id]:
            counts[category].wrong += 1
    return dict(counts)
