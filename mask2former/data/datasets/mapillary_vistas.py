"""Mapillary Vistas 1.2 (65 classes and "unlabelled"): semantic and panoptic, under its published names."""

import os

from .catalog import read_classes, register_semantic
from .panoptic import panoptic_metadata, register_panoptic_by_name

__all__ = ["register_mapillary_vistas"]

_HINT = "get Mapillary Vistas 1.2 and arrange it as datasets/README.md shows"
# "Unlabelled" is the class after the last one.
_IGNORE_LABEL = 65


def register_mapillary_vistas(root: str) -> None:
    """Register ``mapillary_vistas_{sem_seg,panoptic}_{train,val}`` with files under ``root/mapillary_vistas``."""
    metadata = panoptic_metadata(read_classes("mapillary_vistas"), things_first=False)
    # The published metadata has every class among the things too; which ones are things, their ids tell.
    metadata |= {"thing_classes": metadata["stuff_classes"], "thing_colors": metadata["stuff_colors"]}
    for split, subfolder in (("train", "training"), ("val", "validation")):
        image_root, sem_seg_root, panoptic_root = (
            os.path.join(root, "mapillary_vistas", subfolder, part) for part in ("images", "labels", "panoptic")
        )
        register_semantic(
            f"mapillary_vistas_sem_seg_{split}",
            image_root=image_root,
            sem_seg_root=sem_seg_root,
            ignore_label=_IGNORE_LABEL,
            stuff_classes=metadata["stuff_classes"],
            stuff_colors=metadata["stuff_colors"],
        )
        register_panoptic_by_name(
            f"mapillary_vistas_panoptic_{split}",
            metadata,
            image_root,
            panoptic_root=panoptic_root,
            panoptic_json=os.path.join(panoptic_root, "panoptic_2018.json"),
            sem_seg_root=sem_seg_root,
            hint=_HINT,
            json_file=None,
            evaluator_type="mapillary_vistas_panoptic_seg",
            ignore_label=_IGNORE_LABEL,
        )
