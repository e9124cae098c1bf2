"""Pictures and label maps: PNGs whose values, or colours, are classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..datasets.catalog import Category
from ..images import picture_size
from ..panoptic_files import save_png
from .classes import CLASS_FILES, complete, find_beside, is_color, read_class_file
from .files import for_each, is_colored, list_files, read_values
from .forms import LABEL_SUFFIXES, Source
from .summary import Tally

__all__ = ["IGNORE_LABEL", "load_label_maps", "read_label_maps"]

IGNORE_LABEL = 255
# Label maps that were saved with blended edges, or as JPEG, have thousands of values.
_MOST_CLASSES = 255

# Value -> pixels of one label map, with its key in the folder.
Counts = tuple[str, tuple[int, int], dict[int, int]]


def read_label_maps(source: Source, known: Sequence[Category] | None, output: Path) -> tuple[dict[str, Any], Tally]:
    """Check a folder of label maps and its pictures: the data set's row, and what is in it.

    Classes are ``known``, or those of ``classes.json`` or ``classes.txt`` in the folder or beside it, or else the
    values found. 255 is "no label", unless a class has it, or it is the only value beside 0. Label maps whose values
    are not the contiguous class ids are written anew into ``output``.

    Raises ``UserError`` naming the file and the value that is wrong.
    """
    pictures, maps = list_files(source.pictures), list_files(source.annotations, LABEL_SUFFIXES)
    missing = sorted(pictures.keys() - maps.keys())
    if missing:
        raise UserError(
            f"{len(missing)} of {len(pictures)} pictures have no label map in '{source.annotations}', the first is "
            f"'{pictures[missing[0]]}': add it, or remove the picture"
        )
    colored = is_colored(maps[next(iter(pictures))])

    def count(key: str) -> Counts:
        return key, *_count(pictures[key], maps[key], colored)

    counts = for_each(count, list(pictures), "label maps")
    grey = colored and all(value & 255 == value >> 8 & 255 == value >> 16 for _, _, c in counts for value in c)
    if grey:
        counts = [(key, size, {value & 255: n for value, n in c.items()}) for key, size, c in counts]
    classes = list(known) if known is not None else _find_classes(source.annotations, counts, colored and not grey)
    index = {category["id"]: number for number, category in enumerate(classes)}
    tally = _tally(counts, index, maps)
    if known is None and list(index) == [0, IGNORE_LABEL]:
        tally.warnings.append("the values are 0 and 255 alone: 255 is taken for a class, not for 'no label'")
    labels = source.annotations
    if colored or any(number != value for value, number in index.items()):
        labels = output
        for_each(
            lambda key: _convert(maps[key], output / f"{key}.png", index, grey), list(pictures), "contiguous label maps"
        )
    row = {"form": "semantic", "pictures": str(source.pictures), "labels": str(labels), "classes": classes}
    return row, tally


def load_label_maps(pictures: str, labels: str) -> list[dict[str, Any]]:
    """Dataset dicts of pictures and label maps that were checked before."""
    maps = list_files(Path(labels), LABEL_SUFFIXES)
    return [
        {"file_name": str(path), "image_id": key, "sem_seg_file_name": str(maps[key])}
        for key, path in list_files(Path(pictures)).items()
    ]


def _count(picture: Path, label_map: Path, colored: bool) -> tuple[tuple[int, int], dict[int, int]]:
    """The size of a label map, and the pixels of each value."""
    if is_colored(label_map) != colored:
        kinds = "colours, but others have" if not colored else "one channel, but others have colours, not"
        raise UserError(f"label map '{label_map}' has {kinds} one channel: make them all alike")
    values = read_values(label_map)
    height, width = picture_size(picture)
    if values.shape != (height, width):
        raise UserError(
            f"label map '{label_map}' is {values.shape[1]} x {values.shape[0]} pixels, but its picture '{picture}' is "
            f"{width} x {height}: make the label map anew from the right picture"
        )
    found, numbers = np.unique(values, return_counts=True)
    if len(found) > _MOST_CLASSES + 1:
        raise UserError(
            f"label map '{label_map}' has {len(found)} values, expected at most {_MOST_CLASSES + 1}: save label maps "
            "without smoothing, resizing or lossy compression"
        )
    if found[0] < 0:
        raise UserError(f"label map '{label_map}' has the value {found[0]}, expected none below 0")
    return (height, width), dict(zip(found.tolist(), numbers.tolist(), strict=True))


def _find_classes(folder: Path, counts: Sequence[Counts], colored: bool) -> list[Category]:
    """The classes of the file beside the label maps, or those of the values found."""
    path = find_beside(folder, CLASS_FILES)
    if path is not None:
        listed = read_class_file(path)
        if colored:
            listed = [{**category, "id": _packed(category, path)} for category in listed]
        return complete(listed, things=False, place=f"'{path}'")
    values = sorted({value for _, _, found in counts for value in found})
    if not colored and values not in ([0, IGNORE_LABEL], [IGNORE_LABEL]):
        values = [value for value in values if value != IGNORE_LABEL]
    if len(values) > _MOST_CLASSES:
        raise UserError(f"'{folder}' has {len(values)} different values, expected at most {_MOST_CLASSES} classes")
    return complete([_name_value(value, colored) for value in values], things=False, place=f"'{folder}'")


def _packed(category: dict[str, Any], path: Path) -> int:
    color: Any = category.get("color")
    if not is_color(color):
        raise UserError(
            f"'{path}': class '{category.get('name')}' has no 'color' [red, green, blue] from 0 to 255, by which label "
            "maps in colour tell classes: add it"
        )
    return color[0] + (color[1] << 8) + (color[2] << 16)


def _name_value(value: int, colored: bool) -> dict[str, Any]:
    if not colored:
        return {"id": value, "name": f"class {value}"}
    color = [value & 255, value >> 8 & 255, value >> 16]
    return {"id": value, "name": "#{:02x}{:02x}{:02x}".format(*color), "color": color}


def _tally(counts: Sequence[Counts], index: dict[int, int], maps: dict[str, Path]) -> Tally:
    tally = Tally()
    for key, size, found in counts:
        objects = []
        for value, pixels in found.items():
            if value in index:
                objects.append((index[value], pixels))
            elif value != IGNORE_LABEL:
                known = ", ".join(map(str, list(index)[:20])) + ", ..." * (len(index) > 20)
                raise UserError(
                    f"label map '{maps[key]}' has the value {value} in {pixels} pixels, which is no class: expected "
                    f"{known}, or {IGNORE_LABEL} for 'no label'"
                )
        tally.add(key, size, objects)
    return tally


def _convert(source: Path, target: Path, index: dict[int, int], grey: bool) -> None:
    """Write a label map with contiguous class ids."""
    values = read_values(source)
    if grey:
        values &= 255
    labels = np.full(values.shape, IGNORE_LABEL, dtype=np.uint8)
    for value, number in index.items():
        labels[values == value] = number
    save_png(target, labels)
