"""Multi-scale deformable attention in plain PyTorch: the specification, and what runs where no kernel does.

Letters: ``B`` batch, ``S`` positions of all levels together, ``Q`` queries, ``M`` heads, ``D`` channels
of a head, ``L`` levels, ``P`` sampling points for each head and level.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ms_deform_attn_fused_reference", "ms_deform_attn_reference"]


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of values sampled bilinearly (Deformable DETR, equation 3).

    Arguments and result are those of :func:`mask2former.ops.ms_deform_attn`, which checks them.
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[3] * sampling_locations.shape[4]
    output_dtype = value.dtype
    if output_dtype in (torch.float16, torch.bfloat16):  # too coarse for locations, and for sums
        value = value.float()
    grids = (2 * sampling_locations - 1).to(value.dtype)  # grid_sample's range is [-1, 1]
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    sampled = []
    for level, ((height, width), level_value) in enumerate(zip(spatial_shapes, levels, strict=True)):
        maps = level_value.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
        sampled.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    features = torch.cat(sampled, dim=-1)  # (B*M, D, Q, L*P)
    weights = attention_weights.to(value.dtype).transpose(1, 2).reshape(batch * heads, 1, queries, points)
    output = (features * weights).sum(-1)  # (B*M, D, Q)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(output_dtype).contiguous()


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn_reference` on locations made of reference points and offsets, and weights of logits.

    Arguments and result are those of :func:`mask2former.ops.ms_deform_attn_fused`, which checks them.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32  # half types are too coarse for locations
    # Not reference_points.new_tensor, which fails under torch.func in torch 2.4.
    sizes = torch.tensor([(w, h) for h, w in spatial_shapes], dtype=dtype, device=reference_points.device)
    offsets = sampling_offsets.to(dtype) / sizes[:, None]
    sampling_locations = reference_points.to(dtype)[:, :, None, :, None] + offsets  # (B, Q, M, L, P, 2)
    shape = attention_logits.shape
    attention_weights = attention_logits.to(dtype).flatten(3).softmax(-1).view(shape)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)
