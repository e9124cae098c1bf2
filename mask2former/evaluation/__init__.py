"""Detectron2 evaluators for semantic, instance and panoptic output."""

from .builder import build_evaluator, can_evaluate, takes_labels
from .cityscapes import CityscapesInstanceSegEvaluator, CityscapesSemanticEvaluator
from .instance import InstanceSegEvaluator
from .lvis import LVISInstanceEvaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator

__all__ = [
    "CityscapesInstanceSegEvaluator",
    "CityscapesSemanticEvaluator",
    "InstanceSegEvaluator",
    "LVISInstanceEvaluator",
    "PanopticEvaluator",
    "SemanticEvaluator",
    "build_evaluator",
    "can_evaluate",
    "takes_labels",
]
