"""Semantic labels of ADE20K and Cityscapes: random scales, crops and colours in training, one scale in evaluation."""

from detectron2.config import LazyCall as L

from mask2former.data.annotations import read_semantic
from mask2former.data.augmentation import resize_and_crop

from .data import dataloader

__all__ = ["dataloader", "set_sizes"]

mapper = dataloader.train.mapper
mapper.annotation_reader = read_semantic
mapper.label_map = True
mapper.num_labels = "${model.sem_seg_head.num_classes}"
mapper.augmentations = L(resize_and_crop)(
    min_size="???",
    max_size="???",
    min_size_sampling="choice",
    crop_type="absolute",
    crop_size="???",
    single_category_max_area=1.0,
    ignore_label=255,
    color_aug_ssd=True,
)


def set_sizes(dataloader, *, shorter_side, longest_in_test, crop_size, size_divisibility):
    """Train on crops of pictures of 0.5 to 2 times ``shorter_side``, in steps of a tenth; evaluate at that size."""
    augmentations = dataloader.train.mapper.augmentations
    augmentations.min_size = [shorter_side * tenths // 10 for tenths in range(5, 21)]
    augmentations.max_size = 4 * shorter_side
    augmentations.crop_size = crop_size
    dataloader.train.mapper.size_divisibility = size_divisibility
    resize = dataloader.test.mapper.augmentations[0]
    resize.short_edge_length = shorter_side
    resize.max_size = longest_in_test
