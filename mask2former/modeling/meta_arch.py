"""The model: backbone, head, and what training and inference make of the head's predictions."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from detectron2.structures import ImageList
from torch import Tensor, nn

from .backbone.frozen_norm import fold_frozen_norms
from .backbone.stem import keep_little_of_stems
from .checkpointing import checkpoint_activations
from .criterion import SetCriterion
from .inference import InferenceSettings, postprocess
from .matcher import HungarianMatcher
from .precision import bfloat16_inference, require_bfloat16
from .targets import prepare_targets
from .tiling import TiledInference, tile_windows

__all__ = ["MaskFormer"]


@META_ARCH_REGISTRY.register()
class MaskFormer(nn.Module):
    """Segments pictures by classifying masks: semantic, instance and panoptic (paper, section 3).

    Args:
        backbone: a Detectron2 backbone.
        sem_seg_head: maps the backbone's features to ``Predictions``.
        criterion: maps predictions and targets to losses.
        inference: what inference makes.
        size_divisibility: pictures are padded to a multiple of this; negative: of what the backbone asks for.
        pixel_mean, pixel_std: of each input channel, in the range of the pictures (0 to 255).
        activation_checkpointing: parts whose layers are computed once more in the backward pass, see
            :func:`checkpointing.checkpoint_activations`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        criterion: SetCriterion,
        inference: InferenceSettings | None = None,
        size_divisibility: int = 32,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        activation_checkpointing: Sequence[str] = (),
    ) -> None:
        super().__init__()
        fold_frozen_norms(backbone)
        keep_little_of_stems(backbone)
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.inference = inference or InferenceSettings()
        self.size_divisibility = backbone.size_divisibility if size_divisibility < 0 else size_divisibility
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        checkpoint_activations(self, activation_checkpointing)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        mask_former = cfg.MODEL.MASK_FORMER
        backbone = build_backbone(cfg)
        matcher = HungarianMatcher(
            cost_class=mask_former.CLASS_WEIGHT,
            cost_mask=mask_former.MASK_WEIGHT,
            cost_dice=mask_former.DICE_WEIGHT,
            num_points=mask_former.TRAIN_NUM_POINTS,
        )
        criterion = SetCriterion(
            cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            matcher,
            class_weight=mask_former.CLASS_WEIGHT,
            mask_weight=mask_former.MASK_WEIGHT,
            dice_weight=mask_former.DICE_WEIGHT,
            no_object_weight=mask_former.NO_OBJECT_WEIGHT,
            num_points=mask_former.TRAIN_NUM_POINTS,
            oversample_ratio=mask_former.OVERSAMPLE_RATIO,
            importance_sample_ratio=mask_former.IMPORTANCE_SAMPLE_RATIO,
            deep_supervision=mask_former.DEEP_SUPERVISION,
            normalize_over_ranks=mask_former.NORMALIZE_OVER_RANKS,
        )
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "criterion": criterion,
            "inference": InferenceSettings.from_config(cfg),
            "size_divisibility": mask_former.SIZE_DIVISIBILITY,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "activation_checkpointing": mask_former.ACTIVATION_CHECKPOINTING,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is, and its inputs are moved to."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> Any:
        """Train on, or segment, a batch of pictures.

        Args:
            batched_inputs: dicts with ``image`` (3, h, w), in the config's channel order and range 0 to 255.
                In training ``instances`` too, with ``gt_classes`` (N) and ``gt_masks`` (N, h, w). In
                inference optionally ``height`` and ``width``, the size of the results (default: h, w).

        Returns:
            In training, weighted losses by name. In inference, for each picture a dict as
            :func:`inference.postprocess` describes it; where inference is in tiles,
            ``pred_masks`` is a ``CroppedMasks``.
        """
        if self.inference.bfloat16:  # in training too, where it would else come out at the first evaluation
            require_bfloat16(self.device)
        if self.training:
            images = self.preprocess(batched_inputs)
            targets = prepare_targets(batched_inputs, images.tensor.shape[-2:], self.device)
            return self.criterion(self._predict(images), targets)
        sizes = [(x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])) for x in batched_inputs]
        if self.inference.tile_size:
            return [self._segment_in_tiles(x["image"], size) for x, size in zip(batched_inputs, sizes, strict=True)]
        images = self.preprocess(batched_inputs)
        padded_size, image_sizes = images.tensor.shape[-2:], images.image_sizes
        predictions = self._predict(images).masks_of_last_layer()
        del images  # results are large: nothing that they don't need is kept beside them
        return [
            postprocess(predictions, index, (padded_size, image_size, size), self.inference)
            for index, (image_size, size) in enumerate(zip(image_sizes, sizes, strict=True))
        ]

    @contextmanager
    def other_inference(self, **changes: Any) -> Iterator[None]:
        """In the block the model infers with some of its ``InferenceSettings`` changed."""
        settings = self.inference
        self.inference = dataclasses.replace(settings, **changes)
        try:
            yield
        finally:
            self.inference = settings

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalised pictures (B, 3, H, W), padded to a common size."""
        return self._batch([self._normalize(x["image"]) for x in batched_inputs])

    def _normalize(self, picture: Tensor) -> Tensor:
        return (picture.to(self.device) - self.pixel_mean) / self.pixel_std

    def _batch(self, pictures: Sequence[Tensor]) -> ImageList:
        return ImageList.from_tensors(list(pictures), self.size_divisibility)

    def _predict(self, images: ImageList) -> Any:
        x = images.tensor
        if x.device.type == "cpu":  # a fifth faster than channels first, where convolutions reorder their input
            x = x.contiguous(memory_format=torch.channels_last)
        bfloat16 = self.inference.bfloat16 and not self.training
        with bfloat16_inference(self.device) if bfloat16 else nullcontext():
            return self.sem_seg_head(self.backbone(x))

    def _segment_in_tiles(self, picture: Tensor, size: tuple[int, int]) -> dict[str, Any]:
        settings = self.inference
        input_size = (picture.shape[-2], picture.shape[-1])
        tiled = TiledInference(input_size, size, settings)
        windows = tile_windows(input_size, settings.tile_size, settings.tile_overlap)
        for start in range(0, len(windows), settings.tile_batch_size):
            batch = windows[start : start + settings.tile_batch_size]
            # Normalised one by one: a large picture of 8 bits a channel would take four times its memory.
            images = self._batch([self._normalize(picture[:, w.y0 : w.y1, w.x0 : w.x1]) for w in batch])
            predictions = self._predict(images)
            for index, window in enumerate(batch):
                tiled.add(window, predictions, index, images.tensor.shape[-2:])
        return tiled.results()
