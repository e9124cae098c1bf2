"""Points at which masks are compared instead of everywhere (paper, section 3.3; PointRend, section 3.2)."""

import torch
from detectron2.projects.point_rend.point_features import get_uncertain_point_coords_with_randomness, point_sample
from torch import Tensor

__all__ = ["sample_points", "sample_points_each", "uncertain_points"]


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Values (N, P) of maps (N, H, W) at the same normalised (x, y) points (P, 2), bilinear, zero outside."""
    return point_sample(maps[None], points[None], align_corners=False)[0]


def sample_points_each(maps: Tensor, points: Tensor) -> Tensor:
    """Values (N, P) of maps (N, H, W), each at its own normalised (x, y) points (N, P, 2)."""
    return point_sample(maps[:, None], points, align_corners=False)[:, 0]


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float
) -> Tensor:
    """Draw points (N, P, 2) for masks (N, H, W), most of them where a mask is least certain.

    ``oversample_ratio * num_points`` points are drawn uniformly; of these the
    ``importance_sample_ratio * num_points`` with logits nearest to 0 are kept, and the rest is drawn uniformly.
    """
    return get_uncertain_point_coords_with_randomness(
        mask_logits[:, None].detach(),
        lambda logits: -logits.abs(),
        num_points,
        oversample_ratio,
        importance_sample_ratio,
    )
