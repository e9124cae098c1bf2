"""Points at which masks are compared instead of everywhere (paper, section 3.3; PointRend, section 3.2).

Points are (x, y) from (-1, -1), the top left corner of a map's first cell, to (1, 1), as ``grid_sample`` takes them.
Letters: ``N`` masks, ``P`` points of each, ``C`` channels; ``H`` and ``W`` are the size of a map.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops.points import (
    draw_nearest_to_zero,
    has_kernels,
    loss_sums,
    loss_sums_backward,
    random_points,
    spread_points,
)

__all__ = [
    "Choose",
    "loss_sums_at_chosen_points",
    "random_points",
    "sample_features",
    "sample_masks",
    "sample_points",
    "uncertain_points",
]

# Chooses points. Called for some of N masks at a time, with their slice of all and their logits (n, H, W), whose memory
# is used again afterwards; gives points (n, P, 2), the logits (n, P) there, and labels (n, P).
Choose = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]

# Values of the masks that are whole at one time: on a CPU 64 MB, since products of few rows are slower.
VALUES_AT_A_TIME = {"cpu": 1 << 24}
VALUES_AT_A_TIME_ELSEWHERE = 1 << 26

# Values of a matrix's columns that are multiplied at one time: 2 MB, which the second caches hold most of.
VALUES_IN_CACHE = 1 << 19

# Masks whose points are chosen at one time: on a CPU they, and all that is made for their points, stay in its cache.
CHOSEN_AT_A_TIME = {"cpu": 16}

# Masks lie this many values further apart than they are long. Else the distance would mostly be a power of two, and the
# matrix products' columns would share few places of the cache.
SPACE_BETWEEN_MASKS = 48


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps at points, bilinear, zero outside.

    Args:
        maps: (N, H, W).
        points: (N, P, 2), or (P, 2) for the same ones in all maps.

    Returns:
        (N, P).
    """
    if points.dim() == 2:
        return F.grid_sample(maps[None], points[None, None], align_corners=False)[0, :, 0]
    return F.grid_sample(maps[:, None], points[:, None], align_corners=False)[:, 0, 0]


def sample_features(features: Tensor, points: Tensor) -> Tensor:
    """``sample_points`` of many maps (C, H, W) at the same points (P, 2): (C, P), laid out as the maps are."""
    if features.stride(0) > 1 or not has_kernels(features.device):
        return sample_points(features, points)
    # Channels last: deformable attention, of one head, level and sample of weight 1, reads a cell's channels at once.
    _, height, width = features.shape
    value = features.permute(1, 2, 0).flatten(0, 1)[None, :, None]  # (1, H*W, 1, C)
    locations = (points[None, :, None, None, None] + 1) / 2  # (1, P, 1, 1, 1, 2)
    return ops.ms_deform_attn(value, [(height, width)], locations, torch.ones_like(locations[..., 0]))[0].T


def sample_masks(masks: Tensor, points: Tensor, index: Tensor | None = None) -> Tensor:
    """``sample_points`` of bool masks (N, H, W), without gradients: (R, P) in float32.

    Args:
        masks: (N, H, W) bool.
        points: (R, P, 2), or (P, 2) for the same ones in all masks.
        index: the mask (R) that each row of points is on; without, the rows are those of the masks.
    """
    if index is None:
        points = points.expand(len(masks), -1, -1)
    if has_kernels(masks.device):
        return ops.points.sample_points(masks.contiguous(), points, index)
    index = torch.arange(len(masks), device=masks.device) if index is None else index
    parts = _rows_at_a_time(len(points), masks.shape[1:], masks)  # that become floats, of four times their size
    return torch.cat([ops.points.sample_points(masks, points[rows], index[rows]) for rows in parts])


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float
) -> tuple[Tensor, Tensor]:
    """Draw points (N, P, 2) for masks (N, H, W), most of them where a mask is least certain.

    ``oversample_ratio * num_points`` points are drawn uniformly; of these the
    ``importance_sample_ratio * num_points`` with logits nearest to 0 are kept, in any order, and the rest is drawn
    uniformly.

    Returns:
        The points, and the masks' logits (N, P) there.
    """
    masks, num_kept = len(mask_logits), int(num_points * importance_sample_ratio)
    points, logits = mask_logits.new_empty(masks, num_points, 2), mask_logits.new_empty(masks, num_points)
    if num_kept > 0:
        drawn = int(num_points * oversample_ratio)
        draw_nearest_to_zero(mask_logits, drawn, points[:, :num_kept], logits[:, :num_kept])
    rest = random_points(masks, num_points - num_kept, device=mask_logits.device)
    points[:, num_kept:], logits[:, num_kept:] = rest, ops.points.sample_points(mask_logits, rest)
    return points, logits


