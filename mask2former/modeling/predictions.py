"""What a transformer decoder predicts, with masks made only where they are looked at.

Letters: ``L`` predictions (decoder layers + 1), ``B`` batch, ``Q`` queries, ``K`` classes, ``C`` channels,
``P`` points; ``H`` and ``W`` are the picture's padded size, masks have a quarter of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ops import multiply, product
from ..ops.points import loss_sums_reference
from .points import Choose, loss_sums_at_chosen_points, sample_features, sample_points

__all__ = ["DensePredictions", "Predictions"]


# Logits at points that are made at one time: on a CPU 4 MB, so that its cache holds them.
LOGITS_AT_A_TIME = {"cpu": 1 << 20}
LOGITS_AT_A_TIME_ELSEWHERE = 1 << 22


class Predictions(Mapping[str, Any]):
    """Class logits and masks of every decoder layer.

    A mask is the product of a mask embedding with the mask features (paper, section 3.1). It is kept
    as these factors: losses need it at some points, inference for some queries.

    It reads as the published decoder's dict too: ``pred_logits`` (B, Q, K+1), ``pred_masks``
    (B, Q, H/4, W/4) of the last layer, and ``aux_outputs``, a list of dicts of the two for the layers before.

    Args:
        class_logits: (L, B, Q, K+1); the last class is "no object".
        mask_embeddings: (L, B, Q, C).
        mask_features: (B, C, H/4, W/4).
    """

    def __init__(self, class_logits: Tensor, mask_embeddings: Tensor, mask_features: Tensor) -> None:
        self.class_logits = class_logits
        self.mask_embeddings = mask_embeddings
        self.mask_features = mask_features

    @staticmethod
    def from_outputs(outputs: "Predictions | Mapping[str, Any]") -> "Predictions":
        """``outputs`` itself, or what a decoder returned as the published dict."""
        if isinstance(outputs, Predictions):
            return outputs
        missing = {"pred_logits", "pred_masks"} - set(outputs)
        if missing:
            raise ValueError(f"a transformer decoder must return pred_logits and pred_masks, but {missing} is missing")
        layers = [*outputs.get("aux_outputs", ()), outputs]
        return DensePredictions(
            torch.stack([layer["pred_logits"] for layer in layers]),
            torch.stack([layer["pred_masks"] for layer in layers]),
        )

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[str]:
        return iter(("pred_logits", "pred_masks", "aux_outputs"))

    def __getitem__(self, key: str) -> Any:
        if key == "pred_logits":
            return self.class_logits[-1]
        if key == "pred_masks":
            return self._layer_masks(-1)
        if key == "aux_outputs":
            return [
                {"pred_logits": self.class_logits[layer], "pred_masks": self._layer_masks(layer)}
                for layer in range(len(self.class_logits) - 1)
            ]
        raise KeyError(key)

    @cached_property
    def _features(self) -> Sequence[Tensor]:
        """Mask features (1, C, H/4, W/4) in float32, picture by picture, which keeps the layout of their gradients.

        Split once, since the backward of indexing fills a whole batch; and not by the decoder, which torch.compile
        would compile for this number of pictures alone. With gradients even if the matcher, which has none, is first.
        """
        with torch.enable_grad():
            features = self.mask_features.float()
            return features.split(1) if len(features) > 1 else (features,)  # a split's backward copies the gradient

    @property
    def mask_size(self) -> tuple[int, int]:
        """Height and width of the masks."""
        return self.mask_features.shape[-2], self.mask_features.shape[-1]

    def last_layer(self) -> "Predictions":
        """The last layer's predictions alone."""
        return Predictions(self.class_logits[-1:], self.mask_embeddings[-1:], self.mask_features)

    def masks_of_last_layer(self) -> "Predictions":
        """The last layer's predictions with whole masks, in place of mask features that have more channels."""
        if self.mask_features.shape[1] <= self.class_logits.shape[2]:
            return self.last_layer()
        return DensePredictions(self.class_logits[-1:], self["pred_masks"][None])

    def mask_logits(self, layer: int, image: int, queries: Tensor | None = None) -> Tensor:
        """Mask logits (N, H/4, W/4) in float32 of a picture's queries: of all, or of those with indices (N)."""
        embeddings = self.mask_embeddings[layer, image]
        if queries is not None:
            embeddings = embeddings[queries]
        features = self._features[image][0]
        with _full_precision(embeddings):
            if torch.is_grad_enabled():
                return torch.einsum("qc,chw->qhw", embeddings.float(), features)
            masks = product(embeddings.float()[None], features.flatten(1)[None])
        return masks[0].unflatten(1, features.shape[1:])

    def loss_sums(self, image: int, queries: Tensor, choose: Choose) -> Tensor:
        """What mask losses are made of, as ``ops.points.loss_sums`` has it, of a picture's queries in every layer.

        Args:
            image: the picture.
            queries: indices (N, L).
            choose: chooses points for the N*L masks; gradients of what it gives don't count.

        Returns:
            (N*L, 4).
        """
        layers = torch.arange(queries.shape[1], device=queries.device)
        embeddings = self.mask_embeddings[layers, image, queries].flatten(0, 1).float()
        with _full_precision(embeddings):
            return loss_sums_at_chosen_points(embeddings, self._features[image], choose)

    @torch.no_grad()
    def mask_logits_at(self, image: int, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Mask logits of a picture at points (P, 2), as ``points`` has them, without gradients.

        Yields:
            Some points at a time, and the logits (L, Q, p) there in float32, whose memory is used again for the next.
        """
        with _full_precision(points):
            features = sample_features(self._features[image][0], points)  # (C, P)
        embeddings = self.mask_embeddings[:, image].float()
        rows = embeddings.flatten(0, 1)  # the product of all layers' is faster than those of fewer rows
        at_a_time = LOGITS_AT_A_TIME.get(rows.device.type, LOGITS_AT_A_TIME_ELSEWHERE)
        step = max(at_a_time // max(len(rows), 1), 1)
        memory = features.new_empty(len(rows), min(step, len(points)))
        for start in range(0, len(points), step):
            here = slice(start, start + step)
            some = features[:, here]
            logits = memory[:, : some.shape[1]]
            with _full_precision(points):
                multiply(rows, some, logits)
            yield here, logits.unflatten(0, embeddings.shape[:2])

    def _layer_masks(self, layer: int) -> Tensor:
        return torch.stack([self.mask_logits(layer, image) for image in range(self.class_logits.shape[1])])


class DensePredictions(Predictions):
    """Predictions of a decoder that returned whole masks.

    Args:
        class_logits: (L, B, Q, K+1).
        masks: mask logits (L, B, Q, H/4, W/4).
    """

    def __init__(self, class_logits: Tensor, masks: Tensor) -> None:
        self.class_logits = class_logits
        self.masks = masks

    @property
    def mask_size(self) -> tuple[int, int]:
        return self.masks.shape[-2], self.masks.shape[-1]

    def last_layer(self) -> "Predictions":
        return DensePredictions(self.class_logits[-1:], self.masks[-1:])

    def masks_of_last_layer(self) -> "Predictions":
        return self.last_layer()

    def mask_logits(self, layer: int, image: int, queries: Tensor | None = None) -> Tensor:
        masks = self.masks[layer, image].float()
        return masks if queries is None else masks[queries]

    def loss_sums(self, image: int, queries: Tensor, choose: Choose) -> Tensor:
        layers = torch.arange(queries.shape[1], device=queries.device)
        masks = self.masks[layers, image, queries].flatten(0, 1).float()
        points, _, labels = choose(slice(0, len(masks)), masks)
        logits = sample_points(masks, points) if len(masks) else masks.sum((1, 2))[:, None].expand(labels.shape)
        with _full_precision(logits):
            return loss_sums_reference(logits, labels)

    @torch.no_grad()
    def mask_logits_at(self, image: int, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
        yield slice(len(points)), torch.stack([sample_points(masks.float(), points) for masks in self.masks[:, image]])


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
