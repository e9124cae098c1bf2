"""Pixel decoders of MaskFormer: a feature pyramid network, plain or with a transformer encoder on its coarsest map.

Lin et al., *Feature Pyramid Networks for Object Detection*, CVPR 2017; Cheng et al., *Per-Pixel Classification is Not
All You Need for Semantic Segmentation*, NeurIPS 2021, section 4.1. Letters: ``B`` batch, ``C`` channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from ...ops import conv2d, is_followed
from ..checkpointing import LayerCheckpointing
from ..made_again import made_again_if_it_can
from ..position_encoding import PositionEmbeddingSine
from ..transformer import TransformerEncoderOnly
from .group_norm import add_upsampled, has_hooks, is_plain_group_norm, relu_of_norm, upsample

__all__ = [
    "NUM_DECODER_LEVELS",
    "BasePixelDecoder",
    "TransformerEncoderPixelDecoder",
    "add_lateral",
    "lateral_conv",
    "output_conv",
    "pyramid_arguments",
]

NUM_DECODER_LEVELS = 3  # maps handed to the transformer decoder

Norm = str | Callable[[int], nn.Module]


@SEM_SEG_HEADS_REGISTRY.register()
class BasePixelDecoder(LayerCheckpointing):
    """A feature pyramid network, from the coarsest backbone feature to the finest.

    Args:
        input_shape: channels and stride of each backbone feature used, by name.
        conv_dim: width of the pyramid.
        mask_dim: channels of the mask features.
        norm: normalisation of the pyramid's convolutions, as Detectron2 names them ("" for none).
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: Norm = "GN",
    ) -> None:
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]  # fine to coarse
        for index, (_, shape) in enumerate(by_stride[:-1], start=1):
            self.add_module(f"adapter_{index}", lateral_conv(shape.channels, conv_dim, norm))
            self.add_module(f"layer_{index}", output_conv(conv_dim, conv_dim, norm))
        self.add_module(f"layer_{len(by_stride)}", output_conv(by_stride[-1][1].channels, conv_dim, norm))
        self.mask_features = _MapConv2d(conv_dim, mask_dim, kernel_size=3, padding=1)
        weight_init.c2_xavier_fill(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        return pyramid_arguments(cfg, input_shape)

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Decode backbone features.

        Returns:
            mask features (B, mask_dim, H/4, W/4) at the stride of the finest feature, None, and the three coarsest
            maps of the pyramid (B, conv_dim, H_l, W_l), coarse to fine.
        """
        maps: list[Tensor] = []
        for index in range(len(self.in_features), 0, -1):
            feature = features[self.in_features[index - 1]]
            maps.append(self.run_layer(self._step, index, feature, maps[-1] if maps else None))
        return self.mask_features(maps[-1]), None, maps[:NUM_DECODER_LEVELS]

    def _step(self, index: int, x: Tensor, coarse: Tensor | None) -> Tensor:
        """The next map of the pyramid: a backbone feature with the map before, if there is one."""
        if coarse is not None:
            x = add_lateral(getattr(self, f"adapter_{index}"), x, coarse, "nearest", keep=self.checkpointing)
        return getattr(self, f"layer_{index}")(x)


@SEM_SEG_HEADS_REGISTRY.register()
class TransformerEncoderPixelDecoder(BasePixelDecoder):
    """A feature pyramid network whose coarsest feature goes through a transformer encoder first, as in DETR.

    Args:
        input_shape, conv_dim, mask_dim, norm: see ``BasePixelDecoder``.
        transformer_dropout, transformer_nheads, transformer_dim_feedforward, transformer_enc_layers,
            transformer_pre_norm: the encoder's shape, see ``TransformerEncoderLayer``.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: Norm = "GN",
        transformer_dropout: float = 0.1,
        transformer_nheads: int = 8,
        transformer_dim_feedforward: int = 2048,
        transformer_enc_layers: int = 6,
        transformer_pre_norm: bool = False,
    ) -> None:
        coarsest = max(input_shape, key=lambda name: input_shape[name].stride)
        encoded_shape = ShapeSpec(channels=conv_dim, stride=input_shape[coarsest].stride)
        super().__init__(
            {**input_shape, coarsest: encoded_shape},
            conv_dim=conv_dim,
            mask_dim=mask_dim,
            norm=norm,
        )
        self.coarsest = coarsest
        self.input_proj = Conv2d(input_shape[coarsest].channels, conv_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.input_proj)
        self.transformer = TransformerEncoderOnly(
            d_model=conv_dim,
            nhead=transformer_nheads,
            num_encoder_layers=transformer_enc_layers,
            dim_feedforward=transformer_dim_feedforward,
            dropout=transformer_dropout,
            pre_norm=transformer_pre_norm,
        )
        self.pe_layer = PositionEmbeddingSine(conv_dim // 2, normalize=True)
        last = f"layer_{len(input_shape)}"  # behind the encoder, as published: an optimizer's state follows the order
        self.add_module(last, self._modules.pop(last))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        mask_former = cfg.MODEL.MASK_FORMER
        return {
            **super().from_config(cfg, input_shape),
            "transformer_dropout": mask_former.DROPOUT,
            "transformer_nheads": mask_former.NHEADS,
            "transformer_dim_feedforward": mask_former.DIM_FEEDFORWARD,
            "transformer_enc_layers": cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS,
            "transformer_pre_norm": mask_former.PRE_NORM,
        }

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """As ``BasePixelDecoder``'s, with the encoded map (B, conv_dim, H/32, W/32) as second result."""
        x = self.input_proj(features[self.coarsest])
        encoded = self.transformer(x, self.pe_layer(x.shape[-2], x.shape[-1], x.device))
        mask_features, _, maps = super().forward_features({**features, self.coarsest: encoded})
        return mask_features, encoded, maps


def pyramid_arguments(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Arguments that all pixel decoders take: the features used, and the pyramid's widths and norm."""
    head = cfg.MODEL.SEM_SEG_HEAD
    return {
        "input_shape": {name: shape for name, shape in input_shape.items() if name in head.IN_FEATURES},
        "conv_dim": head.CONVS_DIM,
        "mask_dim": head.MASK_DIM,
        "norm": head.NORM,
    }


def lateral_conv(in_channels: int, out_channels: int, norm: Norm) -> Conv2d:
    """The 1x1 convolution of a backbone feature on its way into the pyramid."""
    conv = Conv2d(in_channels, out_channels, kernel_size=1, bias=norm == "", norm=get_norm(norm, out_channels))
    weight_init.c2_xavier_fill(conv)
    return conv


def output_conv(in_channels: int, out_channels: int, norm: Norm) -> Conv2d:
    """The 3x3 convolution with ReLU that makes a map of the pyramid."""
    conv = _MapConv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
        activation=torch.relu_,
    )
    weight_init.c2_xavier_fill(conv)
    return conv


def add_lateral(conv: Conv2d, feature: Tensor, coarse: Tensor, mode: str, keep: bool) -> Tensor:
    """The sum of a backbone feature on its way into the pyramid and the map before, upsampled.

    Args:
        conv: what ``lateral_conv`` made.
        feature, coarse: (B, ..., H, W) and (B, C, h, w).
        mode: of upsampling, as ``torch.nn.functional.interpolate`` has it.
        keep: whether the convolution behind keeps the sum for gradients where it could be made again. Where
            activations are checkpointed, what it is made of would be kept till then.

    Returns:
        (B, C, H, W).
    """
    by_itself = type(conv) is Conv2d and conv.activation is None and not has_hooks(conv)
    if by_itself and not keep and is_plain_group_norm(conv.norm, feature):
        return add_upsampled(_convolve(conv, feature), conv.norm, coarse, mode)
    x = conv(feature)
    upsampled = upsample(coarse, x, mode)
    return upsampled + x if is_followed() else upsampled.add_(x)


class _MapConv2d(Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        """As the class it is derived from, faster where there are kernels, and with less kept for gradients."""
        with made_again_if_it_can(x):
            x = _convolve(self, x)
        if self.activation == torch.relu_ and is_plain_group_norm(self.norm, x):
            return relu_of_norm(x, self.norm)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def _convolve(conv: Conv2d, x: Tensor) -> Tensor:
    """What a layer makes of x before its norm."""
    return conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
