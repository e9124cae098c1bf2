"""COCO instance segmentation, equal to the YAML recipe of the same name."""

from mask2former.data.annotations import read_instances

from ...common.coco import dataloader
from ...common.mask2former import model
from ...common.schedule_50ep import lr_scheduler, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

model.sem_seg_head.num_classes = 80
model.inference.instance_on = True
model.inference.thing_classes = list(range(80))

dataloader.train.dataset = "coco_2017_train"
dataloader.train.mapper.annotation_reader = read_instances
dataloader.test.dataset = "coco_2017_val"
