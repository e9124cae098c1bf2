"""ADE20K with its full vocabulary, of which 847 classes are used, under its published names.

Label maps are TIFFs with 16 bits, in which 65535 means "ignore".
"""

import os

from .catalog import read_classes, register_semantic

__all__ = ["register_ade20k_full"]


def register_ade20k_full(root: str) -> None:
    """Register ``ade20k_full_sem_seg_{train,val}`` with files under ``root/ADE20K_2021_17_01``."""
    folder = os.path.join(root, "ADE20K_2021_17_01")
    for split, subfolder in (("train", "training"), ("val", "validation")):
        register_semantic(
            f"ade20k_full_sem_seg_{split}",
            image_root=os.path.join(folder, "images_detectron2", subfolder),
            sem_seg_root=os.path.join(folder, "annotations_detectron2", subfolder),
            label_ext="tif",
            ignore_label=65535,
            stuff_classes=[category["name"] for category in read_classes("ade20k_full")],
        )
