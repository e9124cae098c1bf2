"""Boundary IoU and boundary AP (Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation").

The boundary region of a mask is its pixels within a distance of its contour. Boundary IoU is the IoU of two such
regions: it sees an error along the contour of a large object, which mask IoU hardly does.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ..errors import UserError
from .instance import complete_truth, load_results

__all__ = ["DILATION_RATIO", "BoundaryEvaluation", "average_precision", "boundary_iou", "boundary_region"]

# The width of the boundary as a share of the picture's diagonal, in the paper for COCO.
DILATION_RATIO = 0.02

Annotation = dict[str, Any]


def boundary_region(mask: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """The pixels of a mask within a distance of its contour (section 4).

    Args:
        mask: (H, W) bool.
        dilation_ratio: the distance as a share of the picture's diagonal; in whole pixels, at least 1.

    Returns:
        (H, W) bool. Distance is the larger of the two along the axes, and what lies outside of the picture is outside
        of the mask. A mask that is nowhere deeper than the distance is its own boundary.
    """
    distance = max(round(dilation_ratio * float(np.hypot(*mask.shape))), 1)
    region = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return region
    part = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    # The mask's depth depends on nothing beyond the frame of background around it.
    depth = cv2.distanceTransform(np.pad(mask[part].astype(np.uint8), 1), cv2.DIST_C, 3)[1:-1, 1:-1]
    region[part] = mask[part] & (depth <= distance)
    return region


def boundary_iou(first: np.ndarray, second: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> float:
    """IoU of the boundary regions of two masks (H, W) (equation 3); 0 if both are empty."""
    a, b = boundary_region(first, dilation_ratio), boundary_region(second, dilation_ratio)
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


class BoundaryEvaluation(COCOeval):
    """COCO's evaluation of masks, with the smaller of mask IoU and boundary IoU for the overlap (section 5.1).

    The minimum keeps a mask from passing that has only the other's contour. What lies in a crowd region is found by
    mask overlap alone, as in the authors' implementation.
    """

    # By picture and category; the masks in run lengths.
    _gts: dict[tuple[Any, int], list[Annotation]]
    _dts: dict[tuple[Any, int], list[Annotation]]

    def __init__(self, truth: COCO, detections: COCO, dilation_ratio: float = DILATION_RATIO) -> None:
        super().__init__(truth, detections, "segm")
        self.dilation_ratio = dilation_ratio

    def evaluate(self) -> None:
        with tqdm(total=len(self.params.imgIds), unit="picture", desc="boundaries", disable=None) as self._progress:
            super().evaluate()

    def computeIoU(self, imgId: Any, catId: int) -> Any:
        """(detections, truths) of one picture and category, the detections best first."""
        overlap = super().computeIoU(imgId, catId)
        self._count(imgId)
        if len(overlap) == 0:
            return overlap
        categories = [catId] if self.params.useCats else self.params.catIds
        keys = [(imgId, category) for category in categories]
        crowd = [bool(truth["iscrowd"]) for key in keys for truth in self._gts[key]]
        with self._boundaries_of(keys):
            return np.where(crowd, overlap, np.minimum(overlap, super().computeIoU(imgId, catId)))

    def _count(self, image_id: Any) -> None:
        if image_id != getattr(self, "_last_image", None):
            self._last_image = image_id
            self._progress.update()

    @contextlib.contextmanager
    def _boundaries_of(self, keys: Sequence[tuple[Any, int]]) -> Iterator[None]:
        """Put boundary regions in the place of the masks of some pictures and categories."""
        truths, detections = self._gts, self._dts
        self._gts = {key: [self._as_boundary(annotation) for annotation in truths[key]] for key in keys}
        self._dts = {key: [self._as_boundary(annotation) for annotation in detections[key]] for key in keys}
        try:
            yield
        finally:
            self._gts, self._dts = truths, detections

    def _as_boundary(self, annotation: Annotation) -> Annotation:
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        region = boundary_region(mask, self.dilation_ratio)
        return {**annotation, "segmentation": mask_util.encode(np.asfortranarray(region, dtype=np.uint8))}


RESULT_KEYS = {"image_id", "category_id", "score", "segmentation"}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def average_precision(
    truth: dict[str, Any],
    results: list[Annotation],
    *,
    boundary: bool = True,
    dilation_ratio: float = DILATION_RATIO,
) -> dict[str, float]:
    """COCO's average precision of masks, by boundary or by mask IoU; COCO's summary is printed.

    Args:
        truth: the contents of a file in COCO's instance format.
        results: those of a result file with ``image_id``, ``category_id``, ``score`` and ``segmentation``. Boxes are
            not looked at: small, medium and large go by the masks.
        boundary: by the smaller of boundary IoU and mask IoU; otherwise by mask IoU alone.
        dilation_ratio: see :func:`boundary_region`.

    Returns:
        AP, AP50, AP75, APs, APm and APl in percent; NaN where there is no object of the kind.

    Raises:
        UserError: the results are for other pictures or categories, or have no masks of the pictures' sizes.
    """
    coco = COCO()
    coco.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    complete_truth(coco)
    _check_results(coco, results)
    masks_alone = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    detections = load_results(coco, masks_alone)
    evaluation = (
        BoundaryEvaluation(coco, detections, dilation_ratio) if boundary else COCOeval(coco, detections, "segm")
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    evaluation.summarize()
    return {
        name: 100 * float(value) if value >= 0 else float("nan")
        for name, value in zip(METRICS, evaluation.stats, strict=False)
    }


def _check_results(truth: COCO, results: list[Annotation]) -> None:
    for number, result in enumerate(results, start=1):
        problem = _problem(truth, result)
        if problem:
            raise UserError(f"result number {number} {problem}")


def _problem(truth: COCO, result: Annotation) -> str | None:
    """What is wrong with a result, if anything is."""
    missing = RESULT_KEYS - (result.keys() if isinstance(result, dict) else set())
    if missing:
        return f"has no {', '.join(sorted(missing))}: give results with masks"
    if not isinstance(result["score"], int | float):
        return f"has the score {result['score']!r}, expected a number"
    for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
        if result[key] not in known:
            return (
                f"is for {key} {result[key]!r}, which the ground truth does not have: "
                "give the file that the results were made for"
            )
    picture, mask = truth.imgs[result["image_id"]], result["segmentation"]
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        return "has no mask in compressed run lengths, as an evaluation writes it"
    if mask.get("size") != [picture["height"], picture["width"]]:
        return (
            f"has a mask of size {mask.get('size')}, but its picture, image_id {picture['id']}, is "
            f"{picture['height']} pixels high and {picture['width']} wide"
        )
    return None
