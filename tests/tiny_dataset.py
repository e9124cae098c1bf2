"""A data set of a few small pictures with every kind of COCO annotation, made in a folder and registered.

Two thing classes ("disc", "square") on one stuff class ("ground"). Dataset ids are sparse on purpose
(1, 3 and 7), contiguous ids are 0, 1 and 2. Objects don't overlap, so that all annotations of a
picture say the same: polygons (squares) and RLE (discs) in the instances JSON, the panoptic PNG and
JSON, and the semantic PNG.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

__all__ = ["TinyNames", "make_tiny_dataset", "tiny_dataset", "unregister_tiny_dataset"]

SIDE = 64  # pixels
DISC, SQUARE, GROUND = 1, 3, 7  # dataset ids
CATEGORIES: list[dict[str, Any]] = [
    {"id": DISC, "name": "disc", "isthing": 1},
    {"id": SQUARE, "name": "square", "isthing": 1},
    {"id": GROUND, "name": "ground", "isthing": 0},
]
CONTIGUOUS = {DISC: 0, SQUARE: 1, GROUND: 2}
COLORS = {DISC: (220, 60, 40), SQUARE: (40, 90, 220), GROUND: (90, 140, 80)}


class TinyNames(NamedTuple):
    """Names under which the data set is registered."""

    panoptic: str = "tiny_panoptic"  # evaluator_type coco_panoptic_seg, with instances and semantic PNGs
    instances: str = "tiny_instances"  # evaluator_type coco


class _Shape(NamedTuple):
    category: int  # dataset id
    mask: np.ndarray  # (64, 64) bool
    polygon: list[float] | None  # x, y, x, y, ...


def make_tiny_dataset(root: Path, num_images: int = 4, seed: int = 0) -> TinyNames:
    """Write ``num_images`` pictures of 64x64 pixels and their annotations under ``root`` and register them.

    ``root`` gets ``images/``, ``instances.json``, ``panoptic.json``, ``panoptic/`` and ``semantic/``.
    A data set registered here before is replaced. Call ``unregister_tiny_dataset`` afterwards, or use
    ``tiny_dataset``, which does.
    """
    rng = np.random.default_rng(seed)
    for folder in ("images", "panoptic", "semantic"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    panoptic: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        stem = f"{image_id:03d}"
        objects = _draw_objects(rng)
        images.append({"id": image_id, "file_name": f"{stem}.png", "height": SIDE, "width": SIDE})
        for annotation in _instance_annotations(objects):
            instances.append({"id": len(instances) + 1, "image_id": image_id, **annotation})
        segment_ids, labels, segments = _panoptic_annotation(objects)
        panoptic.append({"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments})
        _save_png(root / "images" / f"{stem}.png", _picture(labels, rng))
        _save_png(root / "panoptic" / f"{stem}.png", np.stack([segment_ids, segment_ids * 0, segment_ids * 0], -1))
        contiguous = np.vectorize(CONTIGUOUS.__getitem__)(labels)
        _save_png(root / "semantic" / f"{stem}.png", contiguous)
    things = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES if c["isthing"]]
    _save_json(root / "instances.json", {"images": images, "annotations": instances, "categories": things})
    _save_json(root / "panoptic.json", {"images": images, "annotations": panoptic, "categories": CATEGORIES})
    return _register(root)


def unregister_tiny_dataset() -> None:
    """Remove the names of ``make_tiny_dataset`` from Detectron2's catalogs, if they are there."""
    for name in TinyNames():
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)


@contextmanager
def tiny_dataset(root: Path, num_images: int = 4, seed: int = 0) -> Iterator[TinyNames]:
    """``make_tiny_dataset`` for a ``with`` block: unregistered at its end."""
    try:
        yield make_tiny_dataset(root, num_images, seed)
    finally:
        unregister_tiny_dataset()


def _draw_objects(rng: np.random.Generator) -> list[_Shape]:
    """Two to four objects that don't overlap."""
    y, x = np.mgrid[:SIDE, :SIDE]
    taken = np.zeros((SIDE, SIDE), dtype=bool)
    objects: list[_Shape] = []
    wanted = int(rng.integers(2, 5))
    while len(objects) < wanted:
        radius = int(rng.integers(6, 11))
        cx, cy = (int(v) for v in rng.integers(radius + 1, SIDE - radius - 1, size=2))
        category = DISC if len(objects) % 2 == 0 else SQUARE
        polygon: list[float] | None = None
        if category == DISC:
            mask = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        else:
            x0, x1, y0, y1 = cx - radius, cx + radius, cy - radius, cy + radius
            mask = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
            polygon = [float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]
        if not (mask & taken).any():
            taken |= mask
            objects.append(_Shape(category, mask, polygon))
    return objects


