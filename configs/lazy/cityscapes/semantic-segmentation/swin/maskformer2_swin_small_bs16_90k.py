"""Cityscapes semantic segmentation with Swin-S, equal to the YAML recipe of the same name."""

from ....common.swin import use_swin_small
from ..maskformer2_R50_bs16_90k import dataloader, lr_scheduler, model, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

use_swin_small(model, train)
