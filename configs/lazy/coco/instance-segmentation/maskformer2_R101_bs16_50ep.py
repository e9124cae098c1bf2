"""COCO instance segmentation with a ResNet-101, equal to the YAML recipe of the same name."""

from .maskformer2_R50_bs16_50ep import dataloader, lr_scheduler, model, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

model.backbone.stages.depth = 101
train.init_checkpoint = "R-101.pkl"
