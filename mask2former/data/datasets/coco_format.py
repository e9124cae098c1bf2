"""Annotation files in COCO's instance and panoptic formats, whose values are checked before anything uses them.

Masks are looked at where they are decoded (``mask2former.data.annotations``): to do it here would take minutes on COCO.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NoReturn

import numpy as np

from ...errors import UserError

__all__ = [
    "check_categories",
    "check_instances",
    "check_panoptic",
    "check_panoptic_annotations",
    "is_flag",
    "is_segment_id",
    "is_whole",
    "load_instances_json",
    "load_json",
    "load_panoptic_json",
]

Path = str | os.PathLike[str]
Record = Mapping[str, Any]

# Larger pictures Pillow doesn't open.
_MOST_PIXELS = 178_956_970
# Ids of segments are colours of three bytes.
_SEGMENT_IDS = 2**24


def load_json(path: Path, hint: str = "") -> Any:
    """The contents of a JSON file. Raises ``UserError`` naming the file if it is missing or can't be read as JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"'{os.fspath(path)}' does not exist{': ' if hint else ''}{hint}") from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number without end
        raise UserError(f"cannot read '{os.fspath(path)}' as JSON: {error}: make it again") from error


def load_instances_json(path: Path, hint: str = "", categories: Collection[int] | None = None) -> dict[str, Any]:
    """A file in COCO's instance format: ``images``, ``annotations``, ``categories``, and what else it has.

    ``hint`` ends the error about a missing file. Raises ``UserError`` for what ``check_instances`` does.
    """
    content = load_json(path, hint)
    check_instances(content, path, categories)
    return content


def check_instances(
    content: Any, path: Path, categories: Collection[int] | None = None, *, complete: bool = True
) -> None:
    """Raise ``UserError`` naming file, record and value unless ``content`` of a file is in COCO's instance format.

    A value may be missing or of a wrong type, an id used twice, or an annotation of a picture or category that the file
    lacks.

    Args:
        categories: the ids that annotations may have; None: those that the file lists.
        complete: pictures have to have names and sizes, and annotations ids of their own; evaluation does without.
    """
    lists = ("images", "annotations", "categories") if categories is None else ("images", "annotations")
    _check_lists(content, path, lists, "instance")
    if categories is None:
        categories = check_categories(content["categories"], path)
    images = _check_images(content["images"], path, _IMAGE if complete else _NAMELESS)
    seen = set()
    for annotation in _records(content["annotations"], "annotation", path):
        place = f"'{path}': annotation {_name(annotation, 'id')} (of picture {_name(annotation, 'image_id')})"
        _check(annotation, _INSTANCE, place)
        if complete and annotation["id"] in seen:
            raise UserError(f"{place}: its id is used more than once: give every annotation an id of its own")
        seen.add(annotation["id"])
        if annotation["image_id"] not in images:
            raise UserError(f"{place} is of a picture that is not among its {len(images)} 'images': correct image_id")
        if annotation["category_id"] not in categories:
            raise UserError(
                f"{place} has category_id {annotation['category_id']}, which is not among the {len(categories)} "
                f"classes ({_some(categories)}): correct the annotation or add the category"
            )


def load_panoptic_json(path: Path, hint: str = "", *, pictures_named: bool = True) -> dict[str, Any]:
    """A file in COCO's panoptic format: ``images`` and ``annotations``, and what else it has.

    ``hint`` ends the error about a missing file. Raises ``UserError`` for what ``check_panoptic`` does.
    """
    content = load_json(path, hint)
    check_panoptic(content, path, pictures_named=pictures_named)
    return content


def check_panoptic(content: Any, path: Path, *, pictures_named: bool = True) -> None:
    """Raise ``UserError`` naming file, record and value unless ``content`` of a file is in COCO's panoptic format.

    Not ``pictures_named``: pictures may lack names and sizes. Categories are not looked at, see ``check_categories``.
    """
    _check_lists(content, path, ("images", "annotations"), "panoptic")
    images = _check_images(content["images"], path, _IMAGE if pictures_named else _NAMELESS)
    check_panoptic_annotations(content["annotations"], path)
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images:
            raise UserError(
                f"'{path}': the annotation '{annotation['file_name']}' has image_id {annotation['image_id']}, which is "
                "not among its 'images': correct it or add the picture"
            )


def check_panoptic_annotations(annotations: Any, path: Path) -> None:
    """Raise ``UserError`` naming file, record and value unless these are ``annotations`` of COCO's panoptic format."""
    for annotation in _records(annotations, "annotation", path):
        place = f"'{path}': the annotation '{_name(annotation, 'file_name')}'"
        _check(annotation, _PANOPTIC, place)
        for segment in _records(annotation["segments_info"], "segment", place):
            _check(segment, _SEGMENT, f"{place}: segment {_name(segment, 'id')}")


def check_categories(categories: Any, path: Path, *, with_kind: bool = False) -> dict[int, Record]:
    """``categories`` of the file at ``path`` by their ids.

    Raises ``UserError`` if they are none, an id is used twice, or, ``with_kind``, one lacks ``isthing``.
    """
    by_id: dict[int, Record] = {}
    for category in _records(categories, "category", path):
        place = f"'{path}': category {_name(category, 'name' if 'name' in category else 'id')}"
        _check(category, _CATEGORY, place)
        if with_kind and "isthing" not in category:
            raise UserError(f"{place} lacks 'isthing', 1 for things and 0 for stuff: add it")
        if category["id"] in by_id:
            raise UserError(f"{place} is there twice: give every category an id of its own")
        by_id[category["id"]] = category
    if not by_id:
        raise UserError(f"'{path}' has no 'categories': add them")
    return by_id