def _instance_annotations(objects: list[_Shape]) -> Iterator[dict[str, Any]]:
    for category, mask, polygon in objects:
        rle = _rle(mask)
        segmentation = [polygon] if polygon else {"size": [SIDE, SIDE], "counts": rle["counts"].decode()}
        yield {
            "category_id": category,
            "iscrowd": 0,
            "area": int(mask.sum()),
            "bbox": _box(mask),
            "segmentation": segmentation,
        }


def _panoptic_annotation(
    objects: list[_Shape],
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Segment ids (64, 64), dataset ids (64, 64), and ``segments_info`` with dataset ids."""
    segment_ids = np.ones((SIDE, SIDE), dtype=np.int64)
    labels = np.full((SIDE, SIDE), GROUND, dtype=np.int64)
    categories = {1: GROUND}
    for number, (category, mask, _) in enumerate(objects, start=2):
        segment_ids[mask], labels[mask] = number, category
        categories[number] = category
    segments = [
        {
            "id": number,
            "category_id": category,
            "iscrowd": 0,
            "area": int((segment_ids == number).sum()),
            "bbox": _box(segment_ids == number),
        }
        for number, category in categories.items()
    ]
    return segment_ids, labels, segments


def _rle(mask: np.ndarray) -> dict[str, Any]:
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def _box(mask: np.ndarray) -> list[float]:
    """x, y, width, height."""
    return [float(v) for v in mask_util.toBbox(_rle(mask))]


def _picture(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(64, 64, 3) RGB: each class in its colour, with noise."""
    picture = np.zeros((*labels.shape, 3))
    for category, color in COLORS.items():
        picture[labels == category] = color
    return (picture + rng.normal(0, 12, picture.shape)).clip(0, 255)


def _save_png(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array.astype(np.uint8)).save(path)


def _save_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _load_panoptic(root: Path) -> list[dict[str, Any]]:
    """Detectron2's panoptic form with semantic PNGs: category ids are contiguous."""
    content = json.loads((root / "panoptic.json").read_text(encoding="utf-8"))
    things = {c["id"] for c in content["categories"] if c["isthing"]}
    return [
        {
            "file_name": str(root / "images" / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": str(root / "panoptic" / annotation["file_name"]),
            "sem_seg_file_name": str(root / "semantic" / annotation["file_name"]),
            "segments_info": [
                {**s, "category_id": CONTIGUOUS[s["category_id"]], "isthing": s["category_id"] in things}
                for s in annotation["segments_info"]
            ],
        }
        for image, annotation in zip(content["images"], content["annotations"], strict=True)
    ]


def _register(root: Path) -> TinyNames:
    unregister_tiny_dataset()
    names = TinyNames()
    instances_json, image_root = str(root / "instances.json"), str(root / "images")
    things = [c for c in CATEGORIES if c["isthing"]]
    thing_metadata = {
        "thing_classes": [c["name"] for c in things],
        "thing_colors": [list(COLORS[c["id"]]) for c in things],
        "thing_dataset_id_to_contiguous_id": {c["id"]: CONTIGUOUS[c["id"]] for c in things},
        "json_file": instances_json,
        "image_root": image_root,
    }
    DatasetCatalog.register(names.instances, lambda: load_coco_json(instances_json, image_root, names.instances))
    MetadataCatalog.get(names.instances).set(evaluator_type="coco", **thing_metadata)
    DatasetCatalog.register(names.panoptic, lambda: _load_panoptic(root))
    MetadataCatalog.get(names.panoptic).set(
        evaluator_type="coco_panoptic_seg",
        stuff_classes=[c["name"] for c in CATEGORIES],
        stuff_colors=[list(COLORS[c["id"]]) for c in CATEGORIES],
        stuff_dataset_id_to_contiguous_id=dict(CONTIGUOUS),
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root / "panoptic"),
        sem_seg_root=str(root / "semantic"),
        ignore_label=255,
        label_divisor=1000,
        **thing_metadata,
    )
    return names
