"""From files on disk to batches: data sets, mappers, loaders. Importing this registers the data sets."""

from . import datasets
from .augmentation import build_test_augmentations
from .checks import check_dataset, load_dataset
from .datasets import register_panoptic
from .images import read_image
from .loader import build_test_loader, build_train_loader
from .mapper import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
    build_mapper,
)
from .own import OwnData, register_data

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MaskFormerDatasetMapper",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "OwnData",
    "build_mapper",
    "build_test_augmentations",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "datasets",
    "load_dataset",
    "read_image",
    "register_data",
    "register_panoptic",
]
