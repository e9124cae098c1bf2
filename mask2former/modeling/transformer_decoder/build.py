"""The registry of transformer decoders."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["TRANSFORMER_DECODER_REGISTRY", "build_transformer_decoder"]

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
