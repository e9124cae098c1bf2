"""The operator with its checks; picks what computes it: a compiled kernel, or plain PyTorch."""

import functools
import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from . import extension
from .reference import ms_deform_attn_fused_reference, ms_deform_attn_reference

if extension.KERNELS:
    from . import registration

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

    A compiled kernel computes it where there is one for the device (see ``python -m mask2former.ops``), else plain
    PyTorch. Both compute in float32 (float64 where ``value`` is float64), under autocast too.

    Args:
        value: (B, S, M, D) features of all levels, level after level, rows of a level in order.
        spatial_shapes: (height, width) of each of the L levels; the areas add up to S.
        sampling_locations: (B, Q, M, L, P, 2) normalised (x, y); (0, 0) is the top left corner of the
            top left cell of a level, (1, 1) the bottom right corner of its last cell. Samples outside
            of [0, 1] read zeros. Keep it float32 where ``value`` is float16 or bfloat16.
        attention_weights: (B, Q, M, L, P), of which each (b, q, m) usually sums to 1.

    Returns:
        (B, Q, M*D) in the dtype of ``value``.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_shapes(
        value, spatial_shapes, "sampling_locations", sampling_locations, "attention_weights", attention_weights
    )
    if _has_kernel(value.device):
        sizes = list(itertools.chain.from_iterable(spatial_shapes))
        return registration.apply(value, sizes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn` on locations and weights that a kernel makes itself and doesn't write to memory.

    Locations are ``reference_points`` moved by ``sampling_offsets``, weights the softmax of ``attention_logits`` over
    levels and points (Deformable DETR, section 4.1).

    Args:
        value: (B, S, M, D) features of all levels, level after level, rows of a level in order.
        spatial_shapes: (height, width) of each of the L levels; the areas add up to S.
        reference_points: (B, Q, L, 2) or, the same for all pictures, (1, Q, L, 2): normalised (x, y).
        sampling_offsets: (B, Q, M, L, P, 2) as (x, y) in cells of the level.
        attention_logits: (B, Q, M, L, P).

    Returns:
        (B, Q, M*D) in the dtype of ``value``.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _check_shapes(value, spatial_shapes, "sampling_offsets", sampling_offsets, "attention_logits", attention_logits)
    _check_reference_points(reference_points, sampling_offsets)
    if _has_kernel(value.device):
        sizes = list(itertools.chain.from_iterable(spatial_shapes))
        return registration.apply(value, sizes, reference_points, sampling_offsets, attention_logits)
    return ms_deform_attn_fused_reference(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)


def _has_kernel(device: torch.device) -> bool:
    if device.type not in extension.KERNELS or (device.type == "cuda" and extension.gpu_reason(device.index or 0)):
        if not torch.compiler.is_compiling():
            _say_that_there_is_no_kernel(device)
        return False
    if torch.compiler.is_compiling():  # torch.func's transforms of operators can't be compiled
        return not registration.transforms_are_active()
    return not torch.jit.is_tracing()  # a trace, as of fvcore's flop counter, knows only torch's own operators


@functools.cache
def _say_that_there_is_no_kernel(device: torch.device) -> None:
    logging.getLogger(__name__).warning(
        "Deformable attention runs in plain PyTorch on %s, which is slower than compiled kernels: %s",
        device,
        extension.reason(device.type) or extension.gpu_reason(device.index or 0),
    )


def _check_shapes(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_name: str,
    sampling: Tensor,
    attention_name: str,
    attention: Tensor,
) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, M, D), but has shape {tuple(value.shape)}")
    batch, size, heads, _ = value.shape
    areas = sum(height * width for height, width in spatial_shapes)
    if areas != size:
        raise ValueError(f"spatial_shapes {list(spatial_shapes)} have {areas} cells, but value has {size} positions")
    shape = tuple(sampling.shape)
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (batch, heads, len(spatial_shapes), 2):
        raise ValueError(
            f"{sampling_name} must be (B, Q, M, L, P, 2) with B, M, L = {batch}, {heads}, {len(spatial_shapes)}, "
            f"but has shape {shape}"
        )
    if attention.shape != shape[:5]:
        raise ValueError(
            f"{attention_name} must have shape {shape[:5]} as {sampling_name} has, "
            f"but has shape {tuple(attention.shape)}"
        )


def _check_reference_points(reference_points: Tensor, sampling_offsets: Tensor) -> None:
    batch, queries, _, levels = sampling_offsets.shape[:4]
    shape = tuple(reference_points.shape)
    if shape not in ((batch, queries, levels, 2), (1, queries, levels, 2)):  # a trace's sizes have no hash
        raise ValueError(
            f"reference_points must be (B or 1, Q, L, 2) with B, Q, L = {batch}, {queries}, {levels}, "
            f"but has shape {shape}"
        )
