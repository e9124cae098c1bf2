"""Mean intersection over union on data sets with label PNGs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from ..data.annotations import decode_segmentation
from ..data.images import read_label_map
from ..errors import UserError
from ..results import Labels, semantic_labels
from .truth import check_size

__all__ = ["BestClasses", "SemanticEvaluator", "paint_predictions", "read_truth"]


class BestClasses:
    """Classes (H, W) for Detectron2's evaluators, which ask scores for the best one."""

    def __init__(self, labels: Labels) -> None:
        self._labels = torch.from_numpy(labels)

    def argmax(self, dim: int) -> torch.Tensor:
        """The classes, as of scores whose first dimension is that of classes."""
        return self._labels


class SemanticEvaluator(SemSegEvaluator):
    """mIoU, fwIoU, mACC, pACC and the figures of each class, in percent, over the metadata's ``stuff_classes``.

    What it adds to Detectron2's evaluator: it runs under NumPy 2, and data that don't fit the model are
    named by file and value.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None, *, distributed: bool = True) -> None:
        """
        Args:
            dataset_name: its dicts have ``sem_seg_file_name``, its metadata ``stuff_classes`` and ``ignore_label``.
            output_dir: gets ``sem_seg_predictions.json`` and ``sem_seg_evaluation.pth``.
            distributed: sum over all ranks.

        Raises:
            UserError: the data set has no label PNGs.
        """
        try:
            super().__init__(dataset_name, distributed, output_dir, sem_seg_loading_fn=self._load)
        except KeyError as error:
            if error.args != ("sem_seg_file_name",):
                raise
            raise UserError(
                f"data set '{dataset_name}' has no label PNGs (sem_seg_file_name) to evaluate semantic output with: "
                "set MODEL.MASK_FORMER.TEST.SEMANTIC_ON to False or register them"
            ) from error

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch: ``outputs[i]["sem_seg"]``, scores (K, H, W) or classes (H, W)."""
        predictions = []
        for picture, output in zip(inputs, outputs, strict=True):
            *classes, height, width = output["sem_seg"].shape
            if classes:
                self._check_classes(classes[0])
            check_size(picture["file_name"], self.input_file_to_gt_file[picture["file_name"]], (height, width))
            labels = semantic_labels(output["sem_seg"])
            if labels.max() >= self._num_classes:
                self._check_classes(int(labels.max()) + 1)
            predictions.append({"sem_seg": BestClasses(labels)})
        super().process(inputs, predictions)

    def _check_classes(self, predicted: int) -> None:
        if predicted != self._num_classes:
            raise UserError(
                f"the model predicts {predicted} classes, but data set '{self._dataset_name}' has "
                f"{self._num_classes}: set MODEL.SEM_SEG_HEAD.NUM_CLASSES to {self._num_classes}"
            )

    def _load(self, file_name: str, dtype: npt.DTypeLike = int) -> np.ndarray:
        return read_truth(file_name, MetadataCatalog.get(self._dataset_name), dtype)


def read_truth(path: str, metadata: Metadata, dtype: npt.DTypeLike = int) -> np.ndarray:
    """The classes (H, W) of a label PNG, with their number for pixels that are ignored.

    Raises:
        UserError: the file can't be read, or has a label that is none of the data set's.
    """
    num_classes = len(metadata.stuff_classes)
    labels = read_label_map(path, dtype)
    ignored = labels == metadata.ignore_label
    wrong = labels[(labels >= num_classes) & ~ignored]
    if wrong.size:
        raise UserError(
            f"{path} has the label {wrong[0]}: data set '{metadata.name}' has the labels 0 to {num_classes - 1} and "
            f"{metadata.ignore_label} (ignored)"
        )
    labels[ignored] = num_classes
    return labels


def paint_predictions(
    predictions: Sequence[dict[str, Any]], size: tuple[int, int], metadata: Metadata, picture: str
) -> np.ndarray:
    """The classes (H, W) that a picture's records of ``sem_seg_predictions.json`` give, with their number elsewhere.

    Raises:
        UserError: one is for another size or of a class that the data set does not have; ``picture`` is named.
    """
    num_classes = len(metadata.stuff_classes)
    contiguous_ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {i: i for i in range(num_classes)}
    height, width = size
    classes = np.full(size, num_classes)
    for prediction in predictions:
        category = prediction["category_id"]
        if category not in contiguous_ids:
            raise UserError(
                f"picture {picture} has a prediction of category_id {category}, which data set '{metadata.name}' does "
                "not have: give the data set that it was made for"
            )
        name = f"category {category} of picture {picture}"
        mask = decode_segmentation(prediction["segmentation"], height, width, name)
        classes[mask] = contiguous_ids[category]
    return classes
