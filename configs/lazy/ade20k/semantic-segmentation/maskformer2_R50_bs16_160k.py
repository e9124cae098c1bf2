"""ADE20K semantic segmentation, equal to the YAML recipe of the same name."""

from ...common.mask2former import model
from ...common.random_crops import dataloader, set_sizes
from ...common.schedule_polynomial import lr_scheduler, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

model.sem_seg_head.num_classes = 150
model.inference.semantic_on = True

dataloader.train.dataset = "ade20k_sem_seg_train"
dataloader.test.dataset = "ade20k_sem_seg_val"
set_sizes(dataloader, shorter_side=512, longest_in_test=2048, crop_size=[512, 512], size_divisibility=512)

train.max_iter = 160000
