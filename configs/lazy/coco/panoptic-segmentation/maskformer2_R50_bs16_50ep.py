"""COCO panoptic segmentation, equal to the YAML recipe of the same name."""

from mask2former.data.annotations import read_panoptic

from ...common.coco import dataloader
from ...common.mask2former import model
from ...common.schedule_50ep import lr_scheduler, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

model.sem_seg_head.num_classes = 133
model.inference.semantic_on = True
model.inference.panoptic_on = True
model.inference.instance_on = True
model.inference.thing_classes = list(range(80))

dataloader.train.dataset = "coco_2017_train_panoptic"
dataloader.train.mapper.annotation_reader = read_panoptic
# With semantic PNGs, so that all three tasks are evaluated.
dataloader.test.dataset = "coco_2017_val_panoptic_with_sem_seg"