def loss_sums_at_chosen_points(embeddings: Tensor, features: Tensor, choose: Choose) -> Tensor:
    """``ops.points.loss_sums`` of masks that are products of embeddings and features, at points chosen for each.

    Whole masks are needed to choose the points, but not for gradients: sampling is linear. So some are made at a time
    and none is kept, nor is any gradient of the logits at all points.

    Args:
        embeddings: (N, C).
        features: (1, C, H, W), whose gradient is laid out in memory as they are.
        choose: see ``Choose``.

    Returns:
        (N, 4), with gradients to embeddings and features.
    """
    return _LossSumsAtChosenPoints.apply(embeddings, features, choose)


class _LossSumsAtChosenPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, features: Tensor, choose: Choose) -> Tensor:
        cells = features.flatten(2)[0]  # (C, H*W)
        chosen: list[Tensor] = []
        sums = embeddings.new_empty(len(embeddings), 4)
        for rows, masks in _masks_at_a_time(len(embeddings), features):
            _multiply(embeddings[rows], cells, masks)
            for here, mask_logits in _parts(rows, masks, features):
                points, logits, labels = choose(here, mask_logits)
                sums[here] = loss_sums(logits, labels)
                chosen += points, logits, labels
        ctx.save_for_backward(embeddings, features, *chosen)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        embeddings, features, *chosen = ctx.saved_tensors
        cells, remaining = features.flatten(2)[0], iter(chosen)
        grad_embeddings, grad_features = torch.empty_like(embeddings), torch.empty_like(features)
        grad_cells = grad_features.flatten(2)[0]
        for rows, grad_masks in _masks_at_a_time(len(embeddings), features):
            for here, grad_mask_logits in _parts(rows, grad_masks, features):
                points, logits, labels = next(remaining), next(remaining), next(remaining)
                spread_points(loss_sums_backward(grad[here], logits, labels), points, grad_mask_logits)
            ops.multiply(grad_masks, cells.T, grad_embeddings[rows])
            ops.multiply(embeddings[rows].T, grad_masks, grad_cells, add=rows.start > 0)
        return grad_embeddings, grad_features, None


def _masks_at_a_time(count: int, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of ``count`` masks, and memory (n, H*W) for each, which is used again for the next."""
    cells = features.shape[2] * features.shape[3]
    memory = features.new_empty(0, cells)
    for rows in _rows_at_a_time(count, features.shape[2:], features):
        length = rows.stop - rows.start
        if length > len(memory):
            memory = features.new_empty(length, cells + SPACE_BETWEEN_MASKS)[:, :cells]
        yield rows, memory[:length]


def _parts(rows: slice, masks: Tensor, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of ``rows``, and the masks (n, H, W) of each: those of (N, H*W) that are looked at together."""
    step = CHOSEN_AT_A_TIME.get(masks.device.type, max(len(masks), 1))
    for start in range(0, max(len(masks), 1), step):
        part = masks[start : start + step].unflatten(1, features.shape[2:])
        yield slice(rows.start + start, rows.start + start + len(part)), part


def _multiply(rows: Tensor, columns: Tensor, product: Tensor) -> None:
    """Make ``product`` (N, M) that of rows (N, C) and columns (C, M), without gradients.

    The product of few rows and many columns is faster with some columns at a time on a CPU: they stay in its cache.
    """
    step = VALUES_IN_CACHE // max(len(columns), 1) if columns.device.type == "cpu" else columns.shape[1]
    step = max(step, 1)
    for start in range(0, columns.shape[1], step):
        here = slice(start, start + step)
        ops.multiply(rows, columns[:, here], product[:, here])


def _rows_at_a_time(rows: int, size: Sequence[int], like: Tensor) -> Iterator[slice]:
    """Slices of ``rows`` masks of a size, about as long as one another, and at least one.

    Together, the masks of a slice have about as many values as may be whole.
    """
    most = max(VALUES_AT_A_TIME.get(like.device.type, VALUES_AT_A_TIME_ELSEWHERE) // (size[0] * size[1]), 1)
    step = max(math.ceil(rows / math.ceil(max(rows, 1) / most)), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step))
