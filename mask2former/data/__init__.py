"""From files on disk to batches: data sets, mappers, loaders. Importing this registers the data sets."""

from mask2former.data import datasets
from mask2former.data.augmentation import build_test_augmentations
from mask2former.data.checks import check_dataset, load_dataset
from mask2former.data.datasets import register_panoptic
from mask2former.data.images import read_image
from mask2former.data.loader import build_test_loader, build_train_loader
from mask2former.data.mapper import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerDatasetMapper,
    build_mapper,
)

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MaskFormerDatasetMapper",
    "build_mapper",
    "build_test_augmentations",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "datasets",
    "load_dataset",
    "read_image",
    "register_panoptic",
]
