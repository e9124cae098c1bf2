"""Cityscapes' own metrics, computed by the package ``cityscapesscripts``."""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detectron2.utils import comm

from ..data.datasets.cityscapes import require_cityscapesscripts
from ..data.images import read_label_map
from ..errors import UserError
from ..results import semantic_labels
from .semantic import BestClasses
from .truth import compare_sizes

__all__ = ["CityscapesInstanceSegEvaluator", "CityscapesSemanticEvaluator"]

# Height and width by the beginning of a picture's name.
Sizes = dict[str, tuple[int, int]]


class CityscapesInstanceSegEvaluator(CityscapesInstanceEvaluator):
    """AP and AP50 of masks, as Detectron2's evaluator gives them, on CPUs and with every NumPy.

    ``reset``, before the first picture, raises ``UserError`` if ``cityscapesscripts`` isn't installed.
    """

    def reset(self) -> None:
        require_cityscapesscripts()
        super().reset()
        self._sizes: Sizes = {}

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch: ``outputs[i]["instances"]``, on any device."""
        for picture, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                self._sizes[_stem(picture)] = output["instances"].image_size
        super().process(inputs, outputs)

    def evaluate(self) -> dict[str, Any] | None:
        """On the main process ``{"segm": {"AP": ..., "AP50": ...}}`` in percent; None on the others."""
        if not comm.is_main_process():
            return super().evaluate()
        _check_truth(self._metadata.gt_dir, ["instanceIds"], self._sizes)
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
        self._sizes: Sizes = {}

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Take in a batch: ``outputs[i]["sem_seg"]``, scores (K, H, W) or classes (H, W)."""
        for picture, output in zip(inputs, outputs, strict=True):
            self._sizes[_stem(picture)] = output["sem_seg"].shape[-2:]
        super().process(inputs, [{"sem_seg": BestClasses(semantic_labels(output["sem_seg"]))} for output in outputs])

    def evaluate(self) -> dict[str, Any] | None:
        """On the main process ``{"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup"}}``, in percent; else None."""
        if comm.is_main_process():
            _check_truth(self._metadata.gt_dir, ["labelIds", "instanceIds"], self._sizes)
        with _replaced(vars(np), "in1d", np.isin):
            return super().evaluate()


def _stem(picture: dict[str, Any]) -> str:
    """What the names of a picture's files begin with: city, sequence and frame."""
    return Path(picture["file_name"]).name.removesuffix("_leftImg8bit.png")


def _check_truth(folder: str, kinds: Sequence[str], sizes: Sizes) -> None:
    """Raise ``UserError`` for a PNG that Cityscapes' tools can't use, before they end the program or fail.

    ``sizes`` are those of the predictions.
    """
    labels = importlib.import_module("cityscapesscripts.helpers.labels").id2label
    for kind in kinds:
        ending = f"_gtFine_{kind}.png"
        for path in sorted(Path(folder).glob(f"*/*{ending}")):
            values = read_label_map(path)
            for value in np.flatnonzero(np.bincount(values.ravel())).tolist():
                if (value if value < 1000 else value // 1000) not in labels:
                    raise UserError(f"'{path}' has the value {value}, which is no label of Cityscapes': make it again")
            size = sizes.get(path.name.removesuffix(ending))
            if size is not None:
                compare_sizes(path.name.replace(ending, "_leftImg8bit.png"), str(path), tuple(size), values.shape)


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
