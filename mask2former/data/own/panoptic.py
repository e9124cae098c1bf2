"""COCO's panoptic format: a JSON file, a folder of PNGs with segment ids, and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..annotations import ids_from_rgb
from ..datasets.catalog import Category
from ..datasets.coco_format import check_categories, load_panoptic_json
from ..images import read_image
from ..panoptic_files import panoptic_to_semantic, save_json
from .files import for_each
from .forms import Source
from .instances import check_pictures, encode, index_pictures, match_classes
from .summary import Tally

__all__ = ["read_panoptic_json"]

# One segment as found in the PNG: its contiguous class, its area, and its instance annotation, if it is a thing.
Segment = tuple[int, int, dict[str, Any] | None]


def read_panoptic_json(
    source: Source, known: Sequence[Category] | None, output: Path | None
) -> tuple[dict[str, Any], Tally]:
    """Check a file, its PNGs and its pictures: the data set's row, and what is in it.

    With an ``output``, what semantic and instance evaluation read is made there from the PNGs.

    Raises ``UserError`` naming the file and the value that is wrong.
    """
    path, folder = source.annotations, source.segments
    assert folder is not None
    content = load_panoptic_json(path)
    check_categories(content.get("categories"), path, with_kind=True)
    classes = match_classes(content["categories"], known, path, things=True)
    index = {category["id"]: number for number, category in enumerate(classes)}
    things = {category["id"] for category in classes if category["isthing"]}
    images = index_pictures(content["images"], path)
    for annotation in content["annotations"]:
        _check_annotation(annotation, index, path)
    check_pictures(source.pictures, list(images.values()), path)

    encoded = things if output is not None else set()

    def read(annotation: Mapping[str, Any]) -> list[Segment]:
        return _read_segments(annotation, folder, images[annotation["image_id"]], index, encoded)

    segments = for_each(read, content["annotations"], "panoptic PNGs")
    row = {
        "form": "panoptic",
        "pictures": str(source.pictures),
        "json": str(path),
        "panoptic": str(folder),
        "classes": classes,
    }
    if output is not None:
        row |= _make_more(content, segments, source, index, things, output)
    return row, _tally(content["annotations"], segments, images)


def _check_annotation(annotation: Mapping[str, Any], index: Mapping[int, int], path: Path) -> None:
    place = f"'{path}': the annotation '{annotation['file_name']}'"
    seen = set()
    known = ", ".join(map(str, list(index)[:20]))
    for segment in annotation["segments_info"]:
        if segment["category_id"] not in index:
            raise UserError(
                f"{place}: segment {segment['id']} has category_id {segment['category_id']}, which is not among the "
                f"{len(index)} classes ({known}): correct it or add the category"
            )
        if segment["id"] in seen:
            raise UserError(f"{place} has segment {segment['id']} twice: segments must not overlap or share an id")
        seen.add(segment["id"])


def _read_segments(
    annotation: Mapping[str, Any], folder: Path, image: Mapping[str, Any], index: Mapping[int, int], things: set[int]
) -> list[Segment]:
    path = folder / annotation["file_name"]
    ids = ids_from_rgb(read_image(path, "RGB"))
    if ids.shape != (image["height"], image["width"]):
        raise UserError(
            f"panoptic annotation '{path}' is {ids.shape[1]} x {ids.shape[0]} pixels, but its picture "
            f"'{image['file_name']}' is {image['width']} x {image['height']}: make it anew from the right picture"
        )
    found = dict(zip(*(column.tolist() for column in np.unique(ids, return_counts=True)), strict=True))
    unknown = found.keys() - {segment["id"] for segment in annotation["segments_info"]} - {0}
    if unknown:
        raise UserError(
            f"panoptic annotation '{path}' has {found[min(unknown)]} pixels of segment {min(unknown)}, which its "
            "'segments_info' lacks: add the segment, or paint them 0"
        )
    segments: list[Segment] = []
    for segment in annotation["segments_info"]:
        area = found.get(segment["id"], 0)
        stated = segment.get("area", area)
        if not area or stated > area:
            raise UserError(
                f"panoptic annotation '{path}' has {area} pixels of segment {segment['id']}, but its area is said to "
                f"be {stated}: another segment overlaps it, which none may: correct the PNG or the JSON file"
            )
        instance = None
        if segment["category_id"] in things:
            instance = {
                "image_id": annotation["image_id"],
                "category_id": segment["category_id"],
                "iscrowd": segment.get("iscrowd", 0),
                **encode(ids == segment["id"]),
            }
        segments.append((index[segment["category_id"]], area, instance))
    return segments


def _make_more(
    content: dict[str, Any],
    segments: Sequence[Sequence[Segment]],
    source: Source,
    index: Mapping[int, int],
    things: set[int],
    output: Path,
) -> dict[str, Any]:
    """Instances as JSON and label maps, which a panoptic data set's other two evaluations read."""
    instances = [instance for picture in segments for _, _, instance in picture if instance is not None]
    instances_json = output / "instances.json"
    save_json(
        instances_json,
        {
            "images": content["images"],
            "annotations": [{"id": number, **instance} for number, instance in enumerate(instances, start=1)],
            "categories": [category for category in content["categories"] if category["id"] in things],
        },
    )
    assert source.segments is not None
    problems = panoptic_to_semantic(source.annotations, source.segments, output / "semantic", index)
    if problems:
        raise UserError(problems[0])
    return {"labels": str(output / "semantic"), "instances": str(instances_json)}


def _tally(
    annotations: Sequence[Mapping[str, Any]], segments: Sequence[Sequence[Segment]], images: Mapping[Any, Any]
) -> Tally:
    tally = Tally()
    for annotation, found in zip(annotations, segments, strict=True):
        image = images[annotation["image_id"]]
        objects = [(class_id, area) for class_id, area, _ in found]
        tally.add(image["file_name"], (image["height"], image["width"]), objects)
    return tally
