"""Cityscapes' own metrics, computed by the package ``cityscapesscripts``."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detectron2.utils import comm

from ..data.datasets.cityscapes import require_cityscapesscripts
from ..results import semantic_labels
from .semantic import BestClasses

__all__ = ["CityscapesInstanceSegEvaluator", "CityscapesSemanticEvaluator"]


class CityscapesInstanceSegEvaluator(CityscapesInstanceEvaluator):
    """AP and AP50 of masks, as Detectron2's evaluator gives them, on CPUs and with every NumPy.

    ``reset``, before the first picture, raises ``UserError`` if ``cityscapesscripts`` isn't installed.
    """

    def reset(self) -> None:
        require_cityscapesscripts()
        super().reset()

    def evaluate(self) -> dict[str, Any] | None:
        """On the main process ``{"segm": {"AP": ..., "AP50": ...}}`` in percent; None on the others."""
        if not comm.is_main_process():
            return super().evaluate()
        tools = importlib.import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
        # It would write "matches.json" into the current folder, and fails at it under newer NumPy.
        with _replaced(vars(tools), "writeDict2JSON", lambda content, path: None), _replaced(vars(np), "in1d", np.isin):
            return super().evaluate()


class CityscapesSemanticEvaluator(CityscapesSemSegEvaluator):
    """IoU and iIoU of classes and of groups of classes, as Detectron2's evaluator gives them, on CPUs and every NumPy.

    ``reset``, before the first picture, raises ``UserError`` if ``cityscapesscripts`` isn't installed.
    """

    def reset(self) -> None:
        require_cityscapesscripts()
        super().reset()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch: ``outputs[i]["sem_seg"]``, scores (K, H, W) or classes (H, W)."""
        super().process(inputs, [{"sem_seg": BestClasses(semantic_labels(output["sem_seg"]))} for output in outputs])

    def evaluate(self) -> dict[str, Any] | None:
        """On the main process ``{"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup"}}``, in percent; else None."""
        with _replaced(vars(np), "in1d", np.isin):
            return super().evaluate()


@contextmanager
def _replaced(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """In the block ``names`` has ``value`` under ``name``.

    cityscapesscripts 2.3 calls ``numpy.in1d``, which NumPy 2.4 lacks; ``isin`` does the same.
    """
    missing = object()
    before = names.get(name, missing)
    names[name] = value
    try:
        yield
    finally:
        if before is missing:
            del names[name]
        else:
            names[name] = before
