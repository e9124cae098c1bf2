"""Transformer decoders: from feature maps and mask features to class logits and masks."""

from .build import TRANSFORMER_DECODER_REGISTRY, build_transformer_decoder
from .masked import MultiScaleMaskedTransformerDecoder
from .standard import StandardTransformerDecoder

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "MultiScaleMaskedTransformerDecoder",
    "StandardTransformerDecoder",
    "build_transformer_decoder",
]
