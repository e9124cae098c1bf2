"""COCO panoptic segmentation, equal to the YAML recipe of the same name."""

from ...common.coco import dataloader
from ...common.mask2former_r50 import model
from ...common.schedule_50ep import lr_scheduler, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]
