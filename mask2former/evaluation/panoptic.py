"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", 2019) on data sets in COCO's panoptic format."""

import json
import logging
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from ..data.datasets.coco_format import check_categories, check_panoptic
from ..errors import UserError
from .panoptic_quality import VOID, Overlaps, SegmentCounts, TruthSegment, count_overlaps, count_segments
from .quality import Quality
from .truth import compare_sizes, read_json, read_segment_ids

__all__ = ["PanopticEvaluator"]

logger = logging.getLogger(__name__)

METRICS = ("pq", "sq", "rq")


class Truth(NamedTuple):
    """A picture's ground truth: the name of its PNG, and its segments by their ids there."""

    file_name: str
    segments: dict[int, TruthSegment]


class Judged(NamedTuple):
    """A predicted picture: its segments as files have them, and the counts of each category."""

    segments_info: list[dict[str, int]]
    counts: dict[int, SegmentCounts]


class PanopticEvaluator(COCOPanopticEvaluator):
    """PQ, SQ and RQ over all, thing and stuff categories, in percent, as Detectron2's evaluator names them.

    Each picture is compared with its ground truth in the background, while the model is at the next ones, from memory:
    without files of predictions or ``panopticapi``. All pictures of the data set's panoptic JSON must have been
    predicted; one that several ranks predicted counts once. A group of which no category is in the ground truth or the
    predictions scores NaN.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, threads: int = 2) -> None:
        """
        Args:
            dataset_name: its metadata has ``panoptic_json``, ``panoptic_root`` and the dictionaries from
                dataset to contiguous ids of things and stuff.
            output_dir: gets ``predictions.json``, in COCO's panoptic result format.
            threads: in which pictures are compared, one in each.

        Raises:
            UserError: the panoptic JSON can't be read, or has segments of a category that it does not list.
        """
        super().__init__(dataset_name, output_dir)
        self._name = dataset_name
        path = self._metadata.panoptic_json
        truth = read_json(f"panoptic annotations of data set '{dataset_name}'", path)
        check_panoptic(truth, path, pictures_named=False)
        known = check_categories(truth.get("categories"), path, with_kind=True)
        self._images = truth["images"]
        self._categories = truth["categories"]
        self._things = np.array([bool(category["isthing"]) for category in self._categories])
        self._truth = {a["image_id"]: Truth(a["file_name"], self._segments(a, known)) for a in truth["annotations"]}
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def _segments(self, annotation: dict[str, Any], categories: Collection[int]) -> dict[int, TruthSegment]:
        for segment in annotation["segments_info"]:
            if segment["category_id"] not in categories:
                raise UserError(
                    f"{self._metadata.panoptic_json}: segment {segment['id']} of {annotation['file_name']} has "
                    f"category_id {segment['category_id']}, which is not in its categories"
                )
        return {
            s["id"]: TruthSegment(s["category_id"], bool(s.get("iscrowd", 0)), s.get("area", 0))
            for s in annotation["segments_info"]
        }

    def reset(self) -> None:
        self._judged: dict[Any, Judged] = {}  # by the pictures' ids
        self._pending: deque[tuple[Any, Future[Judged]]] = deque()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch: ``outputs[i]["panoptic_seg"]`` = ((H, W) segment ids, 0 = none; list of segments).

        A segment has "id", "isthing" and the contiguous "category_id". Pictures that the panoptic JSON
        does not have are left out.
        """
        for picture, output in zip(inputs, outputs, strict=True):
            truth = self._truth.get(picture["image_id"])
            if truth is None:
                continue
            ids, segments = output["panoptic_seg"]
            # Copies, because the outputs are the caller's again after this.
            given = ids.to("cpu", copy=True).numpy(), [dict(segment) for segment in segments]
            future = self._pool.submit(self._judge, picture["file_name"], truth, *given)
            self._pending.append((picture["image_id"], future))
            self._collect(leave=self._threads)

    def _collect(self, leave: int) -> None:
        """Wait for the oldest pictures until only ``leave`` are pending; their errors are raised here."""
        while len(self._pending) > leave:
            image_id, future = self._pending.popleft()
            self._judged[image_id] = future.result()

    def _judge(self, name: str, truth: Truth, ids: np.ndarray, segments: list[dict[str, Any]]) -> Judged:
        truth_file = str(Path(self._metadata.panoptic_root) / truth.file_name)
        truth_ids = read_segment_ids(truth_file)
        compare_sizes(name, truth_file, ids.shape, truth_ids.shape)
        overlaps = count_overlaps(truth_ids, ids)
        segments_info = self._segments_info(overlaps, segments)
        categories = {segment["id"]: segment["category_id"] for segment in segments_info}
        return Judged(segments_info, count_segments(overlaps, truth.segments, categories))

    def _segments_info(self, overlaps: Overlaps, segments: list[dict[str, Any]]) -> list[dict[str, int]]:
        """The segments with dataset ids. One without a pixel is left out: the file format forbids it."""
        seen = {predicted_id for _, predicted_id in overlaps} - {VOID}
        unknown = seen - {segment["id"] for segment in segments}
        if unknown:
            raise ValueError(f"panoptic_seg has pixels of segments {sorted(unknown)}, which its list of segments lacks")
        return [
            {"id": int(segment["id"]), "category_id": self._dataset_id(segment)}
            for segment in segments
            if segment["id"] in seen
        ]

    def _dataset_id(self, segment: dict[str, Any]) -> int:
        things, stuff = self._thing_contiguous_id_to_dataset_id, self._stuff_contiguous_id_to_dataset_id
        ids = things if segment["isthing"] else stuff
        if segment["category_id"] not in ids:
            kind = "thing" if segment["isthing"] else "stuff"
            raise UserError(
                f"a {kind} segment of class {segment['category_id']} was predicted, which data set '{self._name}' does "
                "not have: set MODEL.SEM_SEG_HEAD.NUM_CLASSES to its number of classes"
            )
        return ids[segment["category_id"]]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """On the main process ``{"panoptic_seg": {"PQ": ..., "SQ": ..., "RQ": ..., "PQ_th": ..., ...}}``.

        Returns None on the others.

        Raises:
            UserError: a picture of the panoptic JSON was not predicted.
        """
        self._collect(leave=0)
        comm.synchronize()
        gathered = comm.gather(self._judged)
        if not comm.is_main_process():
            return None
        # A sampler may give a picture to several ranks, to give all the same number.
        self._judged = {image_id: judged for part in gathered for image_id, judged in part.items()}
        self._check_complete()
        if self._output_dir:
            self._write_predictions()
        quality = self.quality()
        # Detectron2's suffix of a result's name, and which categories a group has.
        groups = {"All": ("", self._things | True), "Things": ("_th", self._things), "Stuff": ("_st", ~self._things)}
        logger.info("Panoptic quality on %s:\n%s", self._name, _group_table(quality, groups))
        logger.info("Panoptic quality by category:\n%s", _category_table(quality, self._categories))
        return {
            "panoptic_seg": {
                metric.upper() + suffix: quality.mean(metric, among)
                for suffix, among in groups.values()
                for metric in METRICS
            }
        }

    def _check_complete(self) -> None:
        missing = self._truth.keys() - self._judged.keys()
        if missing:
            first = min(missing)
            raise UserError(
                f"no panoptic prediction for {self._truth[first].file_name} (image_id {first}) and "
                f"{len(missing) - 1} other pictures of {self._metadata.panoptic_json}: "
                f"evaluation needs all {len(self._truth)} of them"
            )

    def _write_predictions(self) -> None:
        annotations = [
            {"image_id": image_id, "file_name": self._truth[image_id].file_name, "segments_info": judged.segments_info}
            for image_id, judged in self._judged.items()
        ]
        content = {"images": self._images, "categories": self._categories, "annotations": annotations}
        with PathManager.open(f"{self._output_dir}/predictions.json", "w") as file:
            json.dump(content, file)

    def quality(self) -> Quality:
        """The figures of the JSON's categories, in their order, after ``evaluate`` on the main process."""
        total: dict[int, SegmentCounts] = defaultdict(SegmentCounts)
        for image_id in self._truth:  # in one order, whichever rank had a picture, for the same sums
            for category, counts in self._judged[image_id].counts.items():
                total[category] += counts
        of_categories = [total[category["id"]] for category in self._categories]
        return Quality.from_counts(
            iou_sum=np.array([counts.iou_sum for counts in of_categories]),
            matched=np.array([counts.matched for counts in of_categories]),
            missed=np.array([counts.missed for counts in of_categories]),
            wrong=np.array([counts.wrong for counts in of_categories]),
        )


def _group_table(quality: Quality, groups: dict[str, tuple[str, np.ndarray]]) -> str:
    rows = [
        [name, *(quality.mean(metric, among) for metric in METRICS), int((quality.found & among).sum())]
        for name, (_, among) in groups.items()
    ]
    return tabulate(rows, headers=["", "PQ", "SQ", "RQ", "#categories"], tablefmt="pipe", floatfmt=".3f")


def _category_table(quality: Quality, categories: list[dict[str, Any]]) -> str:
    """One row for each category that is in the ground truth or in the predictions."""
    rows = [
        [category["name"], *row]
        for category, found, *row in zip(categories, quality.found, quality.pq, quality.sq, quality.rq, strict=True)
        if found
    ]
    return tabulate(rows, headers=["category", "PQ", "SQ", "RQ"], tablefmt="pipe", floatfmt=".3f")
