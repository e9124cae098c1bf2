"""Multi-scale deformable attention: the operator, and the module with its learned parts."""

from .functional import ms_deform_attn, ms_deform_attn_fused
from .module import MSDeformAttn

__all__ = ["MSDeformAttn", "ms_deform_attn", "ms_deform_attn_fused"]
