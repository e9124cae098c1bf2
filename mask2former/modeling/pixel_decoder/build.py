"""Builds the pixel decoder that a config names."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

__all__ = ["build_pixel_decoder"]


def build_pixel_decoder(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the pixel decoder ``MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`` of Detectron2's ``SEM_SEG_HEADS_REGISTRY``.

    A pixel decoder has a method ``forward_features(features)``, which takes the backbone's feature
    maps by name and returns the mask features (B, C, H/4, W/4), anything, and a list of feature
    maps for the transformer decoder, coarse to fine.

    Raises:
        TypeError: if the registered class has no such method.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    pixel_decoder = SEM_SEG_HEADS_REGISTRY.get(name)(cfg, input_shape)
    if not callable(getattr(pixel_decoder, "forward_features", None)):
        raise TypeError(f"pixel decoder {name} must have a method forward_features(features), and has none")
    return pixel_decoder
