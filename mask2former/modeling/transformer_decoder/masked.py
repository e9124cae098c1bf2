"""The transformer decoder with masked attention (paper, section 3.2).

Letters: ``B`` batch, ``Q`` queries, ``C`` channels, ``K`` classes, ``L`` predictions (decoder layers + 1).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...errors import UserError
from ...ops import product
from ..checkpointing import LayerCheckpointing
from ..old_names import RenamesOldWeights
from ..position_encoding import PositionEmbeddingSine
from ..predictions import Predictions
from .build import TRANSFORMER_DECODER_REGISTRY, common_arguments
from .layers import MLP, CrossAttentionLayer, FFNLayer, SelfAttentionLayer, input_projection

__all__ = ["MultiScaleMaskedTransformerDecoder"]

NUM_FEATURE_LEVELS = 3


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(RenamesOldWeights, LayerCheckpointing):
    """Queries that attend, layer by layer, to what the previous layer's masks cover, one feature scale a layer.

    Args:
        in_channels: channels of the feature maps.
        mask_classification: must be True: every query has a class.
        num_classes: K, without "no object".
        hidden_dim: width of the queries.
        num_queries: Q.
        nheads: attention heads.
        dim_feedforward: width of the feed-forward layers.
        dec_layers: decoder layers; predictions are made before the first and after each.
        pre_norm: norm before attention and feed-forward instead of after.
        mask_dim: channels of the mask features.
        enforce_input_project: project the feature maps although they have ``hidden_dim`` channels already.
    """

    renamed = {"static_query.": "query_feat."}

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
        dim_feedforward: int = 2048,
        dec_layers: int = 9,
        pre_norm: bool = False,
        mask_dim: int = 256,
        enforce_input_project: bool = False,
    ) -> None:
        super().__init__()
        if not mask_classification:
            raise ValueError("MultiScaleMaskedTransformerDecoder classifies masks: mask_classification must be True")
        if dec_layers < 1:
            raise UserError(f"dec_layers must be at least 1 (MASK_FORMER.DEC_LAYERS at least 2), but is {dec_layers}")
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, nheads, pre_norm) for _ in range(dec_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FFNLayer(hidden_dim, dim_feedforward, pre_norm) for _ in range(dec_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_FEATURE_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList(
            input_projection(in_channels, hidden_dim, enforce_input_project) for _ in range(NUM_FEATURE_LEVELS)
        )
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP([hidden_dim, hidden_dim, hidden_dim, mask_dim])

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool) -> dict[str, Any]:
        # DEC_LAYERS counts predictions, of which one is made before the first layer.
        return {
            **common_arguments(cfg, in_channels, mask_classification),
            "dec_layers": cfg.MODEL.MASK_FORMER.DEC_LAYERS - 1,
        }

    def forward(self, maps: Sequence[Tensor], mask_features: Tensor, mask: Tensor | None = None) -> Predictions:
        """Predict classes and masks.

        Args:
            maps: three maps (B, in_channels, H_l, W_l), coarse to fine.
            mask_features: (B, mask_dim, H/4, W/4).
            mask: not used; part of the interface of transformer decoders.

        Raises:
            UserError: if the number of maps is not three.
        """
        if isinstance(maps, Tensor) or len(maps) != NUM_FEATURE_LEVELS:
            raise UserError(
                f"MultiScaleMaskedTransformerDecoder attends to {NUM_FEATURE_LEVELS} feature maps, but got "
                f"{1 if isinstance(maps, Tensor) else len(maps)}: set MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE to "
                '"multi_scale_pixel_decoder"'
            )
        keys, values = self._flatten(maps)
        level_features = [resize_mask_features(mask_features, x.shape[-2:]) for x in maps]
        batch = mask_features.shape[0]
        query_position = self.query_embed.weight[None].expand(batch, -1, -1)
        x = self.query_feat.weight[None].expand(batch, -1, -1)  # (B, Q, C)

        class_logits, mask_embeddings = self._predict(x)
        predictions = [(class_logits, mask_embeddings)]
        for index in range(len(self.transformer_ffn_layers)):
            level = index % NUM_FEATURE_LEVELS
            bias = masked_attention_bias(mask_embeddings, level_features[level])
            x = self.run_layer(self._layer, index, x, query_position, keys[level], values[level], bias)
            class_logits, mask_embeddings = self._predict(x)
            predictions.append((class_logits, mask_embeddings))
        return Predictions(
            class_logits=torch.stack([logits for logits, _ in predictions]),
            mask_embeddings=torch.stack([embeddings for _, embeddings in predictions]),
            mask_features=mask_features,
        )

    def _layer(self, index: int, x: Tensor, query_position: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Queries (B, Q, C) behind a layer; the other arguments are those of ``CrossAttentionLayer``."""
        x = self.transformer_cross_attention_layers[index](x, query_position, key, value, bias)
        x = self.transformer_self_attention_layers[index](x, query_position)
        return self.transformer_ffn_layers[index](x)

    def _flatten(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What the layers of each level attend to: cells with and without their positions, (B, H_l*W_l, C) each."""
        keys = []
        values = []
        for projection, embedding, x in zip(self.input_proj, self.level_embed.weight, maps, strict=True):
            values.append(projection(x).flatten(2).transpose(1, 2) + embedding)
            position = self.pe_layer(x.shape[-2], x.shape[-1], x.device).flatten(2).transpose(1, 2)
            keys.append(values[-1] + position)
        return keys, values

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, K+1) and mask embeddings (B, Q, mask_dim) of queries (B, Q, C)."""
        x = self.decoder_norm(x)
        return self.class_embed(x), self.mask_embed(x)


def resize_mask_features(mask_features: Tensor, size: Sequence[int]) -> Tensor:
    """Mask features (B, C, H/4, W/4) at another (height, width), for attention masks alone: no gradient.

    A mask is a product over channels and resizing is linear too, so features resized once give the
    resized masks of every layer.
    """
    return F.interpolate(mask_features.detach().float(), size=list(size), mode="bilinear", align_corners=False)


@torch.no_grad()
def masked_attention_bias(mask_embeddings: Tensor, features: Tensor) -> Tensor:
    """What masked attention adds to the attention logits (paper, equation 2).

    Args:
        mask_embeddings: (B, Q, C) of the layer before.
        features: (B, C, H_l, W_l), mask features at the size of the map attended to.

    Returns:
        (B, 1, Q, H_l*W_l): 0 in the foreground of a query's mask, -inf outside; all 0 where a mask is empty.
    """
    with torch.autocast(features.device.type, enabled=False):  # the sign is the mask: no rounding here
        logits = product(mask_embeddings.float(), features.flatten(2))  # (B, Q, H_l*W_l)
    blocked = logits < 0
    blocked &= ~blocked.all(dim=-1, keepdim=True)
    return torch.zeros_like(logits).masked_fill_(blocked, float("-inf"))[:, None]
