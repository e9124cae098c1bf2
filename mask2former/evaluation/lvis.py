"""LVIS' average precision (Gupta et al., "LVIS", 2019)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hotcoco
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator

from .truth import reading

__all__ = ["LVISInstanceEvaluator"]


class LVISInstanceEvaluator(LVISEvaluator):
    """AP of boxes ("bbox") and of masks ("segm"), also of rare, common and frequent classes.

    The arithmetic is hotcoco's: the package ``lvis`` uses names that NumPy has not had since version 1.24.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """
        Args:
            dataset_name: its metadata has ``json_file``, in LVIS' format.
            output_dir: gets ``instances_predictions.pth`` and ``lvis_instances_results.json``.

        Raises:
            UserError: the annotations can't be read.
        """
        json_file = MetadataCatalog.get(dataset_name).json_file
        with reading(f"annotations of data set '{dataset_name}'", json_file), _hotcoco_as_lvis():
            super().__init__(dataset_name, output_dir=output_dir)

    def evaluate(self) -> dict[str, Any] | None:
        """On the main process ``{"bbox" | "segm": {"AP": ..., "APr": ..., ...}}`` in percent; None on the others."""
        with _hotcoco_as_lvis():
            return super().evaluate()


@contextmanager
def _hotcoco_as_lvis() -> Iterator[None]:
    """``import lvis``, as Detectron2 does in its functions, finds hotcoco in the block."""
    installed = sys.modules.get("lvis")
    sys.modules["lvis"] = hotcoco
    try:
        yield
    finally:
        del sys.modules["lvis"]
        if installed is not None:
            sys.modules["lvis"] = installed
