"""Cityscapes semantic segmentation, equal to the YAML recipe of the same name."""

from ...common.mask2former import model
from ...common.random_crops import dataloader, set_sizes
from ...common.schedule_polynomial import lr_scheduler, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

model.backbone.stem.norm = "SyncBN"
model.backbone.stages.norm = "SyncBN"
model.sem_seg_head.num_classes = 19
model.inference.semantic_on = True

dataloader.train.dataset = "cityscapes_fine_sem_seg_train"
dataloader.test.dataset = "cityscapes_fine_sem_seg_val"
set_sizes(dataloader, shorter_side=1024, longest_in_test=2048, crop_size=[512, 1024], size_divisibility=-1)

train.max_iter = 90000
