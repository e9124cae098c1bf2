"""COCO instance segmentation, equal to the YAML recipe of the same name."""

from mask2former.data.annotations import read_instances

from ...common.coco import dataloader
from ...common.mask2former_r50 import model
from ...common.schedule_50ep import lr_scheduler, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

num_classes = 80
model.sem_seg_head.num_classes = num_classes
model.sem_seg_head.transformer_predictor.num_classes = num_classes
model.criterion.num_classes = num_classes
model.inference.semantic_on = False
model.inference.panoptic_on = False

dataloader.train.dataset = "coco_2017_train"
dataloader.train.mapper.annotation_reader = read_instances
dataloader.train.num_classes = num_classes
dataloader.test.dataset = "coco_2017_val"
dataloader.test.num_classes = num_classes
