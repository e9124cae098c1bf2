"""The operator with its checks; picks what computes it."""

from collections.abc import Sequence

from torch import Tensor

from .reference import ms_deform_attn_reference

__all__ = ["ms_deform_attn"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, equation 3).

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
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def _check_shapes(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, M, D), but has shape {tuple(value.shape)}")
    batch, size, heads, _ = value.shape
    areas = sum(height * width for height, width in spatial_shapes)
    if areas != size:
        raise ValueError(f"spatial_shapes {list(spatial_shapes)} have {areas} cells, but value has {size} positions")
    shape = tuple(sampling_locations.shape)
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (batch, heads, len(spatial_shapes), 2):
        raise ValueError(
            f"sampling_locations must be (B, Q, M, L, P, 2) with B, M, L = {batch}, {heads}, {len(spatial_shapes)}, "
            f"but has shape {shape}"
        )
    if attention_weights.shape != shape[:5]:
        raise ValueError(
            f"attention_weights must have shape {shape[:5]} as sampling_locations has, "
            f"but has shape {tuple(attention_weights.shape)}"
        )
