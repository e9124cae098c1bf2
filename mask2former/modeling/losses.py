"""Mask losses and matching costs at sampled points (paper, section 3.2.2).

Letters: ``N`` masks, ``Q`` queries, ``P`` points. Logits and targets are float32; targets are in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import multiply
from ..ops.points import to_probabilities

__all__ = ["PairSums", "cross_entropy_loss", "dice_loss", "losses_of_sums"]


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


class PairSums:
    """Sums over points of what the losses of all pairs of masks and objects are made of, some points at a time.

    Args:
        logits: Q masks.
        targets: N objects.
        device: where the sums are.
    """

    def __init__(self, logits: int, targets: int, device: torch.device) -> None:
        self._products, self._overlaps = torch.zeros(2, logits, targets, device=device)
        self._of_logits = torch.zeros(logits, 2, device=device)  # softplus and probability
        self._of_targets = torch.zeros(targets, device=device)
        self._points = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add points: logits (Q, P), without gradients, and targets (N, P). The logits become probabilities."""
        multiply(logits, targets.T, self._products, add=True)
        self._of_logits += to_probabilities(logits)
        multiply(logits, targets.T, self._overlaps, add=True)
        self._of_targets += targets.sum(-1)
        self._points += targets.shape[1]

    def losses(self) -> tuple[Tensor, Tensor]:
        """``cross_entropy_loss`` and ``dice_loss`` of every pair, (Q, N) each."""
        softplus, probabilities = self._of_logits[..., None].unbind(1)
        # BCE(x, t) = softplus(x) - x t, so that one product serves all pairs.
        cross_entropy = (softplus - self._products) / self._points
        return cross_entropy, 1 - (2 * self._overlaps + 1) / (probabilities + self._of_targets + 1)
