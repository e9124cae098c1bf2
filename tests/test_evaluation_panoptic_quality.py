"""Counts of matched, missed and wrong segments, against panopticapi, hotcoco and pixels counted one by one."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco.panoptic import PanopticEval
from PIL import Image

from mask2former.data.annotations import rgb_from_ids
from mask2former.evaluation.panoptic_quality import SegmentCounts, TruthSegment, count_overlaps, count_segments

CATEGORIES = {c: {"id": c, "name": f"c{c}", "isthing": int(c < 3)} for c in range(1, 6)}

# Matched, missed and wrong segments of each category, and the sum of the matches' IoU.
Counts = dict[int, tuple[int, int, int, float]]


def random_map(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """Blocks of 4 x 4 pixels of random ids, some of which are frequent."""
    blocks = rng.choice(ids, size=(10, 14), p=rng.dirichlet(np.full(len(ids), 0.5)))
    return blocks.repeat(4, axis=0).repeat(4, axis=1)


@pytest.mark.parametrize("size", [(40, 56), (1, 7), (7, 1), (1, 1)])
def test_overlaps(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for largest in (2, 300, 2**24):
        truth = random_map(rng, rng.integers(0, largest, 9).astype(np.uint32))[: size[0], : size[1]]
        predicted = rng.integers(0, 4, size).astype(np.int32)
        expected = Counter(zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True))
        assert count_overlaps(truth, predicted) == expected


class Picture:
    """Truth with a crowd region or two, pixels without a segment and of one that is not listed, and a prediction."""

    def __init__(self, rng: np.random.Generator) -> None:
        ids = rng.choice(np.arange(1, 2**24), size=9, replace=False)
        self.truth = random_map(rng, np.array([0, *ids]))
        disturbed = np.roll(self.truth, rng.integers(-1, 2, size=2), axis=(0, 1))
        other = random_map(rng, np.array([0, *ids]))
        mixed = np.where(rng.random((10, 14)).repeat(4, axis=0).repeat(4, axis=1) < 0.05, other, disturbed)
        names, predicted = np.unique(mixed, return_inverse=True)
        self.predicted = (predicted.reshape(mixed.shape) * (rng.random() > 0.1)).astype(np.int32)  # or nothing
        categories = {int(i): int(rng.integers(1, 6)) for i in ids}
        self.segments = [
            {
                "id": i,
                "category_id": category,
                "iscrowd": int(number < 2),
                "area": int((self.truth == i).sum()),
            }
            for number, (i, category) in enumerate(categories.items())
            if number < 8
        ]
        seen = set(np.unique(self.predicted).tolist()) - {0}
        self.found = {i: categories.get(int(names[i]), 1) for i in seen}

    def count(self) -> dict[int, SegmentCounts]:
        truth = {s["id"]: TruthSegment(s["category_id"], bool(s["iscrowd"]), s["area"]) for s in self.segments}
        return count_segments(count_overlaps(self.truth, self.predicted), truth, self.found)

    def annotations(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """In COCO's format, with truth.png and found.png in the folder."""
        Image.fromarray(rgb_from_ids(self.truth)).save(folder / "truth.png")
        Image.fromarray(rgb_from_ids(self.predicted)).save(folder / "found.png")
        found = [{"id": i, "category_id": category} for i, category in self.found.items()]
        return (
            {"image_id": 1, "file_name": "truth.png", "segments_info": self.segments},
            {"image_id": 1, "file_name": "found.png", "segments_info": found},
        )


def by_panopticapi(truth: dict[str, Any], found: dict[str, Any], folder: Path) -> Counts:
    api = pytest.importorskip(
        "panopticapi.evaluation", reason="needs panopticapi: pip install --no-deps panopticapi-lite"
    )
    stat = api.pq_compute_single_core(0, [(truth, found)], str(folder), str(folder), CATEGORIES)
    return {c: (of.tp, of.fn, of.fp, of.iou) for c, of in stat.pq_per_cat.items()}


def by_hotcoco(truth: dict[str, Any], found: dict[str, Any], folder: Path) -> Counts:
    common = {"images": [{"id": 1, "file_name": "picture.jpg"}], "categories": list(CATEGORIES.values())}
    contents = ({**common, "annotations": [annotation]} for annotation in (truth, found))
    evaluation = PanopticEval(*contents, gt_folder=str(folder), pred_folder=str(folder))
    evaluation.evaluate()
    of_categories = evaluation.results()["per_class"]
    return {c: (of["tp"], of["fn"], of["fp"], of["sq"] * of["tp"]) for c, of in of_categories.items()}


@pytest.mark.parametrize("other", [by_panopticapi, by_hotcoco])
def test_equals_others(tmp_path: Path, other: Callable[..., Counts]) -> None:
    rng = np.random.default_rng(1)
    total = SegmentCounts()
    for _ in range(60):
        picture = Picture(rng)
        counts = picture.count()
        expected = other(*picture.annotations(tmp_path), tmp_path)
        for category in CATEGORIES:
            ours = counts.get(category, SegmentCounts())
            matched, missed, wrong, iou_sum = expected.get(category, (0, 0, 0, 0))
            assert (ours.matched, ours.missed, ours.wrong) == (matched, missed, wrong)
            assert ours.iou_sum == pytest.approx(iou_sum)
            total += ours
    assert min(total.matched, total.missed, total.wrong) > 30


def row(*runs: tuple[int, int]) -> np.ndarray:
    """One row of pixels: (id, number of pixels) each."""
    return np.concatenate([np.full(length, i) for i, length in runs])[np.newaxis]


def test_half_is_no_match() -> None:
    truth = {1: TruthSegment(7, False, 20)}
    for pixels, expected in ((10, SegmentCounts(0, 0, 1, 1)), (11, SegmentCounts(11 / 20, 1, 0, 0))):
        overlaps = count_overlaps(row((1, 20)), row((5, pixels), (0, 20 - pixels)))
        assert count_segments(overlaps, truth, {5: 7}) == {7: expected}


def test_more_than_half_on_a_crowd_or_on_no_truth_is_not_wrong() -> None:
    truth_map = row((0, 10), (1, 20), (2, 30))
    truth = {1: TruthSegment(7, True, 20), 2: TruthSegment(8, False, 30)}
    missed = {8: SegmentCounts(missed=1)}
    for on_stuff, expected in ((14, missed), (16, {**missed, 7: SegmentCounts(wrong=1)})):
        # 5 pixels have no truth, 10 are the crowd's.
        predicted = row((0, 5), (3, 5), (3, 10), (0, 10), (3, on_stuff), (0, 30 - on_stuff))
        assert count_segments(count_overlaps(truth_map, predicted), truth, {3: 7}) == expected
    # A crowd excuses its own category alone.
    predicted = row((0, 10), (3, 20), (0, 30))
    assert count_segments(count_overlaps(truth_map, predicted), truth, {3: 9}) == {**missed, 9: SegmentCounts(wrong=1)}


def test_area_that_is_not_annotated_is_counted() -> None:
    overlaps = count_overlaps(row((1, 20), (0, 5)), row((5, 15), (0, 10)))
    for area, iou in ((0, 15 / 20), (20, 15 / 20), (25, 15 / 25)):
        assert count_segments(overlaps, {1: TruthSegment(7, False, area)}, {5: 7}) == {7: SegmentCounts(iou, 1, 0, 0)}
