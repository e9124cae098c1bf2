"""COCO panoptic segmentation with Swin-B learned on ImageNet-21k, equal to the YAML recipe of the same name."""

from ....common.swin import use_swin_base_in21k_384
from ..maskformer2_R50_bs16_50ep import dataloader, lr_scheduler, model, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

use_swin_base_in21k_384(model, train)
