"""COCO average precision of masks, and of boxes around them."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOeval_opt, COCOevalMaxDets
from detectron2.structures import BoxMode, Instances
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.annotations import check_segmentation
from ..data.datasets.coco_format import check_instances
from ..errors import UserError
from .truth import read_json, reading

__all__ = ["InstanceSegEvaluator", "complete_truth", "load_results"]

logger = logging.getLogger(__name__)

Result = dict[str, Any]  # one instance in COCO's result format


class InstanceSegEvaluator(COCOEvaluator):
    """AP of masks ("segm") and of boxes ("bbox"), by pycocotools' or Detectron2's implementation.

    What it adds to Detectron2's evaluator: masks are read one at a time, so any sequence of masks will
    do; boxes are made from the masks where the model gives none; thing classes may have any contiguous
    ids, and instances of the metadata's stuff classes are left out; ground truth may lack areas, boxes,
    crowd flags and usable ids; a model that finds nothing scores 0, not NaN. The per-category table
    names the categories of the JSON file, whatever else ``thing_classes`` lists.

    COCO counts at most 100 instances a picture and category, those with the highest scores. A model that gives more
    (``TEST.DETECTIONS_PER_IMAGE`` does not change this) is cut there unless ``max_dets_per_image``
    says otherwise.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        max_dets_per_image: int | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a data set with ``json_file`` in its metadata, or whose dicts Detectron2 can convert.
            output_dir: gets ``instances_predictions.pth`` and ``coco_instances_results.json``.
            distributed: gather the predictions of all ranks.
            max_dets_per_image: instances counted in a picture, for each category (None: COCO's 100).

        Raises:
            UserError: the annotations can't be read.
        """
        json_file = MetadataCatalog.get(dataset_name).get("json_file", "(made from the data set)")
        self._name = dataset_name
        what = f"annotations of data set '{dataset_name}'"
        if os.path.isfile(json_file):
            _check_truth(read_json(what, json_file), json_file)
        with reading(what, json_file):
            super().__init__(
                dataset_name,
                tasks=("bbox", "segm"),
                distributed=distributed,
                output_dir=output_dir,
                max_dets_per_image=max_dets_per_image,
                allow_cached_coco=False,
            )
        if self._do_evaluation:
            complete_truth(self._coco_api)

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch: ``outputs[i]["instances"]``, on any device.

        Fields: ``pred_masks`` (a sequence of (H, W) bool), ``scores``, contiguous ``pred_classes``, and
        optionally ``pred_boxes``. An output without "instances" is left out.
        """
        for picture, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                results = _coco_results(output["instances"], picture["image_id"])
                self._check_sizes(picture, results)
                self._predictions.append({"image_id": picture["image_id"], "instances": results})

    def _check_sizes(self, picture: dict[str, Any], results: list[Result]) -> None:
        truth = self._coco_api.imgs.get(picture["image_id"])
        if truth is None:
            raise UserError(
                f"{picture['file_name']} was evaluated with image_id {picture['image_id']!r}, "
                f"which {self._metadata.json_file} does not have"
            )
        expected = [truth.get("height"), truth.get("width")]
        for result in results:
            size = result["segmentation"]["size"]
            if None not in expected and size != expected:
                raise UserError(
                    f"the prediction for {picture['file_name']} has {size[0]}x{size[1]} pixels (height x width), "
                    f"but {self._metadata.json_file} says {expected[0]}x{expected[1]}"
                )

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[int] | None = None) -> None:
        """Fill ``self._results`` with ``{task: {metric: value}}``. Detectron2's ``evaluate`` calls this."""
        results = self._with_dataset_ids(chain.from_iterable(p["instances"] for p in predictions))
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            logger.info("Saving instances to %s", path)
            with PathManager.open(str(path), "w") as file:
                json.dump(results, file)
        if not self._do_evaluation:
            logger.info("%s has no annotations: nothing to compare the instances with", self._metadata.json_file)
            return
        if not results:
            logger.warning("No instance was predicted in %d pictures of '%s'", len(predictions), self._name)
        for task in self._tasks:
            coco_eval = self._evaluate_task(results, task, img_ids)
            self._results[task] = self._derive_coco_results(coco_eval, task, class_names=self._category_names())

    def _evaluate_task(self, results: list[Result], task: str, img_ids: list[int] | None) -> COCOeval:
        # With a box present COCO takes its area for the instance's; small, medium and large go by the mask's.
        dropped = {"bbox"} if task == "segm" else set()
        detections = load_results(self._coco_api, [_without(result, dropped) for result in results])
        implementation = COCOeval_opt if self._use_fast_impl else COCOeval
        if self._max_dets_per_image[2] != 100:  # COCOeval's summary knows no other limit
            implementation = COCOevalMaxDets
        coco_eval = implementation(self._coco_api, detections, task)
        coco_eval.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            coco_eval.params.imgIds = img_ids
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        return coco_eval

    def _contiguous_ids(self) -> dict[int, int]:
        """{dataset id: contiguous id} of the thing classes; where the metadata has none, Detectron2's order."""
        in_order = {category: i for i, category in enumerate(sorted(self._coco_api.getCatIds()))}
        return self._metadata.get("thing_dataset_id_to_contiguous_id", in_order)

    def _with_dataset_ids(self, results: Iterable[Result]) -> list[Result]:
        dataset_ids = {contiguous: dataset for dataset, contiguous in self._contiguous_ids().items()}
        stuff = set(self._metadata.get("stuff_dataset_id_to_contiguous_id", {}).values())
        converted = []
        for result in results:
            contiguous = result["category_id"]
            if contiguous in dataset_ids:
                converted.append({**result, "category_id": dataset_ids[contiguous]})
            elif contiguous not in stuff:
                raise UserError(
                    f"an instance of class {contiguous} was predicted, but data set '{self._name}' has "
                    f"{len(dataset_ids)} thing classes ({min(dataset_ids)} to {max(dataset_ids)}): "
                    "set MODEL.SEM_SEG_HEAD.NUM_CLASSES to what the data set has"
                )
        return converted

    def _category_names(self) -> list[str]:
        """Names of the JSON file's categories in the order of COCO's results, as the metadata calls them."""
        contiguous_ids = self._contiguous_ids()
        classes = self._metadata.get("thing_classes", [])
        # Where stuff classes come in between, as in ADE20K, things are named in their order, without gaps.
        if len(classes) == len(contiguous_ids):
            places = {contiguous: place for place, contiguous in enumerate(sorted(contiguous_ids.values()))}
        else:
            places = {contiguous: contiguous for contiguous in contiguous_ids.values() if contiguous < len(classes)}
        names = []
        for category in sorted(self._coco_api.getCatIds()):
            place = places.get(contiguous_ids.get(category, -1))
            names.append(self._coco_api.cats[category]["name"] if place is None else classes[place])
        return names


