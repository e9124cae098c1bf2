"""Random inputs of deformable attention, as tests of the operator and of its kernels take them."""

from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = [(3, 5), (2, 2), (1, 4)]
CELLS = sum(height * width for height, width in SHAPES)


class Inputs(NamedTuple):
    """Of :func:`mask2former.ops.ms_deform_attn`, without shapes."""

    value: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor


class FusedInputs(NamedTuple):
    """Of :func:`mask2former.ops.ms_deform_attn_fused`, without shapes."""

    value: Tensor
    reference_points: Tensor
    sampling_offsets: Tensor
    attention_logits: Tensor


def random_inputs(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, int]] = SHAPES, **problem: int) -> Inputs:
    """What :func:`random_fused_inputs` makes, as locations, of which some lie outside, and weights of sum 1."""
    fused = random_fused_inputs(dtype=torch.float64, shapes=shapes, **problem)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64).view(-1, 2).clamp(min=1)
    locations = fused.reference_points[:, :, None, :, None] + fused.sampling_offsets / sizes[:, None]
    logits = fused.attention_logits
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return Inputs(*(x.to(dtype) for x in (fused.value, locations, weights)))


def random_fused_inputs(
    batch: int = 2,
    queries: int = 4,
    heads: int = 2,
    channels: int = 3,
    points: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shapes: list[tuple[int, int]] = SHAPES,
) -> FusedInputs:
    """Reference points, one for all pictures, offsets and logits; no sample is within 0.05 cells of where the
    gradient jumps.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels, dtype=torch.float64, generator=generator)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64).view(-1, 2)
    reference_points = torch.rand(1, queries, len(shapes), 2, dtype=torch.float64, generator=generator)
    places = torch.rand(*samples, 2, dtype=torch.float64, generator=generator) * (1.6 * sizes[:, None] + 2)
    places -= 0.3 * sizes[:, None] + 1  # in cells
    fractions = torch.rand(*samples, 2, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    offsets = places.floor() + fractions - (reference_points * sizes - 0.5)[:, :, None, :, None]
    logits = 2 * torch.randn(samples, dtype=torch.float64, generator=generator)
    return FusedInputs(*(x.to(dtype) for x in (value, reference_points, offsets, logits)))
