"""Mask2Former: one model for semantic, instance and panoptic segmentation, as a Detectron2 extension.

Importing this package registers its models and data sets in Detectron2's registries and catalogs, and the addresses
of the published weights with its files.
"""

from . import data, model_zoo, modeling
from .config import add_maskformer2_config
from .data import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)
from .modeling import MaskFormer, SemanticSegmentorWithTTA

__version__ = "0.1.0"

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MaskFormer",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "SemanticSegmentorWithTTA",
    "add_maskformer2_config",
    "data",
    "model_zoo",
    "modeling",
]
