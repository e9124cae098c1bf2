"""COCO's instance format: a JSON file with polygons, run lengths or both, and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from ...errors import UserError
from ..annotations import check_segmentation, decode_segmentation
from ..datasets.catalog import Category
from ..datasets.coco_format import load_instances_json, load_json
from ..images import picture_size
from .classes import complete
from .files import for_each
from .forms import Source
from .summary import Tally

__all__ = ["check_pictures", "encode", "index_pictures", "load_instances", "match_classes", "read_instances_json"]


def read_instances_json(source: Source, known: Sequence[Category] | None) -> tuple[dict[str, Any], Tally]:
    """Check a file and its pictures: the data set's row, and what is in it. ``known``: classes of the training data.

    Raises ``UserError`` naming the file and the value that is wrong.
    """
    path = source.annotations
    content = load_instances_json(path)
    classes = match_classes(content["categories"], known, path, things=True)
    images = index_pictures(content["images"], path)
    check_pictures(source.pictures, list(images.values()), path)
    index = {category["id"]: number for number, category in enumerate(classes)}
    objects: dict[Any, list[tuple[int, int]]] = {key: [] for key in images}
    for annotation in content["annotations"]:
        place = f"'{path}': annotation {annotation['id']} (of picture {annotation['image_id']})"
        if annotation["category_id"] not in index:
            raise UserError(f"{place} has category_id {annotation['category_id']}, which the training data have not")
        area = _area(annotation, images[annotation["image_id"]], place)
        if not annotation.get("iscrowd", 0):
            objects[annotation["image_id"]].append((index[annotation["category_id"]], area))
    tally = Tally()
    for key, image in images.items():
        tally.add(image["file_name"], (image["height"], image["width"]), objects[key])
    row = {"form": "instances", "pictures": str(source.pictures), "json": str(path), "classes": classes}
    return row, tally


def match_classes(
    categories: Sequence[Mapping[str, Any]], known: Sequence[Category] | None, path: Path, *, things: bool
) -> list[Category]:
    """The classes of a file, things first; or the ``known`` ones, if the file's say the same.

    Raises ``UserError`` if an id stands for another class than among the known ones.
    """
    classes = complete([dict(category) for category in categories], things=things, place=f"'{path}'")
    if known is None:
        return sorted(classes, key=lambda category: not category["isthing"])
    names = {category["id"]: category["name"] for category in known}
    for category in classes:
        if names.get(category["id"], category["name"]) != category["name"]:
            raise UserError(
                f"'{path}': class {category['id']} is '{category['name']}', but '{names[category['id']]}' in the "
                "training data: use the same ids"
            )
    return list(known)


def check_pictures(folder: Path, images: Sequence[Mapping[str, Any]], json_file: Path) -> None:
    """Raise ``UserError`` for pictures that are missing, unreadable, or of another size than the JSON file says."""

    def check(image: Mapping[str, Any]) -> None:
        height, width = picture_size(folder / image["file_name"])
        if (height, width) != (image["height"], image["width"]):
            raise UserError(
                f"picture '{folder / image['file_name']}' is {width} x {height} pixels, but '{json_file}' says "
                f"{image['width']} x {image['height']}: correct width and height, or use the picture that was annotated"
            )

    for_each(check, images, "pictures")


def load_instances(json_file: str, pictures: str, classes: Sequence[Category]) -> list[dict[str, Any]]:
    """Dataset dicts of a file that was checked before: ``annotations`` with contiguous ``category_id``."""
    content = load_json(json_file)
    index = {category["id"]: number for number, category in enumerate(classes)}
    by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(
            {
                "id": annotation["id"],
                "category_id": index[annotation["category_id"]],
                "iscrowd": int(annotation.get("iscrowd", 0)),
                "segmentation": annotation["segmentation"],
            }
        )
    return [
        {
            "file_name": str(Path(pictures) / image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": by_image[image["id"]],
        }
        for image in content["images"]
    ]


def index_pictures(images: Sequence[Mapping[str, Any]], path: Path) -> dict[Any, Mapping[str, Any]]:
    """A JSON file's ``images`` by their ids, with sizes as integers. Raises ``UserError`` if there are none."""
    if not images:
        raise UserError(f"'{path}' has no pictures: check its 'images'")
    return {image["id"]: {**image, "height": int(image["height"]), "width": int(image["width"])} for image in images}


def _area(annotation: Mapping[str, Any], image: Mapping[str, Any], place: str) -> int:
    """Pixels of an annotation's mask."""
    segmentation = annotation.get("segmentation")
    height, width = image["height"], image["width"]
    if not isinstance(segmentation, list):
        return int(decode_segmentation(segmentation, height, width, place).sum())
    if not segmentation or not all(_is_polygon(polygon) for polygon in segmentation):
        raise UserError(
            f"{place} has the segmentation {str(segmentation)[:60]}: expected polygons, each at least three points as "
            "x, y, x, y, ..., or a run-length encoding"
        )
    check_segmentation(segmentation, height, width, place)
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
    x, y = points[:, 0], points[:, 1]
    if x.max() <= 0 or y.max() <= 0 or x.min() >= width or y.min() >= height:
        raise UserError(
            f"{place} lies outside its picture, which is {width} x {height}: its polygons go from x {x.min():g}, "
            f"y {y.min():g} to x {x.max():g}, y {y.max():g}"
        )
    rles = coco_mask.frPyObjects(segmentation, height, width)
    return int(coco_mask.area(coco_mask.merge(rles)))


def _is_polygon(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0


def encode(mask: np.ndarray) -> dict[str, Any]:
    """``segmentation`` as run lengths, ``area`` and ``bbox`` of a mask."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = rle["counts"]
    return {
        "segmentation": {"size": list(mask.shape), "counts": counts if isinstance(counts, str) else counts.decode()},
        "area": int(mask.sum()),
        "bbox": [float(value) for value in coco_mask.toBbox(rle)],
    }
