"""What results are made of: the pixels of some rows of masks, by compiled kernels or in plain PyTorch.

Kernels keep a few pixels of all masks in the CPU's first cache, make their probabilities and what comes of them, and
write no mask to memory but those that are a result.

Letters: ``N`` masks, ``K`` classes, ``M`` instances; a strip has ``R`` rows and ``W`` columns.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from . import extension

__all__ = ["Inside", "MaskStrip", "Winners", "best_classes"]


class Winners(NamedTuple):
    """The best of C masks at each pixel.

    Attributes:
        winner: (R, W) int32 its number, or C where its probability is less than a half.
        visible: (C) int64 pixels where a mask is the best.
        remaining: (C) int64 of them, those where its probability is a half or more.
        whole: (C) int64 pixels where its probability is a half or more.
    """

    winner: Tensor
    visible: Tensor
    remaining: Tensor
    whole: Tensor


class Inside(NamedTuple):
    """What is known of the inside of masks, where logits are above 0; of a mask that no one asked for, anything.

    Attributes:
        above_half: (N) sum of what probabilities exceed a half by.
        area: (N) int64 pixels.
        in_columns: (N, W) bool, whether there is any pixel of a column.
        in_rows: (N, R) bool, of a row.
    """

    above_half: Tensor
    area: Tensor
    in_columns: Tensor
    in_rows: Tensor


@dataclass(frozen=True)
class MaskStrip:
    """Rows of N masks, each a mixture of two rows of maps, as bilinear interpolation makes it.

    Attributes:
        maps: (N, r, W) logits.
        low: (R) int64, for each row of the strip a row of ``maps``.
        high: (R) int64, another one.
        share: (R) of the second one, 0 to 1.
    """

    maps: Tensor
    low: Tensor
    high: Tensor
    share: Tensor

    @staticmethod
    def whole(logits: Tensor) -> "MaskStrip":
        """Masks (N, R, W) as they are."""
        rows = torch.arange(logits.shape[1], device=logits.device)
        return MaskStrip(logits, rows, rows, torch.zeros_like(rows, dtype=logits.dtype))

    @cached_property
    def logits(self) -> Tensor:
        """(N, R, W)."""
        return torch.lerp(self.maps[:, self.low], self.maps[:, self.high], self.share[:, None])

    @cached_property
    def probabilities(self) -> Tensor:
        """(N, R, W), of a pixel to be inside."""
        return self.logits.sigmoid()

    def write_class_scores(self, class_probabilities: Tensor, scores: Tensor) -> None:
        """Each mask gives its probability to its classes (MaskFormer, section 3.4).

        Args:
            class_probabilities: (K, N), 0 or more.
            scores: (K, R, W) of which rows are contiguous, to be written.
        """
        if self._has_kernel(class_probabilities):
            torch.ops.mask2former.class_scores(*self._parts, class_probabilities, scores)
            return
        probabilities = self.probabilities.flatten(1)
        if torch.jit.is_tracing() or _with_gradients(self.maps, class_probabilities):
            scores.copy_((class_probabilities @ probabilities).view_as(scores))
        else:  # faster, but nothing that gradients or a trace could follow
            torch.mm(class_probabilities, probabilities, out=scores.flatten(1))

    def class_labels(self, class_probabilities: Tensor) -> Tensor:
        """The best classes (R, W), int32, of what :meth:`write_class_scores` would write.

        Kernels make the scores of those classes alone that can be the best one somewhere in a few pixels: most classes
        aren't in most pictures.
        """
        if self._has_kernel(class_probabilities):
            labels: Tensor = torch.ops.mask2former.class_labels(*self._parts, class_probabilities)
            return labels
        scores = class_probabilities @ self.probabilities.flatten(1)
        return best_classes(scores).view(self.probabilities.shape[1:])

    def winners(self, masks: Tensor, scores: Tensor) -> Winners:
        """Which masks have the best class score x mask probability (MaskFormer, section 3.4), the first of equal ones.

        Args:
            masks: (C) int64 the masks that compete, one or more.
            scores: (C) of their classes.
        """
        if self._has_kernel(scores):
            return Winners(*torch.ops.mask2former.mask_winners(*self._parts, masks, scores))
        probabilities, count = self.probabilities, len(masks)
        if count < len(probabilities):  # else they are all there, in this order
            probabilities = probabilities[masks]
        winner = _first_of_best(scores[:, None, None] * probabilities)  # (R, W)
        inside = probabilities.gather(0, winner[None])[0] >= 0.5
        return Winners(
            winner.masked_fill(~inside, count).int(),
            torch.bincount(winner.flatten(), minlength=count),
            torch.bincount(winner[inside], minlength=count),
            _areas(probabilities >= 0.5),
        )

    def write_binary_masks(self, masks: Tensor, binary: Tensor) -> Inside:
        """Which pixels are inside.

        Args:
            masks: (M) int64 the masks that are asked for; some may be there more than once.
            binary: (M, R, W) bool of which rows are contiguous, to be written.
        """
        if self._has_kernel(self.share):
            return Inside(*torch.ops.mask2former.binary_masks(*self._parts, masks, binary))
        inside = self.logits > 0
        binary.copy_(inside[masks])
        return Inside(
            (self.probabilities - 0.5).clamp_(min=0).sum((1, 2)),  # a product with the mask is slower
            _areas(inside),
            self.logits.amax(1) > 0,
            self.logits.amax(2) > 0,
        )

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.maps, self.low, self.high, self.share

    def _has_kernel(self, factors: Tensor) -> bool:
        """Whether kernels compute with these masks and ``factors``: on a CPU, in float32, and without gradients."""
        return (
            "cpu" in extension.KERNELS
            and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (self.maps, factors))
            and not (_with_gradients(self.maps, factors) or torch.jit.is_tracing() or torch.compiler.is_compiling())
        )


def best_classes(scores: Tensor) -> Tensor:
    """The best class of each pixel, int32, from scores with the classes first; the first of equal ones."""
    return _first_of_best(scores).int()


def _with_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _first_of_best(values: Tensor) -> Tensor:
    """``argmax(0)``, two to three times as fast on a CPU."""
    return values.max(0).indices


def _areas(masks: Tensor) -> Tensor:
    """Pixels (N) of bool masks (N, R, W)."""
    return masks.sum((1, 2))
