"""Tiny data sets in the folders and formats that the published registrations expect, with those registrations.

Each has two pictures of 40 x 60 pixels of striped classes. Contents agree between semantic, instance and panoptic
annotations.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mask2former.data.annotations import rgb_from_ids
from mask2former.data.datasets import (
    read_classes,
    register_ade20k,
    register_ade20k_full,
    register_coco_stuff_10k,
    register_mapillary_vistas,
)

__all__ = [
    "HEIGHT",
    "WIDTH",
    "make_ade20k",
    "make_mapillary_vistas",
    "make_semantic",
    "registered_at",
    "save_picture",
    "stripes",
]

HEIGHT, WIDTH = 40, 60
OWN = (
    "ade20k_instance",
    "ade20k_panoptic",
    "ade20k_full",
    "coco_2017_train_stuff",
    "coco_2017_test_stuff",
    "mapillary",
)


@contextmanager
def registered_at(root: Path) -> Iterator[None]:
    """The published names stand for files under ``root`` in a ``with`` block."""
    names = [name for name in DatasetCatalog.list() if name.startswith(OWN)]
    before = {name: (DatasetCatalog[name], MetadataCatalog[name]) for name in names}
    _remove(names)
    for register in (register_ade20k, register_ade20k_full, register_coco_stuff_10k, register_mapillary_vistas):
        register(str(root))
    try:
        yield
    finally:
        _remove(names)
        for name, (loader, metadata) in before.items():
            DatasetCatalog.register(name, loader)
            MetadataCatalog[name] = metadata


def _remove(names: Sequence[str]) -> None:
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def stripes(values: Sequence[int], dtype: Any = np.uint8) -> np.ndarray:
    """(40, 60) with the values in columns of equal width."""
    return np.repeat(np.array(values, dtype=dtype), WIDTH // len(values))[None].repeat(HEIGHT, axis=0)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_picture(path: Path) -> None:
    save(path, np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def make_semantic(image_root: Path, sem_seg_root: Path, labels: Sequence[np.ndarray], label_ext: str = "png") -> None:
    """Pictures "a.jpg", "b.jpg", ... and their label maps."""
    for stem, pixels in zip("abcdef", labels, strict=False):
        save_picture(image_root / f"{stem}.jpg")
        save(sem_seg_root / f"{stem}.{label_ext}", pixels)


def _write_panoptic(root: Path, json_file: Path, pictures: dict[str, list[int]], classes: list[dict[str, Any]]) -> None:
    """PNGs and JSON of pictures whose stripes have these category ids; what is none of the classes is unlabelled."""
    known = {category["id"] for category in classes}
    annotations = []
    for stem, categories in pictures.items():
        ids = [70001 + place if category in known else 0 for place, category in enumerate(categories)]
        save(root / f"{stem}.png", rgb_from_ids(stripes(ids, np.uint32)))
        segments = [
            {"id": number, "category_id": category, "iscrowd": 0}
            for number, category in zip(ids, categories, strict=True)
            if number
        ]
        annotations.append({"image_id": stem, "file_name": f"{stem}.png", "segments_info": segments})
    images = [{"id": stem, "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH} for stem in pictures]
    json_file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": classes}))


def make_ade20k(root: Path, split: str = "val") -> None:
    """ADE20K in all its forms. Two wall and floor stripes (0, 3: stuff), beds and persons (7, 12: things)."""
    folder = root / "ADEChallengeData2016"
    subfolder = {"train": "training", "val": "validation"}[split]
    pictures = {f"ADE_{split}_00000001": [0, 7, 3, 12], f"ADE_{split}_00000002": [12, 12, 0, 7, 3, 12]}
    things = {category["id"] for category in read_classes("ade20k_instance")}
    instances: list[dict[str, Any]] = []
    for stem, categories in pictures.items():
        save_picture(folder / "images" / subfolder / f"{stem}.jpg")
        save(folder / "annotations_detectron2" / subfolder / f"{stem}.png", stripes(categories))
        for place, category in enumerate(categories):
            if category in things:
                mask = stripes(range(len(categories))) == place
                instances.append(_instance(len(instances) + 1, stem, category, mask))
    images = [{"id": stem, "file_name": f"{stem}.jpg", "height": HEIGHT, "width": WIDTH} for stem in pictures]
    content = {"images": images, "annotations": instances, "categories": read_classes("ade20k_instance")}
    (folder / f"ade20k_instance_{split}.json").write_text(json.dumps(content))
    panoptic_root = folder / f"ade20k_panoptic_{split}"
    _write_panoptic(panoptic_root, Path(f"{panoptic_root}.json"), pictures, read_classes("ade20k"))


def _instance(number: int, image_id: str, category: int, mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": mask_util.toBbox(rle).tolist(),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def make_mapillary_vistas(root: Path, split: str = "val") -> None:
    """Mapillary Vistas: label maps are one less than the panoptic category ids; 65 is "unlabelled"."""
    folder = root / "mapillary_vistas" / {"train": "training", "val": "validation"}[split]
    pictures = {"_0abC-1": [1, 3, 20, 66], "x9": [65, 14, 20, 56]}
    for stem, categories in pictures.items():
        save_picture(folder / "images" / f"{stem}.jpg")
        save(folder / "labels" / f"{stem}.png", stripes(categories) - 1)
    _write_panoptic(
        folder / "panoptic", folder / "panoptic" / "panoptic_2018.json", pictures, read_classes("mapillary_vistas")
    )
