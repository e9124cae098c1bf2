"""Assignment of queries to objects (paper, section 3.2.2; DETR, section 3.1)."""

import logging
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..errors import UserError
from .losses import PairSums
from .points import random_points, sample_masks
from .predictions import Predictions
from .targets import Targets

__all__ = ["HungarianMatcher"]

logger = logging.getLogger(__name__)


class HungarianMatcher(nn.Module):
    """Gives every object its own query, at the least total cost, for every layer.

    Args:
        cost_class, cost_mask, cost_dice: weights of the class, cross-entropy and dice costs.
        num_points: points at which masks are compared, drawn anew for each picture.

    Attributes:
        not_finite: files of the last pictures whose predictions were not finite.
    """

    def __init__(self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int) -> None:
        super().__init__()
        if cost_class == cost_mask == cost_dice == 0:
            raise UserError("one of MODEL.MASK_FORMER.CLASS_WEIGHT, MASK_WEIGHT and DICE_WEIGHT must be other than 0")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points
        self.not_finite: list[str] = []

    @torch.no_grad()
    def forward(self, predictions: Predictions, targets: Sequence[Targets]) -> list[list[tuple[Tensor, Tensor]]]:
        """Match the layers' predictions with the targets of each picture.

        Returns:
            For each layer, for each picture: indices (n) of queries and (n) of their objects in increasing
            order of object, n = min(queries, objects), on the targets' device. Pictures whose predictions are not
            finite get some; ``not_finite`` has their files.
        """
        device = predictions.class_logits.device
        costs = [self._costs(predictions, image, target).cpu() for image, target in enumerate(targets)]
        self.not_finite = [x.name for x, cost in zip(targets, costs, strict=True) if not cost.isfinite().all()]
        for name in self.not_finite:
            logger.error("the predictions for %s are not finite", name)
        return [
            [_assign(picture_costs[layer], device) for picture_costs in costs]
            for layer in range(len(predictions.class_logits))
        ]

    def _costs(self, predictions: Predictions, image: int, target: Targets) -> Tensor:
        """Costs (L, Q, N) of one picture."""
        cost = -self.cost_class * predictions.class_logits[:, image].float().softmax(-1)[..., target.classes]
        if len(target):
            points = random_points(self.num_points, device=cost.device)
            objects = sample_masks(target.masks, points)  # (N, P)
            sums = PairSums(cost.shape[0] * cost.shape[1], len(target), cost.device)
            with torch.autocast(cost.device.type, enabled=False):
                for here, logits in predictions.mask_logits_at(image, points):
                    sums.add(logits.flatten(0, 1), objects[:, here])
            cross_entropy, dice = sums.losses()
            cost += (self.cost_mask * cross_entropy + self.cost_dice * dice).view_as(cost)
        return cost


def _assign(cost: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    queries, objects = linear_sum_assignment(cost.nan_to_num().numpy())
    order = objects.argsort()
    return torch.as_tensor(queries[order], device=device), torch.as_tensor(objects[order], device=device)
