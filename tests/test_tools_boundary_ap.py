"""Boundary IoU and boundary AP, against pixels counted by hand and OpenCV's erosion."""

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from scripts import Program, program

from mask2former.errors import UserError
from mask2former.evaluation.boundary import average_precision, boundary_iou, boundary_region

SIDE = 100  # the diagonal is 141.4 pixels, 2 % of which are 3 pixels


def square(x: int = 20, y: int = 20, side: int = 40) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_boundary_of_a_square_by_hand() -> None:
    region = boundary_region(square())
    assert region.sum() == 40**2 - 34**2
    assert np.array_equal(region, square() & ~square(23, 23, 34))
    assert boundary_region(square(), dilation_ratio=0.01).sum() == 40**2 - 38**2
    assert boundary_region(square(), dilation_ratio=0.0001).sum() == 40**2 - 38**2  # one pixel at least


def test_the_pictures_border_is_a_contour() -> None:
    assert boundary_region(np.ones((SIDE, SIDE), dtype=bool)).sum() == 100**2 - 94**2


def test_square_shifted_by_a_pixel_by_hand() -> None:
    """The squares share 39 x 40 pixels; of these 35 x 34 are inside of one of the inner squares."""
    shared = 39 * 40 - 35 * 34
    assert boundary_iou(square(), square(x=21)) == pytest.approx(shared / (2 * 444 - shared))


def test_equal_masks() -> None:
    assert boundary_iou(square(), square()) == 1
    assert boundary_iou(square(), square(x=61, side=3)) == 0


def test_masks_that_are_all_boundary() -> None:
    """6 pixels wide: none is more than 3 pixels from the contour."""
    first, second = square(side=6), square(x=21, side=6)
    assert np.array_equal(boundary_region(first), first)
    assert boundary_iou(first, second) == pytest.approx(5 * 6 / (7 * 6))


def test_empty_masks() -> None:
    nothing = np.zeros((SIDE, SIDE), dtype=bool)
    assert not boundary_region(nothing).any()
    assert boundary_iou(nothing, nothing) == boundary_iou(nothing, square()) == 0


@pytest.mark.parametrize("size", [(61, 140), (140, 61), (240, 320)])
def test_equals_erosion(size: tuple[int, int]) -> None:
    """What is left of a mask when a 3 x 3 erosion, once for each pixel of distance, is taken from it."""
    noise = np.random.default_rng(0).normal(size=size).astype(np.float32)
    mask = cv2.GaussianBlur(noise, (0, 0), 6) > 0
    distance = round(0.02 * np.hypot(*size))
    padded = np.pad(mask.astype(np.uint8), 1)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1].astype(bool)
    assert 0 < inner.sum() < mask.sum()
    assert np.array_equal(boundary_region(mask), mask & ~inner)


def annotation(mask: np.ndarray, **other: Any) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    return {"image_id": 7, "category_id": 1, "segmentation": segmentation, **other}


def truth_of(*masks: np.ndarray) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "7.png", "height": SIDE, "width": SIDE}],
        "annotations": [annotation(mask, id=number) for number, mask in enumerate(masks, start=1)],
        "categories": [{"id": 1, "name": "square"}],
    }


def ring() -> np.ndarray:
    return square() & ~square(23, 23, 34)


@pytest.mark.parametrize(
    ("predicted", "by_boundary", "by_mask"),
    [
        (square(), 100, 100),
        # Boundary IoU 370 / 518 = 0.714 passes 5 of the thresholds 0.5, 0.55, ..., 0.95; mask IoU 39 / 41 = 0.951 all.
        (square(x=21), 50, 100),
        # Its boundary is the square's, but mask IoU is 444 / 1600.
        (ring(), 0, 0),
    ],
)
def test_average_precision_by_hand(predicted: np.ndarray, by_boundary: float, by_mask: float) -> None:
    if predicted.sum() == ring().sum():
        assert boundary_iou(square(), predicted) == 1
    results = [annotation(predicted, score=0.9, bbox=[0, 0, 1, 1])]
    assert average_precision(truth_of(square()), results)["AP"] == pytest.approx(by_boundary)
    assert average_precision(truth_of(square()), results, boundary=False)["AP"] == pytest.approx(by_mask)


