"""The training loss (paper, section 3.2.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from .losses import cross_entropy_loss, dice_loss
from .matcher import HungarianMatcher
from .points import sample_points_each, uncertain_points
from .predictions import Predictions
from .targets import Targets

__all__ = ["SetCriterion"]

Matches = Sequence[tuple[Tensor, Tensor]]  # for each picture: queries, and the objects they are matched with


class SetCriterion(nn.Module):
    """Matches queries with objects and compares classes and masks, layer by layer.

    Args:
        num_classes: K, without "no object".
        matcher: assigns queries to objects.
        class_weight, mask_weight, dice_weight: weights of the losses.
        no_object_weight: weight of the "no object" class in the classification loss.
        num_points, oversample_ratio, importance_sample_ratio: see :func:`points.uncertain_points`.
        deep_supervision: whether all layers have losses, or the last alone.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.deep_supervision = deep_supervision
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    def forward(self, predictions: Predictions, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Weighted losses by name: ``loss_ce``, ``loss_mask`` and ``loss_dice`` of the last layer, and the same
        with ``_0``, ``_1``, ... for the layers before.

        The names are the same whatever the targets hold, and every loss depends on the predictions, so that
        pictures without objects train too.
        """
        if not self.deep_supervision:
            predictions = predictions.last_layer()
        matches = self.matcher(predictions, targets)
        num_objects = _mean_over_ranks(sum(len(target) for target in targets), predictions.class_logits.device)
        last = len(predictions.class_logits) - 1
        losses = {}
        for layer, mask_logits in enumerate(_matched_masks(predictions, matches)):
            layer_losses = {
                "loss_ce": self._class_loss(predictions.class_logits[layer], targets, matches[layer]),
                **self._mask_losses(mask_logits, targets, matches[layer], num_objects),
            }
            suffix = "" if layer == last else f"_{layer}"
            losses.update({name + suffix: self.weights[name] * loss for name, loss in layer_losses.items()})
        return losses

    def _class_loss(self, logits: Tensor, targets: Sequence[Targets], matches: Matches) -> Tensor:
        """Cross-entropy of logits (B, Q, K+1); a query without an object is to say "no object"."""
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        for row, target, (queries, objects) in zip(classes, targets, matches, strict=True):
            row[queries] = target.classes[objects]
        return F.cross_entropy(logits.float().transpose(1, 2), classes, self.empty_weight)

    def _mask_losses(
        self, logits: Sequence[Tensor], targets: Sequence[Targets], matches: Matches, num_objects: float
    ) -> dict[str, Tensor]:
        """Mask losses of a layer: of each picture, logits (n, H/4, W/4) of the matched queries."""
        at_points = [
            self._at_points(picture, target, objects)
            for picture, target, (_, objects) in zip(logits, targets, matches, strict=True)
        ]
        point_logits, labels = (torch.cat(parts) for parts in zip(*at_points, strict=True))
        with torch.autocast(point_logits.device.type, enabled=False):
            return {
                "loss_mask": cross_entropy_loss(point_logits, labels) / num_objects,
                "loss_dice": dice_loss(point_logits, labels) / num_objects,
            }

    def _at_points(self, logits: Tensor, target: Targets, objects: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits and labels of a picture's n matched pairs, each at points of its own: (n, P)."""
        if not len(logits):  # no pairs, and still a function of the predictions
            nothing = logits.sum((1, 2))[:, None].expand(-1, self.num_points)
            return nothing, nothing.detach()
        masks = target.mask_values
        if len(objects) < len(masks):
            masks = masks[objects]
        points = uncertain_points(logits, self.num_points, self.oversample_ratio, self.importance_sample_ratio)
        with torch.autocast(logits.device.type, enabled=False):
            return sample_points_each(logits, points), sample_points_each(masks, points)


def _matched_masks(predictions: Predictions, matches: Sequence[Matches]) -> list[tuple[Tensor, ...]]:
    """For each layer, of each picture, the mask logits (n, H/4, W/4) of the matched queries."""
    pictures = []
    for image in range(len(matches[0])):
        queries = torch.stack([layer_matches[image][0] for layer_matches in matches])  # (L, n)
        pictures.append(predictions.matched_mask_logits(image, queries).unbind(0))
    return list(zip(*pictures, strict=True))


def _mean_over_ranks(count: int, device: torch.device) -> float:
    """The number of objects on a rank, averaged over ranks, at least 1."""
    if comm.get_world_size() > 1:
        total = torch.tensor(float(count), device=device)
        torch.distributed.all_reduce(total)
        return max(total.item() / comm.get_world_size(), 1.0)
    return float(max(count, 1))
