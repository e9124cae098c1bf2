"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", 2019) on data sets in COCO's panoptic format."""

import io
import itertools
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from hotcoco.panoptic import PanopticEval
from PIL import Image
from tabulate import tabulate

from ..errors import UserError
from .truth import check_size, read_json

__all__ = ["PanopticEvaluator"]

logger = logging.getLogger(__name__)

# Detectron2's suffix of a result's name, for each group of categories.
GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}
METRICS = ("pq", "sq", "rq")


class PanopticEvaluator(COCOPanopticEvaluator):
    """PQ, SQ and RQ over all, thing and stuff categories, in percent, as Detectron2's evaluator names them.

    The arithmetic is hotcoco's, which needs no ``panopticapi``. All pictures of the data set's panoptic
    JSON must have been predicted. A group of which no category is in the ground truth or the
    predictions scores NaN.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: its metadata has ``panoptic_json``, ``panoptic_root`` and the dictionaries from
                dataset to contiguous ids of things and stuff.
            output_dir: gets ``predictions.json``, in COCO's panoptic result format.

        Raises:
            UserError: the panoptic JSON can't be read, or has segments of a category that it does not list.
        """
        super().__init__(dataset_name, output_dir)
        self._name = dataset_name
        truth = read_json(f"panoptic annotations of data set '{dataset_name}'", self._metadata.panoptic_json)
        self._images = truth["images"]
        self._categories = truth["categories"]
        self._truth_files = {a["image_id"]: a["file_name"] for a in truth["annotations"]}
        self._check_categories(truth["annotations"])

    def _check_categories(self, annotations: list[dict[str, Any]]) -> None:
        known = {category["id"] for category in self._categories}
        for annotation in annotations:
            for segment in annotation["segments_info"]:
                if segment["category_id"] not in known:
                    raise UserError(
                        f"{self._metadata.panoptic_json}: segment {segment['id']} of {annotation['file_name']} has "
                        f"category_id {segment['category_id']}, which is not in its categories"
                    )

    def reset(self) -> None:
        self._predictions: list[dict[str, Any]] = []

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch: ``outputs[i]["panoptic_seg"]`` = ((H, W) segment ids, 0 = none; list of segments).

        A segment has "id", "isthing" and the contiguous "category_id". Pictures that the panoptic JSON
        does not have are left out.
        """
        for picture, output in zip(inputs, outputs, strict=True):
            file_name = self._truth_files.get(picture["image_id"])
            if file_name is None:
                continue
            segment_ids = output["panoptic_seg"][0].cpu().numpy()
            truth_file = str(Path(self._metadata.panoptic_root) / file_name)
            check_size(picture["file_name"], truth_file, segment_ids.shape)
            self._predictions.append(
                {
                    "image_id": picture["image_id"],
                    "file_name": file_name,
                    "png_string": _to_png(segment_ids),
                    "segments_info": self._segments_info(segment_ids, output["panoptic_seg"][1]),
                }
            )

    def _segments_info(self, segment_ids: np.ndarray, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The segments with dataset ids. One without a pixel is left out: the file format forbids it."""
        seen = set(np.flatnonzero(np.bincount(segment_ids.ravel())).tolist()) - {0}
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
        comm.synchronize()
        gathered = comm.gather(self._predictions)
        if not comm.is_main_process():
            return None
        self._predictions = list(itertools.chain.from_iterable(gathered))
        self._check_complete()
        quality = self._quality()
        logger.info("Panoptic quality on %s:\n%s", self._name, _group_table(quality))
        logger.info("Panoptic quality by category:\n%s", _category_table(quality, self._categories))
        return {
            "panoptic_seg": {
                metric.upper() + suffix: _percent(quality[group], metric)
                for group, suffix in GROUPS.items()
                for metric in METRICS
            }
        }

    def _check_complete(self) -> None:
        missing = self._truth_files.keys() - {p["image_id"] for p in self._predictions}
        if missing:
            first = min(missing)
            raise UserError(
                f"no panoptic prediction for {self._truth_files[first]} (image_id {first}) and "
                f"{len(missing) - 1} other pictures of {self._metadata.panoptic_json}: "
                f"evaluation needs all {len(self._truth_files)} of them"
            )

    def _quality(self) -> dict[str, Any]:
        """hotcoco's results: {"All" | "Things" | "Stuff": {"pq", "sq", "rq", "n"}, "per_class": {id: {...}}}."""
        with tempfile.TemporaryDirectory(prefix="panoptic_eval") as folder:
            annotations = []
            for prediction in self._predictions:
                path = Path(folder) / prediction["file_name"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(prediction["png_string"])
                annotations.append({k: prediction[k] for k in ("image_id", "file_name", "segments_info")})
            if self._output_dir:
                content = {"images": self._images, "categories": self._categories, "annotations": annotations}
                with PathManager.open(f"{self._output_dir}/predictions.json", "w") as file:
                    json.dump(content, file)
            truth = read_json("panoptic annotations", self._metadata.panoptic_json)
            evaluation = PanopticEval(
                self._numbered(truth["annotations"]),
                self._numbered(annotations),
                gt_folder=PathManager.get_local_path(self._metadata.panoptic_root),
                pred_folder=folder,
            )
            evaluation.evaluate()
            return evaluation.results()

    def _numbered(self, annotations: list[dict[str, Any]]) -> dict[str, Any]:
        """COCO's panoptic format with numbers for ids of pictures: hotcoco takes no names, as in ADE20K, for them."""
        numbers = {image_id: number for number, image_id in enumerate(self._truth_files)}
        return {
            "images": [{**image, "id": numbers[image["id"]]} for image in self._images if image["id"] in numbers],
            "annotations": [{**annotation, "image_id": numbers[annotation["image_id"]]} for annotation in annotations],
            "categories": self._categories,
        }


def _to_png(segment_ids: np.ndarray) -> bytes:
    """The (H, W) ids as COCO's panoptic PNG: id = red + 256 * green + 256**2 * blue."""
    colors = np.stack([segment_ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    with io.BytesIO() as out:
        Image.fromarray(colors).save(out, format="PNG")
        return out.getvalue()


def _percent(values: dict[str, float], metric: str) -> float:
    # hotcoco marks what can't be computed with -1.
    return 100 * values[metric] if values[metric] >= 0 else float("nan")


def _group_table(quality: dict[str, Any]) -> str:
    rows = [[group, *(_percent(quality[group], m) for m in METRICS), quality[group]["n"]] for group in GROUPS]
    return tabulate(rows, headers=["", "PQ", "SQ", "RQ", "#categories"], tablefmt="pipe", floatfmt=".3f")


def _category_table(quality: dict[str, Any], categories: list[dict[str, Any]]) -> str:
    """One row for each category that is in the ground truth or in the predictions."""
    names = {category["id"]: category["name"] for category in categories}
    rows = [
        [names[category], *(_percent(values, metric) for metric in METRICS)]
        for category, values in quality["per_class"].items()
        if values["tp"] + values["fp"] + values["fn"]
    ]
    return tabulate(rows, headers=["category", "PQ", "SQ", "RQ"], tablefmt="pipe", floatfmt=".3f")
