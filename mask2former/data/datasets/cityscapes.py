"""What Detectron2's Cityscapes loaders and evaluators need: the package ``cityscapesscripts``, under two names."""

import importlib
import inspect
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.evaluation import cityscapes_evaluation

from ...errors import UserError
from .coco_format import is_whole, load_json

__all__ = ["check_polygon_files", "require_cityscapesscripts"]

# Detectron2 since December 2024 imports cityscapesscripts from here, which exists in its authors' company alone.
_INTERNAL = "deeplearning.projects.cityscapesApi"
_MODULES = (
    "cityscapesscripts",
    "cityscapesscripts.helpers",
    "cityscapesscripts.helpers.labels",
    "cityscapesscripts.evaluation",
    "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
    "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
)


def require_cityscapesscripts() -> None:
    """Make ``cityscapesscripts`` importable for Detectron2. Raises ``UserError`` if it isn't installed."""
    if find_spec("cityscapesscripts") is None:
        raise UserError("Cityscapes needs the package cityscapesscripts: pip install cityscapesscripts")
    if _INTERNAL in inspect.getsource(cityscapes_evaluation):
        _answer_to_internal_name()


def check_polygon_files(folder: str) -> None:
    """Raise ``UserError`` for the first ``*_polygons.json`` below ``folder`` that is none of Cityscapes'."""
    labels = importlib.import_module("cityscapesscripts.helpers.labels").name2label
    for path in sorted(Path(folder).rglob("*_polygons.json")):
        content = load_json(path)
        sizes = [content.get("imgHeight"), content.get("imgWidth")] if isinstance(content, dict) else []
        if not sizes or not all(map(is_whole, sizes)) or not isinstance(content.get("objects"), list):
            raise UserError(f"'{path}': expected integers imgHeight and imgWidth, and a list objects: get it again")
        for number, item in enumerate(content["objects"], start=1):
            label = item.get("label") if isinstance(item, dict) else None
            if not isinstance(label, str) or (label not in labels and label.removesuffix("group") not in labels):
                raise UserError(f"'{path}': object {number} has the label {str(label)[:60]!r}, expected one of its own")
            if not _is_polygon(item.get("polygon")):
                raise UserError(f"'{path}': object {number} ({label}) has no polygon of three points [x, y] or more")


def _is_polygon(value: Any) -> bool:
    points = value if isinstance(value, list) else []
    return len(points) >= 3 and all(
        isinstance(point, list) and len(point) == 2 and all(type(x) in (int, float) and math.isfinite(x) for x in point)
        for point in points
    )


def _answer_to_internal_name() -> None:
    """Let Python find the modules of ``cityscapesscripts`` inside ``_INTERNAL`` too."""
    parts = _INTERNAL.split(".")
    for count in range(1, len(parts) + 1):
        package = ".".join(parts[:count])
        sys.modules.setdefault(package, ModuleType(package))
    for name in _MODULES:
        sys.modules.setdefault(f"{_INTERNAL}.{name}", importlib.import_module(name))
