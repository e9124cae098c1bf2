"""Points at which masks are compared instead of everywhere (paper, section 3.3; PointRend, section 3.2).

Points are (x, y) from (-1, -1), the top left corner of a map's first cell, to (1, 1), as ``grid_sample`` takes them.
Letters: ``N`` masks, ``P`` points of each, ``C`` channels; ``H`` and ``W`` are the size of a map.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["mask_logits_at_chosen_points", "random_points", "sample_masks", "sample_points", "uncertain_points"]

# Values of the masks that are whole at one time: on a CPU less than 32 MB, which glibc keeps for the next ones.
VALUES_AT_A_TIME = {"cpu": 7 << 20}
VALUES_AT_A_TIME_ELSEWHERE = 1 << 26


def random_points(*shape: int, device: torch.device) -> Tensor:
    """Uniform points (*shape, 2)."""
    return torch.empty(*shape, 2, device=device).uniform_(-1, 1)


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


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """``sample_points`` of bool masks (N, H, W): (N, P) in float32.

    Some masks at a time become float32 ones, which have four times their size.
    """
    points = points.expand(len(masks), -1, -1)
    values = [
        sample_points(masks[rows].float(), points[rows]) for rows in _rows_at_a_time(len(masks), masks.shape[1:], masks)
    ]
    return torch.cat(values) if values else points.new_zeros(0, points.shape[1])


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float
) -> Tensor:
    """Draw points (N, P, 2) for masks (N, H, W), most of them where a mask is least certain.

    ``oversample_ratio * num_points`` points are drawn uniformly; of these the
    ``importance_sample_ratio * num_points`` with logits nearest to 0 are kept, in any order, and the rest is drawn
    uniformly.
    """
    masks, device = len(mask_logits), mask_logits.device
    drawn = random_points(masks, int(num_points * oversample_ratio), device=device)
    num_kept = int(num_points * importance_sample_ratio)
    certainty = sample_points(mask_logits, drawn).abs()
    nearest = certainty.topk(num_kept, dim=1, largest=False, sorted=False).indices  # sorting takes longest of all
    points = drawn.new_empty(masks, num_points, 2)
    points[:, :num_kept] = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    points[:, num_kept:] = random_points(masks, num_points - num_kept, device=device)
    return points


def mask_logits_at_chosen_points(
    embeddings: Tensor, features: Tensor, choose: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Masks that are products of embeddings and features, at points that are chosen for each.

    Whole masks are needed to choose the points, but not for gradients: sampling is linear. So some are made at a time
    and none is kept.

    Args:
        embeddings: (N, C).
        features: (1, C, H, W), whose gradient is laid out in memory as they are.
        choose: gives points (n, P, 2) for mask logits (n, H, W); called for some masks at a time.

    Returns:
        logits (N, P), with gradients to embeddings and features, and the points (N, P, 2).
    """
    return _MaskLogitsAtChosenPoints.apply(embeddings, features, choose)


class _MaskLogitsAtChosenPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, features: Tensor, choose: Callable[[Tensor], Tensor]) -> Any:
        size, cells = features.shape[2:], features.flatten(2)[0]  # (C, H*W)
        logits, points = [], []
        for rows in _rows_at_a_time(max(len(embeddings), 1), size, features):
            masks = (embeddings[rows] @ cells).unflatten(1, size)
            points.append(choose(masks))
            logits.append(sample_points(masks, points[-1]) if len(masks) else masks.new_zeros(points[-1].shape[:2]))
        all_points = torch.cat(points)
        ctx.save_for_backward(embeddings, features, all_points)
        ctx.mark_non_differentiable(all_points)
        return torch.cat(logits), all_points

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        embeddings, features, points = ctx.saved_tensors
        size, cells = features.shape[2:], features.flatten(2)[0]
        grad_embeddings, grad_features = torch.empty_like(embeddings), torch.zeros_like(features)
        grad_cells = grad_features.flatten(2)[0]
        for rows in _rows_at_a_time(len(embeddings), size, features):
            grad_masks = _sample_points_backward(grad_logits[rows], points[rows], size).flatten(1)
            torch.mm(grad_masks, cells.T, out=grad_embeddings[rows])
            grad_cells.addmm_(embeddings[rows].T, grad_masks)
        return grad_embeddings, grad_features, None


def _sample_points_backward(grad: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient (N, H, W) of maps whose values at points (N, P, 2) have the gradient (N, P)."""
    maps = grad.new_zeros(1).expand(len(grad), 1, *size)  # their values don't count
    backward = torch.ops.aten.grid_sampler_2d_backward
    bilinear, zeros = 0, 0
    return backward(grad[:, None, None], maps, points[:, None], bilinear, zeros, False, [True, False])[0][:, 0]


def _rows_at_a_time(rows: int, size: Sequence[int], like: Tensor) -> Iterator[slice]:
    """Slices of ``rows`` masks of a size, so that together they have about as many values as may be whole."""
    step = max(VALUES_AT_A_TIME.get(like.device.type, VALUES_AT_A_TIME_ELSEWHERE) // (size[0] * size[1]), 1)
    return (slice(start, start + step) for start in range(0, rows, step))