def _check_truth(content: Any, json_file: str) -> None:
    """Raise ``UserError`` for ground truth, if there is any in the file, that pycocotools can't use."""
    if not isinstance(content, dict) or "annotations" not in content:
        return
    check_instances(content, json_file, complete=False)
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        name = f"'{json_file}': annotation {annotation['id']}"
        image = images[annotation["image_id"]]
        if image.keys() >= {"height", "width"}:
            check_segmentation(annotation.get("segmentation"), image["height"], image["width"], name)


def complete_truth(coco: COCO) -> None:
    """Add to ground truth what COCO's evaluation reads and hand-made files lack, in place.

    Ids are numbered anew: COCOeval takes an annotation with id 0 for "no match".
    """
    coco.dataset.setdefault("info", {})
    for number, annotation in enumerate(coco.dataset["annotations"], start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation or "bbox" not in annotation:
            rle = coco.annToRLE(annotation)
            annotation.setdefault("area", float(mask_util.area(rle)))
            annotation.setdefault("bbox", mask_util.toBbox(rle).tolist())
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()


def _coco_results(instances: Instances, image_id: int) -> list[Result]:
    """Instances of one picture in COCO's result format, with contiguous category ids."""
    rles = [_encode(mask) for mask in instances.pred_masks]
    if instances.has("pred_boxes"):
        boxes = BoxMode.convert(instances.pred_boxes.tensor.cpu(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    else:
        boxes = [mask_util.toBbox(rle).tolist() for rle in rles]
    return [
        {
            "image_id": image_id,
            "category_id": category,
            "bbox": box,
            "score": score,
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},  # JSON has no bytes
        }
        for category, box, score, rle in zip(
            instances.pred_classes.tolist(), boxes, instances.scores.tolist(), rles, strict=True
        )
    ]


def _encode(mask: torch.Tensor) -> dict[str, Any]:
    """COCO RLE of an (H, W) bool mask."""
    return mask_util.encode(np.asfortranarray(mask.cpu().numpy(), dtype=np.uint8))


def _without(result: Result, keys: set[str]) -> Result:
    return {key: value for key, value in result.items() if key not in keys}


def load_results(truth: COCO, results: list[Result]) -> COCO:
    """``truth.loadRes``, which fails on an empty list, for any number of results."""
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            return truth.loadRes(results)
        nothing = COCO()
        nothing.dataset = {**truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing
