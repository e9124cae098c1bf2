"""Detectron2 evaluators for semantic, instance and panoptic output."""

from .builder import build_evaluator
from .instance import InstanceSegEvaluator
from .panoptic import PanopticEvaluator
from .semantic import SemanticEvaluator

__all__ = ["InstanceSegEvaluator", "PanopticEvaluator", "SemanticEvaluator", "build_evaluator"]
