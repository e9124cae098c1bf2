"""Classes of the user's own data: from files beside the annotations, or from what the annotations hold.

A class is a dict with ``id``, the value in the annotation files; ``name``; ``color`` (RGB, 0 to 255); ``isthing``.
A class's place in the list is its contiguous id.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.utils.colormap import colormap

from ...errors import UserError
from ..datasets.catalog import Category
from ..datasets.coco_format import is_flag, is_whole, load_json

__all__ = ["CLASS_FILES", "complete", "find_beside", "is_color", "read_class_file"]

# As long as a label can be.
_INTEGER = re.compile(r"-?[0-9]{1,9}")

CLASS_FILES = ("classes.json", "classes.txt")


def complete(categories: Iterable[dict[str, Any]], *, things: bool, place: str) -> list[Category]:
    """Classes with a colour each, and ``isthing``, which is ``things`` where they don't say.

    Raises ``UserError`` if there are none, one lacks its id or name, or an id occurs twice.
    """
    palette = colormap(rgb=True, maximum=255).astype(int).tolist()
    classes: list[Category] = []
    for category in categories:
        if not isinstance(category, dict) or not is_whole(category.get("id")) or type(category.get("name")) is not str:
            raise UserError(f"{place} has the class {str(category)[:60]}: expected an integer 'id' and a 'name'")
        if any(category["id"] == other["id"] for other in classes):
            raise UserError(f"{place} has the class id {category['id']} twice: give every class an id of its own")
        color = category.get("color") or palette[len(classes) % len(palette)]
        if not is_color(color) or not is_flag(category.get("isthing", things)):
            raise UserError(
                f"{place} has the class '{category['name']}' with color {str(color)[:60]} and isthing "
                f"{category.get('isthing', things)!r}: expected [red, green, blue] from 0 to 255, and 0 or 1"
            )
        classes.append(
            {
                "id": int(category["id"]),
                "name": category["name"],
                "color": [int(value) for value in color],
                "isthing": int(category.get("isthing", things)),
            }
        )
    if not classes:
        raise UserError(f"{place} has no classes: add them")
    return classes


def is_color(value: Any) -> bool:
    """Whether a value is a list of red, green and blue, from 0 to 255."""
    return isinstance(value, list) and len(value) == 3 and all(is_whole(part) and 0 <= part <= 255 for part in value)


def find_beside(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of the files ``names`` that is in ``folder`` or beside it."""
    places = [place / name for place in (folder, folder.parent) for name in names]
    return next((path for path in places if path.is_file()), None)


def read_class_file(path: Path) -> list[dict[str, Any]]:
    """Classes of a JSON or text file: ``id``, ``name`` and what else it says.

    JSON: ``["road", "tree"]`` (ids 0, 1, ...), ``{"0": "road", "7": "tree"}``, or dicts ``{"id": 7, "name": "tree"}``,
    with ``color`` where wanted. Text: a name a line (ids 0, 1, ...), or, on every line, an id and a name.
    """
    if path.suffix == ".txt":
        return _read_lines(path)
    content = load_json(path)
    if isinstance(content, dict) and "categories" in content:
        content = content["categories"]
    if isinstance(content, dict):
        if not all(_INTEGER.fullmatch(key) for key in content):
            raise UserError(f'\'{path}\': expected the labels\' values as keys, as in {{"0": "road"}}')
        return [{"id": int(key), "name": name} for key, name in content.items()]
    if not isinstance(content, list):
        raise UserError(f"'{path}': expected a list of names, or {{value: name}}, got {type(content).__name__}")
    return [item if isinstance(item, dict) else {"id": index, "name": item} for index, item in enumerate(content)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is no text in UTF-8: {error}: save it as such") from error
    pairs = [line.split(maxsplit=1) for line in lines]
    if pairs and all(len(pair) == 2 and _INTEGER.fullmatch(pair[0]) for pair in pairs):
        return [{"id": int(number), "name": name} for number, name in pairs]
    return [{"id": index, "name": line} for index, line in enumerate(lines)]
