"""The head: pixel decoder and transformer decoder."""

from typing import Any, Protocol

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ..errors import UserError
from .old_names import RenamesOldWeights
from .pixel_decoder import build_pixel_decoder
from .predictions import Predictions
from .transformer_decoder import build_transformer_decoder

__all__ = ["MaskFormerHead", "PixelDecoder", "transformer_in_channels", "transformer_input"]

DecodedFeatures = tuple[Tensor, Any, list[Tensor]]  # what a pixel decoder makes


class PixelDecoder(Protocol):
    """What the head asks of a pixel decoder, a module."""

    def forward_features(self, features: dict[str, Tensor]) -> DecodedFeatures:
        """Mask features (B, C, H/4, W/4), anything, and feature maps from coarse to fine."""


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(RenamesOldWeights):
    """From backbone features to predictions.

    Args:
        pixel_decoder: see :func:`pixel_decoder.build_pixel_decoder`.
        transformer_predictor: a transformer decoder, see ``TRANSFORMER_DECODER_REGISTRY``.
        transformer_in_feature: what the transformer decoder attends to: "multi_scale_pixel_decoder" (the
            pixel decoder's maps), "transformer_encoder" (its second result), "pixel_embedding" (the mask
            features), or the name of a backbone feature.
        num_classes: K, without "no object".
    """

    renamed = {"": "pixel_decoder."}  # its parts were the head's own

    @configurable
    def __init__(
        self,
        *,
        pixel_decoder: PixelDecoder,
        transformer_predictor: nn.Module,
        transformer_in_feature: str = "multi_scale_pixel_decoder",
        num_classes: int,
    ) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = transformer_predictor
        self.transformer_in_feature = transformer_in_feature
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        in_channels = transformer_in_channels(cfg, input_shape)
        return {
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "transformer_predictor": build_transformer_decoder(cfg, in_channels, mask_classification=True),
            "transformer_in_feature": cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE,
            "num_classes": head.NUM_CLASSES,
        }

    def forward(self, features: dict[str, Tensor], mask: Tensor | None = None) -> Predictions:
        """Predict classes and masks from backbone features by name."""
        decoded = self.pixel_decoder.forward_features(features)
        source = transformer_input(self.transformer_in_feature, features, decoded)
        return Predictions.from_outputs(self.predictor(source, decoded[0], mask))


def transformer_in_channels(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> int:
    """Channels of what ``MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE`` names."""
    name = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
    channels = {
        "multi_scale_pixel_decoder": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
        "transformer_encoder": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
        "pixel_embedding": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
        **{feature: shape.channels for feature, shape in input_shape.items()},
    }
    if name not in channels:
        raise UserError(f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {name!r}, expected one of {', '.join(channels)}")
    return channels[name]


def transformer_input(name: str, features: dict[str, Tensor], decoded: DecodedFeatures) -> Any:
    """What the transformer decoder attends to, see ``transformer_in_feature`` of ``MaskFormerHead``.

    Raises:
        UserError: if the pixel decoder has no transformer encoder that would make it.
    """
    mask_features, encoded, maps = decoded
    if name == "multi_scale_pixel_decoder":
        return maps
    if name == "pixel_embedding":
        return mask_features
    if name == "transformer_encoder":
        if encoded is None:
            raise UserError(
                'MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is "transformer_encoder", but the pixel decoder has no '
                'encoder: set MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME to "TransformerEncoderPixelDecoder"'
            )
        return encoded
    return features[name]