def test_several_instances_and_sizes() -> None:
    """The small one is right, the medium one is shifted, and a better scored wrong one costs precision."""
    truth = truth_of(square(side=20, x=0, y=0), square(x=50, y=50))
    results = [
        annotation(square(side=20, x=0, y=0), score=0.9),
        annotation(square(x=51, y=50), score=0.8),
        annotation(square(x=60, y=0, side=35), score=0.95),
    ]
    figures = average_precision(truth, results)
    assert figures["APs"] == pytest.approx(100)
    assert np.isnan(figures["APl"])
    # At thresholds up to 0.7 both are found, at precision 2/3; above, one is, at precision 1/2 and recall up to 1/2.
    assert figures["AP50"] == pytest.approx(100 * 2 / 3)
    assert figures["AP75"] == pytest.approx(100 / 2 * 51 / 101)
    assert figures["AP"] == pytest.approx((figures["AP50"] + figures["AP75"]) / 2)


def test_in_a_crowd_mask_overlap_counts() -> None:
    """A small square deep inside of a crowd region has none of its boundary, and is no mistake."""
    truth = truth_of(square(), square(x=65, side=30))
    results = [annotation(square(), score=0.9), annotation(square(x=76, y=31, side=8), score=0.95)]
    assert average_precision(truth, results)["AP"] == pytest.approx(100 / 2 * 51 / 101)
    truth["annotations"][1]["iscrowd"] = 1
    assert average_precision(truth, results)["AP"] == pytest.approx(100)


def test_nothing_was_found() -> None:
    assert average_precision(truth_of(square()), [])["AP"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no category_id, image_id, score, segmentation"),
        ({"score": None, "segmentation": None}, "has no score, segmentation"),
        ({"score": "1"}, "has the score '1', expected a number"),
        ({"image_id": 8}, "is for image_id 8"),
        ({"category_id": 9}, "is for category_id 9"),
        ({"segmentation": [[0, 0, 9, 0, 9, 9]]}, "has no mask in compressed run lengths"),
        (
            {"segmentation": {"size": [2, 2], "counts": "04"}},
            r"has a mask of size \[2, 2\], but its picture, image_id 7",
        ),
    ],
)
def test_results_that_do_not_fit(change: dict[str, Any] | None, message: str) -> None:
    result: Any = 1
    if change is not None:
        result = {**annotation(square(), score=1.0), **change}
        result = {key: value for key, value in result.items() if value is not None}
    with pytest.raises(UserError, match=f"result number 2 {message}"):
        average_precision(truth_of(square()), [annotation(square(), score=1.0), result])


@pytest.fixture
def evaluate(repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """The command as a function of its arguments: exit code, and what it prints."""
    return program(repository / "tools" / "evaluate_coco_boundary_ap.py", monkeypatch, capsys)


def test_command(evaluate: Program, tmp_path: Path) -> None:
    truth, results = tmp_path / "truth.json", tmp_path / "results.json"
    truth.write_text(json.dumps(truth_of(square())))
    results.write_text(json.dumps([annotation(square(x=21), score=0.9)]))
    files = ("--gt-json-file", str(truth), "--dt-json-file", str(results))
    code, printed = evaluate(*files)
    assert code == 0, printed
    assert "Boundary AP of 1 instances" in printed and "50.000" in printed
    assert "100.000" in evaluate(*files, "--iou-type", "segm")[1].split("Mask AP")[1]
    # One pixel: the boundaries share 2 x 38 pixels of 156 each. Below every threshold.
    assert "|  0.000 |" in evaluate(*files, "--dilation-ratio", "0.005")[1]


@pytest.mark.parametrize(
    ("truth", "results", "options", "message"),
    [
        (None, "[]", (), "ground truth: cannot read"),
        ("{}", "[]", (), "is not in COCO's instance format, or has no ground truth: it lacks annotations"),
        (json.dumps(truth_of()), "{", (), "results: .* is not valid JSON"),
        (json.dumps(truth_of()), "{}", (), "is not in COCO's result format"),
        (json.dumps(truth_of()), "[]", ("--dilation-ratio", "0"), "--dilation-ratio is 0.0, expected more than 0"),
    ],
)
def test_mistakes(
    evaluate: Program, tmp_path: Path, truth: str | None, results: str, options: tuple[str, ...], message: str
) -> None:
    paths = tmp_path / "truth.json", tmp_path / "results.json"
    for path, content in zip(paths, (truth, results), strict=True):
        if content is not None:
            path.write_text(content)
    code, printed = evaluate("--gt-json-file", str(paths[0]), "--dt-json-file", str(paths[1]), *options)
    assert code == 1
    assert len(printed.splitlines()) == 1 and printed.startswith("error: ")
    assert re.search(message, printed), printed
