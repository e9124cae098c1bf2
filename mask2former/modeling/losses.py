"""Mask losses and matching costs at sampled points (paper, section 3.2.2).

Letters: ``N`` masks, ``Q`` queries, ``P`` points. Logits and targets are float32; targets are in [0, 1].
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy_cost", "cross_entropy_loss", "dice_cost", "dice_loss"]


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
    # BCE(x, t) = softplus(x) - x t, so that one product serves all pairs; softplus(x) = max(x, 0) - log(sigmoid(|x|)),
    # of which each step is several times as fast as softplus itself.
    softplus = logits.relu().sub_(logits.abs().sigmoid_().log_())
    return (softplus.sum(-1, keepdim=True) - logits @ targets.T) / logits.shape[-1]


def dice_cost(logits: Tensor, targets: Tensor) -> Tensor:
    """``dice_loss`` of every pair: logits (Q, P) and targets (N, P) give (Q, N)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities @ targets.T)
    total = probabilities.sum(-1, keepdim=True) + targets.sum(-1)
    return 1 - (overlap + 1) / (total + 1)
