"""The registry of transformer decoders, and the values of the config that all of them take."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["TRANSFORMER_DECODER_REGISTRY", "build_transformer_decoder", "common_arguments"]

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_MODULE")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders by name. One is built with ``(cfg, in_channels, mask_classification)`` and called with
``(feature maps, mask features, padding mask or None)``. It returns a ``Predictions``, or a dict with
``pred_logits`` (B, Q, K+1), ``pred_masks`` (B, Q, H/4, W/4) and optionally ``aux_outputs``, a list of dicts of
the first two for the earlier layers.
"""


def build_transformer_decoder(cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> nn.Module:
    """Build the decoder that ``MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME`` names."""
    name = cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
    return TRANSFORMER_DECODER_REGISTRY.get(name)(cfg, in_channels, mask_classification)


def common_arguments(cfg: CfgNode, in_channels: int, mask_classification: bool) -> dict[str, Any]:
    """Arguments of a decoder that mean the same in each."""
    mask_former = cfg.MODEL.MASK_FORMER
    return {
        "in_channels": in_channels,
        "mask_classification": mask_classification,
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "hidden_dim": mask_former.HIDDEN_DIM,
        "num_queries": mask_former.NUM_OBJECT_QUERIES,
        "nheads": mask_former.NHEADS,
        "dim_feedforward": mask_former.DIM_FEEDFORWARD,
        "pre_norm": mask_former.PRE_NORM,
        "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
        "enforce_input_project": mask_former.ENFORCE_INPUT_PROJ,
    }
