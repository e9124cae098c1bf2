"""Mean intersection over union on data sets with label PNGs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.evaluation import SemSegEvaluator

from ..data.images import read_label_map
from ..errors import UserError
from .truth import check_size

__all__ = ["SemanticEvaluator"]


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
        """Take in a batch: ``outputs[i]["sem_seg"]``, scores (K, H, W)."""
        for picture, output in zip(inputs, outputs, strict=True):
            classes, *size = output["sem_seg"].shape
            if classes != self._num_classes:
                raise UserError(
                    f"the model predicts {classes} classes, but data set '{self._dataset_name}' has "
                    f"{self._num_classes}: set MODEL.SEM_SEG_HEAD.NUM_CLASSES to {self._num_classes}"
                )
            check_size(picture["file_name"], self.input_file_to_gt_file[picture["file_name"]], tuple(size))
        super().process(inputs, outputs)

    def _load(self, file_name: str, dtype: npt.DTypeLike = int) -> np.ndarray:
        """Labels (H, W) of a PNG: below the number of classes, or the ignore label."""
        labels = read_label_map(file_name, dtype)
        wrong = labels[(labels >= self._num_classes) & (labels != self._ignore_label)]
        if wrong.size:
            raise UserError(
                f"{file_name} has the label {wrong[0]}: data set '{self._dataset_name}' has the labels "
                f"0 to {self._num_classes - 1} and {self._ignore_label} (ignored)"
            )
        return labels
