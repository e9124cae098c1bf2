"""The training loss (paper, section 3.2.2)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from .loss_in_parts import LossInParts
from .losses import losses_of_sums
from .matcher import HungarianMatcher
from .points import sample_masks, uncertain_points
from .predictions import Predictions
from .targets import Targets

__all__ = ["SetCriterion"]

Matches = Sequence[tuple[Tensor, Tensor]]  # for each picture: queries, and the objects they are matched with


class SetCriterion(LossInParts, nn.Module):
    """Matches queries with objects and compares classes and masks, layer by layer.

    Args:
        num_classes: K, without "no object".
        matcher: assigns queries to objects.
        class_weight, mask_weight, dice_weight: weights of the losses.
        no_object_weight: weight of the "no object" class in the classification loss.
        num_points, oversample_ratio, importance_sample_ratio: see :func:`points.uncertain_points`.
        deep_supervision: whether all layers have losses, or the last alone.
        normalize_over_ranks: divide by what the batch of all processes holds, so that gradients don't depend on the
            number of processes. If not, the class loss is averaged by process, as in the published code.
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
        normalize_over_ranks: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.deep_supervision = deep_supervision
        self.normalize_over_ranks = normalize_over_ranks
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    def forward(self, predictions: Predictions, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Weighted losses by name: ``loss_ce``, ``loss_mask`` and ``loss_dice`` of the last layer, and the same
        with ``_0``, ``_1``, ... for the layers before.

        The names are the same whatever the targets hold, and every loss depends on the predictions, so that
        pictures without objects train too. They are NaN if a prediction is not finite: an error here would leave
        other processes waiting.
        """
        if not self.deep_supervision:
            predictions = predictions.last_layer()
        matches = self.matcher(predictions, targets)
        num_objects, class_weight = self._normalizers(targets, predictions.class_logits.shape[2])
        mask_losses = self._mask_losses(predictions, targets, matches)
        last = len(matches) - 1
        losses = {}
        for layer, logits in enumerate(predictions.class_logits):
            layer_losses = {
                "loss_ce": self._class_loss(logits, targets, matches[layer]) / class_weight,
                **{name: loss[layer] / num_objects for name, loss in mask_losses.items()},
            }
            suffix = "" if layer == last else f"_{layer}"
            losses.update({name + suffix: self.weights[name] * loss for name, loss in layer_losses.items()})
        if self.matcher.not_finite:
            return {name: loss * math.nan for name, loss in losses.items()}
        return losses

    def _normalizers(self, targets: Sequence[Targets], num_queries: int) -> tuple[Tensor, Tensor]:
        """What the batch's mask losses and class losses are divided by: objects, and the weights of all queries.

        Both are means over the processes, whose gradients are averaged.
        """
        objects = [len(x["instances"]) for x in self.batch] if self.batch else [len(target) for target in targets]
        matched = sum(min(count, num_queries) for count in objects)
        weight = matched + self.empty_weight[-1] * (len(objects) * num_queries - matched)
        num_objects, mean_weight = _mean_over_ranks(torch.stack([weight.new_tensor(float(sum(objects))), weight]))
        if self.normalize_over_ranks:
            return num_objects.clamp(min=1 / comm.get_world_size()), mean_weight
        return num_objects.clamp(min=1), weight

    def _class_loss(self, logits: Tensor, targets: Sequence[Targets], matches: Matches) -> Tensor:
        """Cross-entropy of logits (B, Q, K+1), summed; a query without an object is to say "no object"."""
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        for row, target, (queries, objects) in zip(classes, targets, matches, strict=True):
            row[queries] = target.classes[objects]
        return F.cross_entropy(logits.float().transpose(1, 2), classes, self.empty_weight, reduction="sum")

    def _mask_losses(
        self, predictions: Predictions, targets: Sequence[Targets], matches: Sequence[Matches]
    ) -> dict[str, Tensor]:
        """Mask losses (L) of the layers, summed over all pairs."""
        losses = []
        for image, target in enumerate(targets):
            queries, objects = (torch.stack([layer[image][i] for layer in matches], dim=1) for i in range(2))  # (n, L)
            losses.append(self._mask_losses_of_pairs(predictions, image, queries, target, objects))
        return dict(zip(("loss_mask", "loss_dice"), torch.stack(losses).sum(0), strict=True))

    def _mask_losses_of_pairs(
        self, predictions: Predictions, image: int, queries: Tensor, target: Targets, objects: Tensor
    ) -> Tensor:
        """Cross-entropy and dice losses (2, L) of a picture's queries (n, L) and objects (n, L)."""
        # Pairs of one object follow one another, so that its mask is in the cache for all of them.
        object_of_pair = objects.flatten()

        def choose(pairs: slice, mask_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            points, logits = uncertain_points(
                mask_logits, self.num_points, self.oversample_ratio, self.importance_sample_ratio
            )
            return points, logits, sample_masks(target.masks, points, object_of_pair[pairs])

        sums = predictions.loss_sums(image, queries, choose).unflatten(0, queries.shape)  # (n, L, 4)
        return torch.stack(losses_of_sums(sums, self.num_points)).sum(1)


def _mean_over_ranks(values: Tensor) -> Tensor:
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    return values / comm.get_world_size()
