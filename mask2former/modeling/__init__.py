"""The model's parts. Importing this package registers them in Detectron2's registries."""

from .backbone import D2SwinTransformer, TimmBackbone
from .criterion import SetCriterion
from .head import MaskFormerHead
from .inference import InferenceSettings
from .matcher import HungarianMatcher
from .meta_arch import MaskFormer
from .per_pixel import PerPixelBaselineHead, PerPixelBaselinePlusHead
from .pixel_decoder import (
    BasePixelDecoder,
    MSDeformAttnPixelDecoder,
    TransformerEncoderPixelDecoder,
    build_pixel_decoder,
)
from .predictions import Predictions
from .test_time_augmentation import SemanticSegmentorWithTTA
from .transformer_decoder import (
    TRANSFORMER_DECODER_REGISTRY,
    MultiScaleMaskedTransformerDecoder,
    StandardTransformerDecoder,
    build_transformer_decoder,
)

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "BasePixelDecoder",
    "D2SwinTransformer",
    "HungarianMatcher",
    "InferenceSettings",
    "MSDeformAttnPixelDecoder",
    "MaskFormer",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "PerPixelBaselineHead",
    "PerPixelBaselinePlusHead",
    "Predictions",
    "SemanticSegmentorWithTTA",
    "SetCriterion",
    "StandardTransformerDecoder",
    "TimmBackbone",
    "TransformerEncoderPixelDecoder",
    "build_pixel_decoder",
    "build_transformer_decoder",
]
