"""What Detectron2's Cityscapes loaders and evaluators need: the package ``cityscapesscripts``, under two names."""

import importlib
import inspect
import sys
from importlib.util import find_spec
from types import ModuleType

from detectron2.evaluation import cityscapes_evaluation

from ...errors import UserError

__all__ = ["require_cityscapesscripts"]

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


def _answer_to_internal_name() -> None:
    """Let Python find the modules of ``cityscapesscripts`` inside ``_INTERNAL`` too."""
    parts = _INTERNAL.split(".")
    for count in range(1, len(parts) + 1):
        package = ".".join(parts[:count])
        sys.modules.setdefault(package, ModuleType(package))
    for name in _MODULES:
        sys.modules.setdefault(f"{_INTERNAL}.{name}", importlib.import_module(name))
