"""Entering the published data sets into Detectron2's catalogs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg

__all__ = ["Category", "data_set_root", "read_classes", "register", "register_semantic"]

Category = dict[str, Any]


def data_set_root() -> str:
    """The folder of all data sets: the environment variable DETECTRON2_DATASETS, by default ``datasets``."""
    return os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))


def read_classes(name: str) -> list[Category]:
    """The class table ``classes/<name>.json``: ``id`` in the annotation files, ``name``, and where the data set says so
    ``isthing`` and ``color`` (RGB).

    A class's place in the table is its contiguous id.
    """
    table = Path(__file__).parent / "classes" / f"{name}.json"
    return json.loads(table.read_text(encoding="utf-8"))


def register(name: str, load: Callable[[], list[dict[str, Any]]], **metadata: Any) -> None:
    """Register ``load`` and ``metadata`` under ``name``, unless another package has registered that name before."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)


def register_semantic(
    name: str,
    image_root: str,
    sem_seg_root: str,
    *,
    image_ext: str = "jpg",
    label_ext: str = "png",
    ignore_label: int = 255,
    **metadata: Any,
) -> None:
    """Register a folder of pictures and one of label maps with the same names but for their endings.

    Labels are contiguous class ids; ``ignore_label`` marks pixels without one.
    """
    register(
        name,
        lambda: load_sem_seg(sem_seg_root, image_root, gt_ext=label_ext, image_ext=image_ext),
        image_root=image_root,
        sem_seg_root=sem_seg_root,
        evaluator_type="sem_seg",
        ignore_label=ignore_label,
        **metadata,
    )
