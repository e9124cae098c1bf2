"""What compiled kernels compute: deformable attention, with the module of its learned parts, masked attention, results
of masks, convolutions, and products of matrices."""

from .attention import masked_attention
from .convolution import conv2d
from .extension import KERNELS, is_followed
from .functional import ms_deform_attn, ms_deform_attn_fused
from .mask_strip import Inside, MaskStrip, Winners, best_classes
from .module import MSDeformAttn
from .products import Linear, linear, multiply, product

__all__ = [
    "KERNELS",
    "Inside",
    "Linear",
    "MSDeformAttn",
    "MaskStrip",
    "Winners",
    "best_classes",
    "conv2d",
    "is_followed",
    "linear",
    "masked_attention",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "multiply",
    "product",
]
