"""Objects as PNGs, one a picture or one an object: made into a file in COCO's instance format."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..datasets.catalog import Category
from ..datasets.coco_format import load_json
from ..images import picture_size
from ..panoptic_files import save_json
from .classes import CLASS_FILES, complete, find_beside, read_class_file
from .files import for_each, list_files, read_values
from .forms import LABEL_SUFFIXES, OBJECT_FILES, Source
from .instances import encode

__all__ = ["make_instances_json"]

ONE_CLASS = "object"

# One object: its name in the list of classes, and its mask.
Masks = Iterator[tuple[str, np.ndarray]]
# (picture, object) -> class
ObjectClasses = Mapping[tuple[str, str], str]


def make_instances_json(source: Source, known: Sequence[Category] | None, path: Path) -> Source:
    """Write ``path`` from the PNGs of ``source``; the source that it makes.

    The class of an object is that of the file ``objects.csv`` or ``objects.json``, if there is one, else all are of
    one class.

    Raises ``UserError`` for what is missing, differs in size, or has no class.
    """
    pairs, read = _pair(source)
    object_file = find_beside(source.annotations, OBJECT_FILES)
    object_classes = read_object_file(object_file) if object_file else {}
    ids = _class_ids(source, object_classes, known)
    only = None if object_file else next(iter(ids))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []

    def convert(pair: tuple[str, Path, list[Path]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        key, picture, pngs = pair
        height, width = picture_size(picture)
        image = {"file_name": picture.relative_to(source.pictures).as_posix(), "height": height, "width": width}
        objects = []
        for name, mask in read(pngs, (height, width), picture):
            class_name = only or _class_of(object_classes, object_file, (key, picture.name), name)
            if class_name not in ids:
                raise UserError(
                    f"'{object_file}': object {name} of '{key}' is of class '{class_name}', which is not among "
                    f"{', '.join(map(str, ids))}: correct it or add the class"
                )
            objects.append({"category_id": ids[class_name], "iscrowd": 0, **encode(mask)})
        return image, objects

    for image, objects in for_each(convert, pairs, "object masks"):
        images.append({"id": len(images) + 1, **image})
        for annotation in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": len(images), **annotation})
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    save_json(path, {"images": images, "annotations": annotations, "categories": categories})
    return Source("coco", source.pictures, path)


# --------------------------------------------------------------------------------------------- classes of objects


def read_object_file(path: Path) -> dict[tuple[str, str], str]:
    """Classes by picture and object: ``{picture: {object: class}}`` as JSON, or CSV rows ``picture,object,class``."""
    if path.suffix == ".json":
        content = load_json(path)
        if not isinstance(content, dict) or not all(isinstance(objects, dict) for objects in content.values()):
            raise UserError(f"'{path}': expected {{picture: {{object: class}}}}")
        classes = {(picture, name): value for picture, objects in content.items() for name, value in objects.items()}
    else:
        rows = _read_rows(path)
        if not rows or not {"picture", "object", "class"} <= rows[0].keys():
            raise UserError(f"'{path}': expected a first line 'picture,object,class' and a row for each object")
        classes = {(row["picture"], row["object"]): row["class"] for row in rows}
    for (picture, name), value in classes.items():
        if not isinstance(value, str):
            raise UserError(f"'{path}': object {name} of '{picture}' has the class {str(value)[:60]}, expected a name")
    return classes


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' is no table in UTF-8 with commas: {error}: save it as such") from error


def _class_of(object_classes: ObjectClasses, path: Path | None, pictures: tuple[str, str], name: str) -> str:
    """The class of the object ``name``; ``pictures``: the picture's name without and with its ending."""
    for picture in pictures:
        if (picture, name) in object_classes:
            return object_classes[picture, name]
    raise UserError(f"'{path}' has no class for object {name} of picture '{pictures[0]}': add it")


