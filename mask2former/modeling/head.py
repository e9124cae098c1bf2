"""The head: pixel decoder and transformer decoder."""

from typing import Any, Protocol

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from .pixel_decoder import build_pixel_decoder
from .predictions import Predictions
from .transformer_decoder import build_transformer_decoder

__all__ = ["MaskFormerHead"]


class PixelDecoder(Protocol):
    """What the head asks of a pixel decoder, a module."""

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Any, list[Tensor]]:
        """Mask features (B, C, H/4, W/4), anything, and feature maps from coarse to fine."""


@SEM_SEG_HEADS_REGISTRY.register()
class MaskFormerHead(nn.Module):
    """From backbone features to predictions.

    Args:
        pixel_decoder: see :func:`pixel_decoder.build_pixel_decoder`.
        transformer_predictor: a transformer decoder, see ``TRANSFORMER_DECODER_REGISTRY``.
        transformer_in_feature: what the transformer decoder attends to: "multi_scale_pixel_decoder" (the
            pixel decoder's maps), "transformer_encoder" (its second result), "pixel_embedding" (the mask
            features), or the name of a backbone feature.
        num_classes: K, without "no object".
    """

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
        in_feature = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
        if in_feature in ("multi_scale_pixel_decoder", "transformer_encoder"):
            in_channels = head.CONVS_DIM
        elif in_feature == "pixel_embedding":
            in_channels = head.MASK_DIM
        else:
            in_channels = input_shape[in_feature].channels
        used = {name: shape for name, shape in input_shape.items() if name in head.IN_FEATURES}
        return {
            "pixel_decoder": build_pixel_decoder(cfg, used),
            "transformer_predictor": build_transformer_decoder(cfg, in_channels, mask_classification=True),
            "transformer_in_feature": in_feature,
            "num_classes": head.NUM_CLASSES,
        }

    def forward(self, features: dict[str, Tensor], mask: Tensor | None = None) -> Predictions:
        """Predict classes and masks from backbone features by name."""
        mask_features, encoded, maps = self.pixel_decoder.forward_features(features)
        sources = {
            "multi_scale_pixel_decoder": maps,
            "transformer_encoder": encoded,
            "pixel_embedding": mask_features,
        }
        source = sources.get(self.transformer_in_feature)
        if source is None:
            source = features[self.transformer_in_feature]
        return Predictions.from_outputs(self.predictor(source, mask_features, mask))
