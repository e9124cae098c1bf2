"""Data sets in the COCO panoptic format: a JSON file, a folder of PNGs with segment ids, a folder of pictures."""

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import UserError
from .catalog import Category, register
from .coco_format import load_panoptic_json

__all__ = ["load_panoptic", "panoptic_metadata", "register_panoptic", "register_panoptic_by_name"]


def panoptic_metadata(categories: list[Category], *, things_first: bool = True) -> dict[str, Any]:
    """Metadata of a panoptic data set from its categories, in the order of their contiguous ids.

    "Stuff" names every class, so that semantic segmentation has all of them; "thing" those with ``isthing``. With
    ``things_first`` these come first among ``categories``, so that one contiguous id means the same class in both.

    Raises ``UserError`` if a thing follows a stuff class but must not, or an id occurs twice.
    """
    things = [category for category in categories if category["isthing"]]
    if things_first and categories[: len(things)] != things:
        raise UserError(
            f"class '{things[-1]['name']}' is a thing, but comes after stuff classes: list all things before all stuff"
        )
    ids = [category["id"] for category in categories]
    if len(set(ids)) != len(ids):
        twice = next(number for number in ids if ids.count(number) > 1)
        raise UserError(f"class id {twice} is used twice: give every class an id of its own")
    contiguous = {category["id"]: index for index, category in enumerate(categories)}
    return {
        "thing_classes": [category["name"] for category in things],
        "thing_colors": [list(category["color"]) for category in things],
        "stuff_classes": [category["name"] for category in categories],
        "stuff_colors": [list(category["color"]) for category in categories],
        "thing_dataset_id_to_contiguous_id": {category["id"]: contiguous[category["id"]] for category in things},
        "stuff_dataset_id_to_contiguous_id": contiguous,
    }


def register_panoptic(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str | None = None,
    instances_json: str | None = None,
    *,
    hint: str = "",
) -> None:
    """Register a panoptic data set under ``name``; nothing is read until it is used.

    ``metadata`` is ``panoptic_metadata(...)`` of its classes. ``sem_seg_root``, a folder of PNGs with contiguous class
    ids and 255 for "ignore", is needed for semantic evaluation, ``instances_json`` (COCO's instance format) for
    instance evaluation. ``hint`` ends the errors about missing files: where to get them.

    A second registration with the same files replaces the first. Raises ``UserError`` if other files have the name.
    """
    files = {
        "sem_seg_root": sem_seg_root,
        "panoptic_root": panoptic_root,
        "image_root": image_root,
        "panoptic_json": panoptic_json,
        "json_file": instances_json,
    }
    if name in DatasetCatalog:
        registered = MetadataCatalog.get(name).get("panoptic_json")
        if registered != panoptic_json:
            raise UserError(
                f"data set name '{name}' is taken (its annotations are '{registered}'): choose another name for "
                f"'{panoptic_json}'"
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(
        name, lambda: load_panoptic(panoptic_json, image_root, panoptic_root, sem_seg_root, metadata, hint=hint)
    )
    MetadataCatalog.get(name).set(
        **files,
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **metadata,
    )


def register_panoptic_by_name(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    *,
    hint: str,
    **more_metadata: Any,
) -> None:
    """Register a panoptic data set whose pictures are ``*.jpg`` with their annotations' names, unless it is already.

    The metadata are those that the published code has for ADE20K and Mapillary Vistas.
    """
    register(
        name,
        lambda: load_panoptic(
            panoptic_json, image_root, panoptic_root, sem_seg_root, metadata, picture_ext=".jpg", hint=hint
        ),
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        label_divisor=1000,
        **metadata,
        **more_metadata,
    )


def load_panoptic(
    panoptic_json: str,
    image_root: str,
    panoptic_root: str,
    sem_seg_root: str | None,
    metadata: dict[str, Any],
    *,
    picture_ext: str | None = None,
    hint: str = "",
) -> list[dict[str, Any]]:
    """Dataset dicts of a data set in the COCO panoptic format, in the order of its annotations.

    Each has ``file_name``, ``image_id``, ``height``, ``width``, ``pan_seg_file_name``, ``segments_info`` (with
    contiguous ``category_id`` and bool ``isthing``) and, with a ``sem_seg_root``, ``sem_seg_file_name``. A picture's
    file is the one that ``images`` names, or with a ``picture_ext`` (".jpg") that with the annotation's name and this
    ending. The pictures themselves are not looked at; ``mask2former.data.checks`` does that.

    Raises ``UserError`` if the JSON file can't be used, or a segment has a class that ``metadata`` lacks.
    """
    content = load_panoptic_json(panoptic_json, hint, pictures_named=picture_ext is None)
    images = {image["id"]: image for image in content["images"]}
    dataset_dicts = []
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        stem = os.path.splitext(annotation["file_name"])[0]
        picture = image["file_name"] if picture_ext is None else stem + picture_ext
        dataset_dict = {
            "file_name": os.path.join(image_root, picture),
            "image_id": annotation["image_id"],
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": os.path.join(panoptic_root, annotation["file_name"]),
            "segments_info": [
                _contiguous(segment, metadata, f"'{panoptic_json}': '{annotation['file_name']}'")
                for segment in annotation["segments_info"]
            ],
        }
        if sem_seg_root is not None:
            dataset_dict["sem_seg_file_name"] = os.path.join(sem_seg_root, annotation["file_name"])
        dataset_dicts.append(dataset_dict)
    return dataset_dicts


def _contiguous(segment: dict[str, Any], metadata: dict[str, Any], place: str) -> dict[str, Any]:
    category = segment["category_id"]
    if category not in metadata["stuff_dataset_id_to_contiguous_id"]:
        raise UserError(
            f"{place}: segment {segment['id']} has category_id {category}, which is not among the "
            f"{len(metadata['stuff_classes'])} classes of the data set: correct the annotation or the classes"
        )
    return {
        **segment,
        "category_id": metadata["stuff_dataset_id_to_contiguous_id"][category],
        "isthing": category in metadata["thing_dataset_id_to_contiguous_id"],
    }
