"""Data sets by name. Importing this registers all of them; their files are looked for when one is used.

Their folder is that of the environment variable DETECTRON2_DATASETS (by default ``datasets``) at that time.
"""

from .coco import register_coco
from .nuclei import register_nuclei
from .panoptic import (
    data_set_root,
    load_panoptic,
    panoptic_metadata,
    read_classes,
    register_panoptic,
)

__all__ = [
    "data_set_root",
    "load_panoptic",
    "panoptic_metadata",
    "read_classes",
    "register_coco",
    "register_nuclei",
    "register_panoptic",
]

register_coco(data_set_root())
register_nuclei(data_set_root())
