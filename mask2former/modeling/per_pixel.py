"""The baselines of MaskFormer's paper (section 4.1): heads that classify every pixel, for ``SemanticSegmentor``.

Letters: ``B`` batch, ``C`` channels, ``K`` classes.
"""

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from ..errors import UserError
from .head import PixelDecoder, transformer_in_channels, transformer_input
from .loss_in_parts import LossInParts
from .old_names import RenamesOldWeights
from .pixel_decoder import build_pixel_decoder
from .transformer_decoder import StandardTransformerDecoder

__all__ = ["PerPixelBaselineHead", "PerPixelBaselinePlusHead"]


class PerPixelHead(RenamesOldWeights, LossInParts, ABC):
    """What the two heads share: logits at the picture's size, and their loss.

    Args:
        input_shape: channels and stride of each backbone feature used, by name.
        pixel_decoder: see :func:`pixel_decoder.build_pixel_decoder`.
        loss_weight: weight of each loss.
        ignore_value: label of pixels without a class.
    """

    renamed = {"": "pixel_decoder."}  # its parts were the head's own

    def __init__(
        self, input_shape: dict[str, ShapeSpec], pixel_decoder: PixelDecoder, loss_weight: float, ignore_value: int
    ) -> None:
        super().__init__()
        self.finest = min(input_shape, key=lambda name: input_shape[name].stride)
        self.finest_stride = input_shape[self.finest].stride
        self.pixel_decoder = pixel_decoder
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        if cfg.MODEL.MASK_FORMER.ACTIVATION_CHECKPOINTING:
            raise UserError(
                "MODEL.MASK_FORMER.ACTIVATION_CHECKPOINTING needs MaskFormer, and the model is a per-pixel baseline: "
                "set it to []"
            )
        return {
            "input_shape": {name: shape for name, shape in input_shape.items() if name in head.IN_FEATURES},
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "loss_weight": head.LOSS_WEIGHT,
            "ignore_value": head.IGNORE_VALUE,
        }

    @abstractmethod
    def predict(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Logits (B, K, H/4, W/4) of every prediction that is trained; the last is the result."""

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Train or segment, as ``SemanticSegmentor`` asks a head to.

        Args:
            features: backbone features by name.
            targets: classes (B, H, W) int64 of the pixels of the padded pictures; needed in training.

        Returns:
            in training None and weighted losses by name: ``loss_sem_seg`` of the last prediction, and the same with
            ``_0``, ``_1``, ... for those before; in inference logits (B, K, H, W) and no losses.
        """
        finest = features[self.finest]
        size = (finest.shape[-2] * self.finest_stride, finest.shape[-1] * self.finest_stride)
        *earlier, last = self.predict(features)
        if not self.training:
            return _resize(last, size), {}
        if targets is None:
            raise UserError(
                "training a per-pixel head needs samples with 'sem_seg': set INPUT.DATASET_MAPPER_NAME to "
                "mask_former_semantic"
            )
        losses = {"loss_sem_seg": self._loss(_resize(last, size), targets)}
        for index, logits in enumerate(earlier):
            losses[f"loss_sem_seg_{index}"] = self._loss(_resize(logits, size), targets)
        return None, losses

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, averaged over the pixels that have a class; 0 where none has."""
        height, width = logits.shape[-2] - targets.shape[-2], logits.shape[-1] - targets.shape[-1]
        targets = F.pad(targets, (0, width, 0, height), value=self.ignore_value)  # the backbone rounds sizes up
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="sum")
        labels = targets if self.batch is None else torch.cat([x["sem_seg"].flatten() for x in self.batch])
        return self.loss_weight * total / (labels != self.ignore_value).sum().clamp(min=1)


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselineHead(PerPixelHead):
    """A linear classifier on every pixel's mask features.

    Args:
        input_shape: channels and stride of each backbone feature used, by name.
        num_classes: K.
        pixel_decoder: see :func:`pixel_decoder.build_pixel_decoder`.
        mask_dim: channels of its mask features.
        loss_weight: weight of the loss.
        ignore_value: label of pixels without a class.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        pixel_decoder: PixelDecoder,
        mask_dim: int = 256,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
    ) -> None:
        super().__init__(input_shape, pixel_decoder, loss_weight, ignore_value)
        self.predictor = Conv2d(mask_dim, num_classes, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            **super().from_config(cfg, input_shape),
            "num_classes": head.NUM_CLASSES,
            "mask_dim": head.MASK_DIM,
        }

    def predict(self, features: dict[str, Tensor]) -> list[Tensor]:
        """See ``PerPixelHead``: one prediction."""
        mask_features, _, _ = self.pixel_decoder.forward_features(features)
        return [self.predictor(mask_features)]


@SEM_SEG_HEADS_REGISTRY.register()
class PerPixelBaselinePlusHead(PerPixelHead):
    """MaskFormer's modules with one query for each class: a query's mask logits are its class's.

    Args:
        input_shape: channels and stride of each backbone feature used, by name.
        num_classes: K.
        pixel_decoder: see :func:`pixel_decoder.build_pixel_decoder`.
        transformer_predictor: a ``StandardTransformerDecoder`` without class head, with K queries.
        transformer_in_feature: what it attends to, see ``MaskFormerHead``.
        deep_supervision: whether the prediction after each of its layers is trained, or the last alone.
        loss_weight: weight of each loss.
        ignore_value: label of pixels without a class.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        pixel_decoder: PixelDecoder,
        transformer_predictor: nn.Module,
        transformer_in_feature: str,
        deep_supervision: bool = True,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
    ) -> None:
        super().__init__(input_shape, pixel_decoder, loss_weight, ignore_value)
        self.num_classes = num_classes
        self.predictor = transformer_predictor
        self.transformer_in_feature = transformer_in_feature
        self.deep_supervision = deep_supervision

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head, mask_former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        if mask_former.NUM_OBJECT_QUERIES != head.NUM_CLASSES:
            logging.getLogger(__name__).warning(_query_for_each_class(mask_former.NUM_OBJECT_QUERIES, head.NUM_CLASSES))
        in_channels = transformer_in_channels(cfg, input_shape)
        return {
            **super().from_config(cfg, input_shape),
            "num_classes": head.NUM_CLASSES,
            "transformer_predictor": StandardTransformerDecoder(cfg, in_channels, mask_classification=False),
            "transformer_in_feature": mask_former.TRANSFORMER_IN_FEATURE,
            "deep_supervision": mask_former.DEEP_SUPERVISION,
        }

    def predict(self, features: dict[str, Tensor]) -> list[Tensor]:
        """See ``PerPixelHead``: a prediction after each decoder layer.

        Raises:
            UserError: in training, if there are fewer queries than classes.
        """
        decoded = self.pixel_decoder.forward_features(features)
        source = transformer_input(self.transformer_in_feature, features, decoded)
        predictions = self.predictor(source, decoded[0])
        num_queries = predictions["pred_masks"].shape[1]
        if self.training and num_queries < self.num_classes:
            raise UserError(_query_for_each_class(num_queries, self.num_classes))
        if not (self.training and self.deep_supervision):
            return [predictions["pred_masks"]]
        return [*(layer["pred_masks"] for layer in predictions["aux_outputs"]), predictions["pred_masks"]]


def _query_for_each_class(num_queries: int, num_classes: int) -> str:
    return (
        "PerPixelBaselinePlusHead has a query for each class: set MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, "
        f"{num_queries}, to MODEL.SEM_SEG_HEAD.NUM_CLASSES, {num_classes}"
    )


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
