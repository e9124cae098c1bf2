"""Data sets by name. Importing this registers all of them; their files are looked for when one is used.

Their folder is that of the environment variable DETECTRON2_DATASETS (by default ``datasets``) at that time.
"""

from .ade20k import register_ade20k
from .ade20k_full import register_ade20k_full
from .catalog import data_set_root, read_classes
from .coco import register_coco
from .coco_stuff_10k import register_coco_stuff_10k
from .mapillary_vistas import register_mapillary_vistas
from .nuclei import register_nuclei
from .panoptic import load_panoptic, panoptic_metadata, register_panoptic

__all__ = [
    "data_set_root",
    "load_panoptic",
    "panoptic_metadata",
    "read_classes",
    "register_ade20k",
    "register_ade20k_full",
    "register_coco",
    "register_coco_stuff_10k",
    "register_mapillary_vistas",
    "register_nuclei",
    "register_panoptic",
]

for _register in (
    register_ade20k,
    register_ade20k_full,
    register_coco,
    register_coco_stuff_10k,
    register_mapillary_vistas,
    register_nuclei,
):
    _register(data_set_root())
