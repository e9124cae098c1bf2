"""COCO-Stuff 10k: semantic labels of 171 classes, under its published names."""

import os

from .catalog import read_classes, register_semantic

__all__ = ["register_coco_stuff_10k"]


def register_coco_stuff_10k(root: str) -> None:
    """Register ``coco_2017_{train,test}_stuff_10k_sem_seg`` with files under ``root/coco/coco_stuff_10k``."""
    folder = os.path.join(root, "coco", "coco_stuff_10k")
    classes = read_classes("coco_stuff_10k")
    for split in ("train", "test"):
        register_semantic(
            f"coco_2017_{split}_stuff_10k_sem_seg",
            image_root=os.path.join(folder, "images_detectron2", split),
            sem_seg_root=os.path.join(folder, "annotations_detectron2", split),
            stuff_dataset_id_to_contiguous_id={category["id"]: index for index, category in enumerate(classes)},
            stuff_classes=[category["name"] for category in classes],
        )