# ------------------------------------------------------------------------------------------------- values


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, NumPy's too; some programs write 1.0 for 1."""
    if type(value) is int:  # nearly all of millions are
        return True
    if isinstance(value, float | np.floating):
        return float(value).is_integer()
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_flag(value: Any) -> bool:
    """Whether a value is 0, 1, True or False."""
    return isinstance(value, bool | np.bool_) or (is_whole(value) and value in (0, 1))


def is_segment_id(value: Any) -> bool:
    """Whether a value can be painted as a colour."""
    return is_whole(value) and 0 <= value < _SEGMENT_IDS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_shape(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(polygon, list) for polygon in value)
    if not isinstance(value, dict) or not value.keys() >= {"size", "counts"}:
        return False
    size = value["size"]
    return isinstance(value["counts"], str | list) and isinstance(size, list) and [*map(is_whole, size)] == [True] * 2


@dataclass(frozen=True)
class _Kind:
    """What a value has to be, and whether it may be missing."""

    expected: str
    fits: Callable[[Any], bool]
    optional: bool = False


_ID = _Kind("an integer or text", lambda value: is_whole(value) or type(value) is str)
_FILE = _Kind("the name of a file", lambda value: type(value) is str and value != "" and "\0" not in value)
_SIDE = _Kind("a whole number of at least 1", lambda value: is_whole(value) and value >= 1)
_WHOLE = _Kind("an integer", is_whole)
_TEXT = _Kind("text", lambda value: type(value) is str)
_FLAG = _Kind("0 or 1", is_flag, optional=True)
_AREA = _Kind("a number of at least 0", lambda value: _is_number(value) and value >= 0, optional=True)
_BOX = _Kind(
    "x, y, width, height",
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)),
    optional=True,
)
_SHAPE = _Kind("polygons or a run-length encoding", _is_shape, optional=True)
_LIST = _Kind("a list", lambda value: isinstance(value, list))

_IMAGE = {"id": _ID, "file_name": _FILE, "height": _SIDE, "width": _SIDE}
_NAMELESS = {"id": _ID, **{key: replace(_IMAGE[key], optional=True) for key in ("height", "width")}}
_CATEGORY = {"id": _WHOLE, "name": _TEXT, "isthing": _FLAG}
_INSTANCE = {
    "id": _ID,
    "image_id": _ID,
    "category_id": _WHOLE,
    "iscrowd": _FLAG,
    "area": _AREA,
    "bbox": _BOX,
    "segmentation": _SHAPE,
}
_PANOPTIC = {"image_id": _ID, "file_name": _FILE, "segments_info": _LIST}
_SEGMENT = {
    "id": _Kind(f"an integer from 0 to {_SEGMENT_IDS - 1}", is_segment_id),
    "category_id": _WHOLE,
    "iscrowd": _FLAG,
    "area": _AREA,
}


def _check_lists(content: Any, path: Path, keys: Iterable[str], form: str) -> None:
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"'{path}' is not in COCO's {form} format: expected the lists {', '.join(keys)} in it")


def _check_images(images: list[Any], path: Path, kinds: Mapping[str, _Kind]) -> dict[Any, Record]:
    by_id: dict[Any, Record] = {}
    for image in _records(images, "picture", path):
        place = f"'{path}': picture {_name(image, 'file_name' if 'file_name' in image else 'id')}"
        _check(image, kinds, place)
        if image.get("height", 1) * image.get("width", 1) > _MOST_PIXELS:
            _refuse(f"{place} has height {image['height']} and width {image['width']}, too many pixels for a picture")
        if image["id"] in by_id:
            raise UserError(
                f"'{path}': picture id {image['id']} is used by '{by_id[image['id']].get('file_name')}' and "
                f"'{image.get('file_name')}': give every picture an id of its own"
            )
        by_id[image["id"]] = image
    return by_id


def _records(records: Any, noun: str, place: Path) -> Iterable[Record]:
    if not isinstance(records, list):
        raise UserError(f"{place}: expected a list of {noun} records, got {_short(records)}: correct it")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f"{place}: {noun} number {number} is {_short(record)}, expected a record: correct it")
        yield record


def _check(record: Record, kinds: Mapping[str, _Kind], place: str) -> None:
    for key, kind in kinds.items():
        if key in record:
            if not kind.fits(record[key]):
                _refuse(f"{place} has {key} {_short(record[key])}, expected {kind.expected}")
        elif not kind.optional:
            _refuse(f"{place} lacks '{key}', expected {kind.expected}")


def _refuse(problem: str) -> NoReturn:
    raise UserError(f"{problem}: correct the file, or make it again")


def _name(record: Record, key: str) -> str:
    value = record.get(key)
    return value[:60] if isinstance(value, str) else _short(value)


def _short(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _some(values: Iterable[Any]) -> str:
    shown = list(values)
    return ", ".join(map(str, shown[:20])) + ", ..." * (len(shown) > 20)
