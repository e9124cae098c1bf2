"""Backbones that Detectron2 lacks."""

from .swin import D2SwinTransformer
from .timm import TimmBackbone

__all__ = ["D2SwinTransformer", "TimmBackbone"]
