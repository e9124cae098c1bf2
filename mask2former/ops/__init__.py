"""What compiled kernels compute: deformable attention, with the module of its learned parts, masked attention, results
of masks, and convolutions."""

from .attention import masked_attention
from .convolution import conv2d
from .extension import KERNELS, is_followed
from .functional import ms_deform_attn, ms_deform_attn_fused
from .mask_strip import Inside, MaskStrip, Winners, best_classes
from .module import MSDeformAttn

__all__ = [
    "KERNELS",
    "Inside",
    "MSDeformAttn",
    "MaskStrip",
    "Winners",
    "best_classes",
    "conv2d",
    "is_followed",
    "masked_attention",
    "ms_deform_attn",
    "ms_deform_attn_fused",
]
