"""COCO 2017 panoptic with semantic PNGs, under its published names.

What Detectron2 registers itself (``coco_2017_train``, ``coco_2017_train_panoptic``, ...) stays Detectron2's.
"""

import os

from detectron2.data import DatasetCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from .panoptic import panoptic_metadata, register_panoptic

__all__ = ["register_coco"]

_HINT = "get COCO 2017 and arrange it as datasets/README.md shows"


def register_coco(root: str) -> None:
    """Register ``coco_2017_{train,val}_panoptic_with_sem_seg`` with files under ``root/coco``."""
    for split in ("train", "val"):
        name = f"coco_2017_{split}_panoptic_with_sem_seg"
        if name in DatasetCatalog:  # by another package that has the published names
            continue
        register_panoptic(
            name,
            panoptic_metadata(COCO_CATEGORIES),
            image_root=os.path.join(root, f"coco/{split}2017"),
            panoptic_root=os.path.join(root, f"coco/panoptic_{split}2017"),
            panoptic_json=os.path.join(root, f"coco/annotations/panoptic_{split}2017.json"),
            sem_seg_root=os.path.join(root, f"coco/panoptic_semseg_{split}2017"),
            instances_json=os.path.join(root, f"coco/annotations/instances_{split}2017.json"),
            hint=_HINT,
        )
