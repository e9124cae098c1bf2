"""ADE20K semantic segmentation with Swin-L, equal to the YAML recipe of the same name."""

from ....common.random_crops import set_sizes
from ....common.swin import use_swin_large_in21k_384
from ..maskformer2_R50_bs16_160k import dataloader, lr_scheduler, model, optimizer, train

__all__ = ["dataloader", "lr_scheduler", "model", "optimizer", "train"]

use_swin_large_in21k_384(model, train)
set_sizes(dataloader, shorter_side=640, longest_in_test=2560, crop_size=[640, 640], size_divisibility=640)
