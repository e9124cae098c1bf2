"""Points at which masks are compared instead of everywhere (paper, section 3.3; PointRend, section 3.2)."""

import torch
from detectron2.projects.point_rend.point_features import point_sample
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
    ``importance_sample_ratio * num_points`` with logits nearest to 0 are kept, in any order, and the rest is drawn
    uniformly.
    """
    drawn = torch.rand(len(mask_logits), int(num_points * oversample_ratio), 2, device=mask_logits.device)
    num_kept = int(num_points * importance_sample_ratio)
    certainty = sample_points_each(mask_logits, drawn).abs()
    nearest = certainty.topk(num_kept, dim=1, largest=False, sorted=False).indices  # sorting takes longest of all
    kept = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    others = torch.rand(len(mask_logits), num_points - num_kept, 2, device=mask_logits.device)
    return torch.cat([kept, others], dim=1)
