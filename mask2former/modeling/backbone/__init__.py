"""Backbones that Detectron2 lacks."""

from .timm import TimmBackbone

__all__ = ["TimmBackbone"]
