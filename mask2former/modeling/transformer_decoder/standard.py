"""MaskFormer's transformer decoder: queries that read one feature map, without masks (its paper, section 3.3).

Letters: ``B`` batch, ``Q`` queries, ``C`` channels, ``K`` classes, ``L`` predictions, one after each decoder layer.
"""

from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...errors import UserError
from ..position_encoding import PositionEmbeddingSine
from ..predictions import Predictions
from ..transformer import Transformer
from .build import TRANSFORMER_DECODER_REGISTRY, common_arguments
from .layers import MLP, input_projection

__all__ = ["StandardTransformerDecoder"]


@TRANSFORMER_DECODER_REGISTRY.register()
class StandardTransformerDecoder(nn.Module):
    """The transformer of DETR on a feature map, and a class and a mask for each of its queries.

    Args:
        in_channels: channels of the feature map.
        mask_classification: whether queries are classified; if not, there is no class head.
        num_classes: K, without "no object".
        hidden_dim: width of the queries.
        num_queries: Q.
        nheads: attention heads.
        dropout: share of attention weights, hidden units and changes that training leaves out.
        dim_feedforward: width of the feed-forward layers.
        enc_layers: encoder layers on the feature map, 0 or more.
        dec_layers: decoder layers; predictions are made after each.
        pre_norm: norm before attention and feed-forward instead of after.
        deep_supervision: predict after every decoder layer, or after the last alone.
        mask_dim: channels of the mask features.
        enforce_input_project: project the feature map although it has ``hidden_dim`` channels already.
    """

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int = 256,
        num_queries: int = 100,
        nheads: int = 8,
        dropout: float = 0.1,
        dim_feedforward: int = 2048,
        enc_layers: int = 0,
        dec_layers: int = 6,
        pre_norm: bool = False,
        deep_supervision: bool = True,
        mask_dim: int = 256,
        enforce_input_project: bool = False,
    ) -> None:
        super().__init__()
        if dec_layers < 1:
            raise UserError(f"dec_layers (MASK_FORMER.DEC_LAYERS) must be at least 1, but is {dec_layers}")
        self.deep_supervision = deep_supervision
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
        self.transformer = Transformer(
            d_model=hidden_dim,
            nhead=nheads,
            num_encoder_layers=enc_layers,
            num_decoder_layers=dec_layers,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            pre_norm=pre_norm,
        )
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = input_projection(in_channels, hidden_dim, enforce_input_project)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1) if mask_classification else None
        self.mask_embed = MLP([hidden_dim, hidden_dim, hidden_dim, mask_dim])

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool) -> dict[str, Any]:
        mask_former = cfg.MODEL.MASK_FORMER
        return {
            **common_arguments(cfg, in_channels, mask_classification),
            "dropout": mask_former.DROPOUT,
            "enc_layers": mask_former.ENC_LAYERS,
            "dec_layers": mask_former.DEC_LAYERS,
            "deep_supervision": mask_former.DEEP_SUPERVISION,
        }

    def forward(self, x: Tensor, mask_features: Tensor, mask: Tensor | None = None) -> Predictions:
        """Predict classes and masks.

        Args:
            x: feature map (B, in_channels, H, W).
            mask_features: (B, mask_dim, H/4, W/4).
            mask: where a batch's pictures were padded, (B, h, w) bool of any size, True = padding, at the bottom and
                the right. Nothing attends to these cells. The model as published gives none: padding is attended to.

        Returns:
            predictions with class logits (L, B, Q, K+1), or (L, B, Q, 0) without a class head; L is 1 without deep
            supervision.

        Raises:
            UserError: if it is given several feature maps.
        """
        if not isinstance(x, Tensor):
            raise UserError(
                f"StandardTransformerDecoder attends to one feature map, but got {len(x)}: set "
                'MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE to "transformer_encoder", "pixel_embedding" or "res5"'
            )
        if mask is None:
            padding = None
            position = self.pe_layer(x.shape[-2], x.shape[-1], x.device)
        else:
            padding = F.interpolate(mask[:, None].float(), size=x.shape[-2:], mode="nearest")[:, 0].bool()
            position = self.pe_layer.of_padded(padding)
        queries = self.transformer(self.input_proj(x), position, self.query_embed.weight, padding)  # (L, B, Q, C)
        if not self.deep_supervision:
            queries = queries[-1:]
        class_logits = (
            queries.new_zeros(*queries.shape[:3], 0) if self.class_embed is None else self.class_embed(queries)
        )
        return Predictions(class_logits, self.mask_embed(queries), mask_features)
