"""Losses on whole masks, for ``model.py`` to show what losses at points save (paper, section 3.3 and table 5).

As in MaskFormer, the decoder makes the masks of all layers and queries, queries and objects are matched by whole masks
of that size, and matched masks are compared with the objects at the picture's size. The losses are Mask2Former's and
nothing is kept twice, so that points are the only difference.

Letters: ``L`` layers, ``B`` batch, ``Q`` queries, ``N`` objects, ``n`` matched pairs, ``h`` and ``w`` size of the
decoder's masks, ``H`` and ``W`` that of the picture.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mask2former.modeling import Predictions, SetCriterion
from mask2former.modeling.losses import PairSums, cross_entropy_loss, dice_loss
from mask2former.modeling.targets import Targets

__all__ = ["FullMaskCriterion"]


class FullMaskCriterion(nn.Module):
    """In place of a ``SetCriterion``: the same arguments, and losses of the same names and weights."""

    def __init__(self, criterion: SetCriterion) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, predictions: Predictions, targets: Sequence[Targets]) -> dict[str, Tensor]:
        """Weighted losses by name."""
        masks = torch.einsum("lbqc,bchw->lbqhw", predictions.mask_embeddings, predictions.mask_features)
        objects = [target.masks.float() for target in targets]
        last = len(masks) - 1
        losses = {}
        # Iterating splits a tensor once; an index into it would fill a gradient of its whole size each time.
        for layer, (class_logits, mask_logits) in enumerate(zip(predictions.class_logits, masks, strict=True)):
            suffix = "" if layer == last else f"_{layer}"
            for name, loss in self._layer_losses(class_logits, mask_logits, targets, objects).items():
                losses[name + suffix] = self.criterion.weights[name] * loss
        return losses

    def _layer_losses(
        self, class_logits: Tensor, mask_logits: Tensor, targets: Sequence[Targets], masks: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Losses of class logits (B, Q, K+1) and mask logits (B, Q, h, w), with the objects' masks (N, H, W)."""
        classes = torch.full(class_logits.shape[:2], self.criterion.num_classes)  # "no object"
        cross_entropy = dice = torch.zeros(())
        for image, (logits, target, whole) in enumerate(zip(mask_logits, targets, masks, strict=True)):
            queries, objects = self._match(class_logits[image].detach(), logits.detach(), target.classes, whole)
            classes[image, queries] = target.classes[objects]
            matched = whole if len(objects) == len(whole) else whole[objects]
            upsampled = F.interpolate(logits[queries][None], whole.shape[-2:], mode="bilinear", align_corners=False)[0]
            pairs = upsampled.flatten(1), matched.flatten(1)  # (n, H*W)
            cross_entropy = cross_entropy + cross_entropy_loss(*pairs)
            dice = dice + dice_loss(*pairs)
        num_objects = max(sum(len(target) for target in targets), 1)
        return {
            "loss_ce": F.cross_entropy(class_logits.transpose(1, 2), classes, self.criterion.empty_weight),
            "loss_mask": cross_entropy / num_objects,
            "loss_dice": dice / num_objects,
        }

    def _match(
        self, class_logits: Tensor, mask_logits: Tensor, classes: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries (n) and objects (n), in the order of the objects.

        Args:
            class_logits, mask_logits: (Q, K+1) and (Q, h, w).
            classes, masks: the objects', (N) and (N, H, W).
        """
        matcher = self.criterion.matcher
        logits = mask_logits.flatten(1)
        small = F.interpolate(masks[None], mask_logits.shape[-2:], mode="nearest")[0].flatten(1)
        sums = PairSums(len(logits), len(small), logits.device)
        sums.add(logits.clone(), small)
        cross_entropy, dice = sums.losses()
        cost = (
            -matcher.cost_class * class_logits.softmax(-1)[:, classes]
            + matcher.cost_mask * cross_entropy
            + matcher.cost_dice * dice
        )  # (Q, N)
        objects, queries = linear_sum_assignment(cost.T.numpy())
        return torch.from_numpy(queries), torch.from_numpy(objects)