def _class_ids(source: Source, object_classes: ObjectClasses, known: Sequence[Category] | None) -> dict[str, int]:
    """Ids by name; one where no file tells the objects' classes."""
    class_file = find_beside(source.annotations, CLASS_FILES)
    if known is not None:
        names = {category["name"]: category["id"] for category in known}
    elif class_file is not None:
        classes = complete(read_class_file(class_file), things=True, place=f"'{class_file}'")
        names = {category["name"]: category["id"] for category in classes}
    else:
        found = sorted(set(object_classes.values())) or [ONE_CLASS]
        names = {name: number for number, name in enumerate(found, start=1)}
    if not object_classes and len(names) > 1:
        raise UserError(
            f"'{source.annotations}' has objects of {len(names)} classes ({', '.join(names)}), but no objects.csv or "
            "objects.json, which tells the class of each: add one"
        )
    return names


# ---------------------------------------------------------------------------------------------------------- files


def _pair(source: Source) -> tuple[list[tuple[str, Path, list[Path]]], Callable[..., Masks]]:
    """Key, file and PNGs of every picture, and what reads the PNGs."""
    if source.form == "object-masks" and source.pictures == source.annotations:
        return list(_bowl_pairs(source.pictures)), _read_object_pngs
    pictures, pngs = list_files(source.pictures), list_files(source.annotations, LABEL_SUFFIXES)
    if source.form == "instance-maps":
        missing = sorted(pictures.keys() - pngs.keys())
        if missing:
            raise UserError(
                f"{len(missing)} of {len(pictures)} pictures have no PNG in '{source.annotations}', the first is "
                f"'{pictures[missing[0]]}': add it (all 0 where there is no object), or remove the picture"
            )
        return [(key, path, [pngs[key]]) for key, path in pictures.items()], _read_numbered
    by_picture: dict[str, list[Path]] = {key: [] for key in pictures}
    for name, path in pngs.items():
        by_picture[_owner(name, by_picture, path)].append(path)
    return [(key, path, by_picture[key]) for key, path in pictures.items()], _read_object_pngs


def _owner(name: str, pictures: Mapping[str, Any], path: Path) -> str:
    """The picture whose name the PNG's begins with: ``NAME/anything`` or, the longest of them, ``NAME_anything``."""
    for cut in range(len(name), 0, -1):
        if cut < len(name) and name[cut] in "/_" and name[:cut] in pictures:
            return name[:cut]
    raise UserError(f"'{path}' belongs to no picture: expected NAME_anything.png or NAME/anything.png")


def _bowl_pairs(folder: Path) -> Iterator[tuple[str, Path, list[Path]]]:
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            continue
        pictures = list(list_files(entry / "images").values()) if (entry / "images").is_dir() else []
        if len(pictures) != 1:
            raise UserError(f"'{entry / 'images'}' has {len(pictures)} pictures, expected one")
        masks = entry / "masks"
        yield entry.name, pictures[0], list(list_files(masks, LABEL_SUFFIXES).values()) if masks.is_dir() else []


def _read_numbered(pngs: Sequence[Path], size: tuple[int, int], picture: Path) -> Masks:
    values = _read_sized(pngs[0], size, picture)
    for value in np.unique(values):
        if value != 0:
            yield str(value), values == value


def _read_object_pngs(pngs: Sequence[Path], size: tuple[int, int], picture: Path) -> Masks:
    for path in pngs:
        mask = _read_sized(path, size, picture) != 0
        if not mask.any():
            raise UserError(f"object mask '{path}' has no pixel that is not 0: remove the file")
        yield path.stem, mask


def _read_sized(path: Path, size: tuple[int, int], picture: Path) -> np.ndarray:
    values = read_values(path)
    if values.shape != size:
        raise UserError(
            f"'{path}' is {values.shape[1]} x {values.shape[0]} pixels, but its picture '{picture}' is {size[1]} x "
            f"{size[0]}: make it anew from the right picture"
        )
    return values
