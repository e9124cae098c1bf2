"""COCO: large-scale jitter in training, the shorter side at 800 pixels in evaluation."""

from detectron2.config import LazyCall as L

from mask2former.data.augmentation import large_scale_jitter

from .data import dataloader

__all__ = ["dataloader"]

dataloader.train.mapper.augmentations = L(large_scale_jitter)(image_size=1024, min_scale=0.1, max_scale=2.0)
