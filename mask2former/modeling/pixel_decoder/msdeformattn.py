"""The pixel decoder with multi-scale deformable attention (paper, section 3.2.2 and appendix).

Letters: ``B`` batch, ``C`` channels, ``S`` positions of all levels together, ``L`` levels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import UserError
from ...ops import MSDeformAttn, is_followed, ms_deform_attn_fused
from ..checkpointing import LayerCheckpointing
from ..made_again import made_again_if_it_can
from ..position_encoding import PositionEmbeddingSine
from ..precision import is_autocast_to_bfloat16
from .fpn import NUM_DECODER_LEVELS, Norm, add_lateral, lateral_conv, output_conv, pyramid_arguments
from .group_norm import has_hooks
from .position_wise import add_and_feed_forward, is_fast, project

__all__ = ["MSDeformAttnPixelDecoder"]

CHUNK_ROWS = 1024  # positions; with 1024 hidden channels 4 MB in float32


class MSDeformAttnTransformerEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward network; norms after each.

    On a CPU some positions at a time go through its parts, which is what hooks on the norms and linear layers see.
    """

    def __init__(
        self, d_model: int, dim_feedforward: int, dropout: float, n_levels: int, n_heads: int, n_points: int
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        if _is_plain_cpu(x) and is_fast(x) and self._is_plain():
            return self._position_wise(x, position, reference_points, spatial_shapes)
        chunks = _chunks(x)
        if torch.is_grad_enabled() or has_hooks(self.self_attn):
            # The gradient of the values is made for all queries at once, and hooks see all of them.
            attended = _chunks(self.self_attn(x + position, reference_points, x, spatial_shapes))
        else:
            value = self.self_attn.project(x)
            attended = [
                self.self_attn.attend(some + its_position, its_points, value, spatial_shapes)
                for some, its_position, its_points in zip(
                    chunks, _chunks(position), _chunks(reference_points), strict=True
                )
            ]
        encoded = [self._after_attention(*pair) for pair in zip(chunks, attended, strict=True)]
        return encoded[0] if len(encoded) == 1 else torch.cat(encoded, dim=1)

    def _is_plain(self) -> bool:
        """Whether all parts are what they were built as, and no hook, dropout or autocast comes between them."""
        _, *parts = self.modules()
        return (
            all(type(part) in (MSDeformAttn, nn.Linear, nn.LayerNorm, nn.Dropout) for part in parts)
            and not any(has_hooks(part) for part in parts)
            and not (self.dropout.p > 0 and self.training)
            and not torch.is_autocast_enabled("cpu")
        )

    def _position_wise(
        self, x: Tensor, position: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """What :meth:`forward` gives, where all but sampling has its gradients made chunk by chunk, too."""
        attention = self.self_attn
        places = (attention.sampling_offsets, attention.attention_weights)
        value, offsets, logits = project(x, position, attention.value_proj, places)
        heads = (attention.n_heads, attention.n_levels, attention.n_points)
        attended = ms_deform_attn_fused(
            value.unflatten(-1, (attention.n_heads, -1)),
            spatial_shapes,
            reference_points,
            offsets.unflatten(-1, (*heads, 2)),
            logits.unflatten(-1, heads),
        )
        norms, feed_forward = (self.norm1, self.norm2), (self.linear1, self.linear2)
        return add_and_feed_forward(x, attended, attention.output_proj, norms, feed_forward)

    def _after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        if not _is_plain_cpu(x) or not torch.is_grad_enabled():
            return self._two_linear_layers(x)
        # What is between the two layers is the largest part of what gradients would keep, and made again quickly.
        return checkpoint(
            self._two_linear_layers, x, use_reentrant=False, preserve_rng_state=self.dropout.p > 0 and self.training
        )

    def _two_linear_layers(self, x: Tensor) -> Tensor:
        # In place it would change a view of what linear1 makes, whose gradient is copied several times then.
        return self.linear2(self.dropout(F.relu(self.linear1(x), inplace=not torch.is_grad_enabled())))


def _chunks(x: Tensor) -> Sequence[Tensor]:
    """Tensors (B, S, ...) of some positions each on a CPU, so that what is made of them stays in its cache."""
    return x.split(CHUNK_ROWS, dim=1) if _is_plain_cpu(x) else (x,)


def _is_plain_cpu(x: Tensor) -> bool:
    """Whether it is on a CPU, and nothing follows what becomes of it."""
    return x.device.type == "cpu" and not is_followed()


class MSDeformAttnTransformerEncoder(LayerCheckpointing):
    """A stack of encoder layers over the flattened levels."""

    def __init__(self, layers: Sequence[MSDeformAttnTransformerEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
        reference_points = cell_centres(spatial_shapes, x.device)
        for layer in self.layers:
            x = self.run_layer(layer, x, position, reference_points, spatial_shapes)
        return x


class MSDeformAttnTransformer(nn.Module):
    """Flattens feature maps into one sequence with position and level embeddings, and encodes it."""

    def __init__(
        self,
        d_model: int,
        num_layers: int,
        dim_feedforward: int,
        dropout: float,
        n_levels: int,
        n_heads: int,
        n_points: int,
    ) -> None:
        super().__init__()
        self.encoder = MSDeformAttnTransformerEncoder(
            [
                MSDeformAttnTransformerEncoderLayer(d_model, dim_feedforward, dropout, n_levels, n_heads, n_points)
                for _ in range(num_layers)
            ]
        )
        self.level_embed = nn.Parameter(torch.empty(n_levels, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def forward(self, maps: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """Encode maps (B, C, H_l, W_l) with positions (1, C, H_l, W_l) to maps of the same shapes."""
        spatial_shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # (B, S, C)
        x = x.float()  # what the layers add up isn't rounded between them
        position = torch.cat(
            [
                p.flatten(2).transpose(1, 2) + embedding
                for p, embedding in zip(positions, self.level_embed, strict=True)
            ],
            dim=1,
        )  # (1, S, C)
        x = self.encoder(x, position, spatial_shapes)
        levels = x.split([height * width for height, width in spatial_shapes], dim=1)
        return [
            level.unflatten(1, shape).permute(0, 3, 1, 2) for level, shape in zip(levels, spatial_shapes, strict=True)
        ]


@SEM_SEG_HEADS_REGISTRY.register()
class MSDeformAttnPixelDecoder(LayerCheckpointing):
    """Deformable transformer encoder over the coarse features, then an FPN up to ``common_stride``.

    Args:
        input_shape: channels and stride of each backbone feature used, by name.
        conv_dim: width of the encoder and the FPN.
        mask_dim: channels of the mask features.
        norm: normalisation of the FPN's convolutions, as Detectron2 names them ("" for none).
        transformer_in_features: the features that the encoder sees.
        transformer_dropout, transformer_nheads, transformer_dim_feedforward, transformer_enc_layers,
            transformer_n_points: the encoder's shape.
        common_stride: stride of the mask features.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: Norm = "GN",
        transformer_in_features: Sequence[str] = ("res3", "res4", "res5"),
        transformer_dropout: float = 0.0,
        transformer_nheads: int = 8,
        transformer_dim_feedforward: int = 1024,
        transformer_enc_layers: int = 6,
        transformer_n_points: int = 4,
        common_stride: int = 4,
    ) -> None:
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        encoded = [(name, shape) for name, shape in by_stride if name in transformer_in_features]
        if len(encoded) < len(transformer_in_features):
            raise UserError(
                "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES must be some of IN_FEATURES, "
                f"{list(input_shape)}, but is {list(transformer_in_features)}"
            )
        self.encoder_features = [name for name, _ in reversed(encoded)]  # coarse to fine
        self.input_proj = nn.ModuleList(_input_projection(s.channels, conv_dim) for _, s in reversed(encoded))
        self.transformer = MSDeformAttnTransformer(
            d_model=conv_dim,
            num_layers=transformer_enc_layers,
            dim_feedforward=transformer_dim_feedforward,
            dropout=transformer_dropout,
            n_levels=len(encoded),
            n_heads=transformer_nheads,
            n_points=transformer_n_points,
        )
        self.pe_layer = PositionEmbeddingSine(conv_dim // 2, normalize=True)
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

        num_fpn_levels = int(math.log2(encoded[0][1].stride) - math.log2(common_stride))
        self.fpn_features = [name for name, _ in by_stride[:num_fpn_levels]]
        for index, (_, shape) in enumerate(by_stride[:num_fpn_levels], start=1):
            self.add_module(f"adapter_{index}", lateral_conv(shape.channels, conv_dim, norm))
            self.add_module(f"layer_{index}", output_conv(conv_dim, conv_dim, norm))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            **pyramid_arguments(cfg, input_shape),
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "transformer_dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "transformer_nheads": cfg.MODEL.MASK_FORMER.NHEADS,
            "transformer_dim_feedforward": head.DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD,
            "transformer_enc_layers": head.TRANSFORMER_ENC_LAYERS,
            "transformer_n_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "common_stride": head.COMMON_STRIDE,
        }

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Decode backbone features, in float32 whatever autocast says, but for inference under autocast to bfloat16.

        Returns:
            mask features (B, mask_dim, H/4, W/4), the coarsest encoded map, and three maps
            (B, conv_dim, H_l, W_l), coarse to fine.
        """
        device_type = next(iter(features.values())).device.type
        # It has float32's range, and measured on a trained model costs no accuracy here.
        bfloat16 = not self.training and is_autocast_to_bfloat16(device_type)
        with torch.autocast(device_type, torch.bfloat16, enabled=bfloat16):
            if not bfloat16:
                features = {name: x.float() for name, x in features.items()}
            maps = self._encode(features)
            for index in range(len(self.fpn_features), 0, -1):
                maps.append(self.run_layer(self._step, index, features[self.fpn_features[index - 1]], maps[-1]))
            with made_again_if_it_can(maps[-1]):
                mask_features = self.mask_features(maps[-1])
            return mask_features, maps[0], maps[:NUM_DECODER_LEVELS]

    def _step(self, index: int, feature: Tensor, coarse: Tensor) -> Tensor:
        """The next map of the pyramid: a backbone feature with the map before."""
        coarse = coarse.to(memory_format=torch.channels_last)  # as it lies in memory, but for gaps
        x = add_lateral(getattr(self, f"adapter_{index}"), feature, coarse, "bilinear", keep=self.checkpointing)
        return getattr(self, f"layer_{index}")(x)

    def _encode(self, features: dict[str, Tensor]) -> list[Tensor]:
        maps = [
            projection(features[name]) for name, projection in zip(self.encoder_features, self.input_proj, strict=True)
        ]
        positions = [self.pe_layer(x.shape[-2], x.shape[-1], x.device) for x in maps]
        return self.transformer(maps, positions)


def _input_projection(in_channels: int, conv_dim: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, conv_dim, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, conv_dim))


def cell_centres(spatial_shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Normalised (x, y) of every cell's centre, repeated for each level: (1, S, L, 2)."""
    centres = []
    for height, width in spatial_shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))  # (H*W, 2)
    points = torch.cat(centres)
    return points[None, :, None].expand(-1, -1, len(spatial_shapes), -1)
