"""Mapillary Vistas 1.2 (65 classes and "unlabelled"): semantic and panoptic, under its published names."""

import os

from .catalog import read_classes, register, register_semantic
from .panoptic import load_panoptic, panoptic_metadata

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
        folder = os.path.join(root, "mapillary_vistas", subfolder)
        register_semantic(
            f"mapillary_vistas_sem_seg_{split}",
            image_root=os.path.join(folder, "images"),
            sem_seg_root=os.path.join(folder, "labels"),
            ignore_label=_IGNORE_LABEL,
            stuff_classes=metadata["stuff_classes"],
            stuff_colors=metadata["stuff_colors"],
        )
        _register_panoptic(f"mapillary_vistas_panoptic_{split}", folder, metadata)


def _register_panoptic(name: str, folder: str, metadata: dict[str, list[str]]) -> None:
    image_root, panoptic_root, sem_seg_root = (os.path.join(folder, part) for part in ("images", "panoptic", "labels"))
    panoptic_json = os.path.join(panoptic_root, "panoptic_2018.json")
    register(
        name,
        lambda: load_panoptic(
            panoptic_json, image_root, panoptic_root, sem_seg_root, metadata, picture_ext=".jpg", hint=_HINT
        ),
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        json_file=None,
        evaluator_type="mapillary_vistas_panoptic_seg",
        ignore_label=_IGNORE_LABEL,
        label_divisor=1000,
        **metadata,
    )
