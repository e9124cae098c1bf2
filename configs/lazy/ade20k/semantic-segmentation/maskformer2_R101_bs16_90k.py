"""ADE20K semantic segmentation with a ResNet-101, equal to the YAML recipe of the same name."""

from .maskformer2_R50_bs16_160k import dataloader, lr_scheduler, model, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

model.backbone.stages.depth = 101
model.backbone.stem.norm = "SyncBN"
model.backbone.stages.norm = "SyncBN"
train.init_checkpoint = "R-101.pkl"
