"""Mask losses and matching costs at sampled points (paper, section 3.2.2).

Letters: ``N`` masks, ``Q`` queries, ``P`` points. Logits and targets are float32; targets are in [0, 1].
"""

import torch.nn.functional as F
from torch import Tensor

from ..ops.points import sum_of_softplus

__all__ = ["cross_entropy_cost", "cross_entropy_loss", "dice_cost", "dice_loss", "losses_of_sums"]


def losses_of_sums(sums: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """``cross_entropy_loss`` and ``dice_loss`` of each mask, (...), from ``ops.points.loss_sums`` (..., 4)."""
    cross_entropy, probabilities, targets, overlap = sums.unbind(-1)
    return cross_entropy / num_points, 1 - (2 * overlap + 1) / (probabilities + targets + 1)


def cross_entropy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits (..., N, P) with targets, the mean over points, summed over masks: (...)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1).sum(-1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - dice coefficient of logits (..., N, P) with targets, 1 added to both its terms, summed over masks: (...)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * targets).sum(-1)
    total = probabilities.sum(-1) + targets.sum(-1)
    return (1 - (overlap + 1) / (total + 1)).sum(-1)


def cross_entropy_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """``cross_entropy_loss`` of every pair: logits (Q, P) and targets (N, P) give (Q, N)."""
    # BCE(x, t) = softplus(x) - x t, so that one product serves all pairs.
    return (sum_of_softplus(logits)[:, None] - logits @ targets.T) / logits.shape[-1]


def dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """``dice_loss`` of every pair: logits (Q, P) and targets (N, P) give (Q, N)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities @ targets.T)
    total = probabilities.sum(-1, keepdim=True) + targets.sum(-1)
    return 1 - (overlap + 1) / (total + 1)
