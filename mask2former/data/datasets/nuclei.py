"""Nuclei in microscopy pictures (2018 Data Science Bowl): nuclei are things, the background is stuff."""

import os

from detectron2.data import DatasetCatalog

from .catalog import read_classes
from .panoptic import panoptic_metadata, register_panoptic

__all__ = ["register_nuclei"]

_HINT = "make it with 'python datasets/prepare_nuclei.py --input FOLDER --output FOLDER', see datasets/README.md"


def register_nuclei(root: str) -> None:
    """Register ``nuclei_{train,val}`` with files under ``root/nuclei``."""
    folder = os.path.join(root, "nuclei")
    for split in ("train", "val"):
        name = f"nuclei_{split}"
        if name in DatasetCatalog:
            continue
        register_panoptic(
            name,
            panoptic_metadata(read_classes("nuclei")),
            image_root=os.path.join(folder, split),
            panoptic_root=os.path.join(folder, f"panoptic_{split}"),
            panoptic_json=os.path.join(folder, "annotations", f"panoptic_{split}.json"),
            sem_seg_root=os.path.join(folder, f"panoptic_semseg_{split}"),
            instances_json=os.path.join(folder, "annotations", f"{split}.json"),
            hint=_HINT,
        )
