"""COCO panoptic segmentation with Swin-L, equal to the YAML recipe of the same name."""

from ....common.swin import use_swin_large_in21k_384
from ..maskformer2_R50_bs16_50ep import dataloader, lr_scheduler, model, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

use_swin_large_in21k_384(model, train)
model.sem_seg_head.transformer_predictor.num_queries = 200

# 100 epochs in place of 50; the milestones of the schedule are shares of the run.
train.max_iter *= 2
lr_scheduler.multiplier.warmup_length /= 2
