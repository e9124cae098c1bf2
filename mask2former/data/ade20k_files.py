"""Making ADE20K's annotation files (SceneParsing benchmark) from those that are downloaded.

Layouts and formats are those of the published code, facebookresearch/Mask2Former, ``datasets/prepare_ade20k_*.py``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from ..errors import UserError
from .annotations import rgb_from_ids
from .datasets import read_classes
from .images import read_image, read_label_map
from .panoptic_files import extent, is_newer, run_jobs, save_png
from .preparation import Options, Part, files_in, make_json

__all__ = [
    "FOLDER",
    "SPLITS",
    "SegmentIds",
    "instance_annotations",
    "instance_classes",
    "make_instances",
    "make_panoptic",
    "make_semantic",
    "panoptic_segments",
    "read_objects",
    "read_semantic_labels",
]

FOLDER = "ADEChallengeData2016"

# Split → folder of its files.
SPLITS = {"train": "training", "val": "validation"}

NO_CLASS = 255
_CLASSES = 150
_HINT = "give the folder of ADE20K as --root (datasets/README.md shows what is in it)"

Segments = list[dict[str, Any]]


# ----------------------------------------------------------------------------------------- what is downloaded


def instance_classes() -> dict[int, int]:
    """Class in the instance PNGs (1 to 100) → category id (0 to 149)."""
    table = Path(__file__).parent / "datasets" / "ade20k_instance_ids.json"
    return {instance: scene - 1 for instance, scene, _ in json.loads(table.read_text(encoding="utf-8"))}


def read_semantic_labels(path: Path) -> np.ndarray:
    """Category ids (H, W) uint8, 0 to 149, and 255 for "no label", of a semantic PNG as downloaded.

    Raises ``UserError`` naming the file if it can't be read, or has other labels.
    """
    labels = read_label_map(path, np.int32)
    if labels.max(initial=0) > _CLASSES or labels.min(initial=0) < 0:
        raise UserError(
            f"'{path}' has labels from {labels.min()} to {labels.max()}, expected 0 (none) to {_CLASSES}: download it "
            "again"
        )
    return (labels - 1).astype(np.uint8)  # 0 becomes 255


def read_objects(path: Path) -> tuple[np.ndarray, dict[int, int]]:
    """The objects of an instance PNG as downloaded: its red channel is the class, its green the object's number.

    Returns:
        (H, W) uint8 numbers, 0 where there is no object, and number → category id, by ascending number.

    Raises:
        UserError: if the file can't be read, or an object's class is unknown or not one. The line names file,
            object and class.
    """
    red, green, blue = read_image(path, "RGB").transpose(2, 0, 1)
    if green.any() and np.array_equal(red, green) and np.array_equal(green, blue):
        raise UserError(f"'{path}' is grey, expected classes in red and objects in green: get annotations_instance.tar")
    classes = instance_classes()
    objects: dict[int, int] = {}
    for pair in np.unique(green.astype(np.uint16) * 256 + red).tolist():  # not int: a file can be of any size
        number, label = divmod(pair, 256)
        if number == 0:
            continue
        if label not in classes:
            raise UserError(f"'{path}': object {number} has class {label}, expected 1 to {len(classes)}")
        if number in objects:
            raise UserError(f"'{path}': object {number} has more than one class: download the file again")
        objects[number] = classes[label]
    return green, objects


def _shape(picture: Path, *annotations: tuple[Path, np.ndarray]) -> tuple[int, int]:
    """Height and width of a picture. Raises ``UserError`` if it can't be read, or an annotation has another size."""
    height, width = read_image(picture).shape[:2]
    for path, labels in annotations:
        if labels.shape != (height, width):
            raise UserError(
                f"'{path}' has {labels.shape[1]} x {labels.shape[0]} pixels, but '{picture}' has {width} x {height}"
            )
    return height, width


# -------------------------------------------------------------------------------------------------- semantic


def make_semantic(options: Options, split: str) -> tuple[Path, list[str]]:
    """Make ``annotations_detectron2/<split>``; the folder, and a line for each file that is missing or broken.

    Each label map downloaded is converted. Where there are pictures, each must have one.
    """
    source = options.root / "annotations" / SPLITS[split]
    target = options.output / "annotations_detectron2" / SPLITS[split]
    names = {path.name for path in files_in(source, ".png", _HINT)}
    names |= {f"{path.stem}.png" for path in (options.root / "images" / SPLITS[split]).glob("*.jpg")}

    def convert(name: str) -> None:
        if not is_newer(target / name, source / name) or not (source / name).exists():
            save_png(target / name, read_semantic_labels(source / name))

    jobs = [partial(convert, name) for name in sorted(names)]
    return target, run_jobs(jobs, workers=options.workers, description=f"semantic {split}")


# -------------------------------------------------------------------------------------------------- instances


def make_instances(options: Options, split: str) -> tuple[Path, list[str]]:
    """Make ``ade20k_instance_<split>.json``; it, and a line for each file that is missing or broken."""
    pictures, folders = _inputs(options.root, split, "annotations_instance")
    target = options.output / f"ade20k_instance_{split}.json"
    parts = [Part(stem, sources) for stem, sources in pictures.items()]

    def make(part: Part) -> dict[str, Any]:
        picture, instance = part.sources
        numbers, objects = read_objects(instance)
        height, width = _shape(picture, (instance, numbers))
        image = {"id": part.name, "file_name": picture.name, "width": width, "height": height}
        return {"image": image, "annotations": instance_annotations(numbers, objects)}

    def assemble(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        objects = ((entry["image"]["id"], annotation) for entry in entries for annotation in entry["annotations"])
        return {
            "images": [entry["image"] for entry in entries],
            "categories": read_classes("ade20k_instance"),
            "annotations": [
                {"id": number, "image_id": image, **annotation}
                for number, (image, annotation) in enumerate(objects, start=1)
            ],
        }

    return target, make_json(target, parts, make, assemble, folders=folders, workers=options.workers)


def instance_annotations(numbers: np.ndarray, objects: Mapping[int, int]) -> list[dict[str, Any]]:
    """Annotations in COCO's format, without ids, of what ``read_objects`` returned."""
    annotations = []
    for number, category in objects.items():
        mask = numbers == number
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
        annotations.append({"iscrowd": 0, "category_id": category, **extent(mask), "segmentation": segmentation})
    return annotations


# --------------------------------------------------------------------------------------------------- panoptic


def make_panoptic(options: Options, split: str) -> tuple[Path, list[str]]:
    """Make ``ade20k_panoptic_<split>`` and its JSON; this, and a line for each file that is missing or broken."""
    pictures, folders = _inputs(options.root, split, "annotations", "annotations_instance")
    target = options.output / f"ade20k_panoptic_{split}.json"
    parts = [Part(stem, sources, target.with_suffix("") / f"{stem}.png") for stem, sources in pictures.items()]
    classes = read_classes("ade20k")

    def make(part: Part) -> dict[str, Any]:
        picture, semantic, instance = part.sources
        labels = read_semantic_labels(semantic)
        numbers, objects = read_objects(instance)
        height, width = _shape(picture, (semantic, labels), (instance, numbers))
        ids, segments = panoptic_segments(labels, numbers, objects, classes)
        if part.file is not None:
            save_png(part.file, rgb_from_ids(ids))
        image = {"id": part.name, "file_name": picture.name, "width": width, "height": height}
        annotation = {"image_id": part.name, "file_name": f"{part.name}.png", "segments_info": segments}
        return {"image": image, "annotation": annotation}

    def assemble(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "images": [entry["image"] for entry in entries],
            "annotations": [entry["annotation"] for entry in entries],
            "categories": classes,
        }

    return target, make_json(target, parts, make, assemble, folders=folders, workers=options.workers)


def panoptic_segments(
    labels: np.ndarray, numbers: np.ndarray, objects: Mapping[int, int], classes: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, Segments]:
    """Segment ids (H, W) uint32 and ``segments_info`` from what the readers above return.

    Semantic labels give the stuff, instances the things, which lie on the stuff where both are. As in the published
    files, ``area`` and ``bbox`` of stuff are those before things are laid on it, so a stuff segment may have fewer
    pixels than its area, or none. Semantic labels of things count for nothing: there, and where no label is, the id
    is 0 unless an object covers it.
    """
    ids = np.zeros(labels.shape, dtype=np.uint32)
    new_id = SegmentIds(classes)
    segments: Segments = []

    def lay(mask: np.ndarray, category: int) -> None:
        segment_id = new_id(category)
        ids[mask] = segment_id
        segments.append({"id": segment_id, "category_id": category, **extent(mask), "iscrowd": 0})

    for category in np.unique(labels).tolist():
        if category != NO_CLASS and not classes[category]["isthing"]:
            lay(labels == category, category)
    for number, category in objects.items():
        lay(numbers == number, category)
    return ids, segments


class SegmentIds:
    """Ids for the segments of one picture that show, as colours in a PNG, the colours of their classes.

    The first segment of a class has its class's colour, further ones colours that differ by at most 30 in each
    channel. The published code draws those at random; here they are the same each time. Colours of stuff are not
    given to things. Two stuff classes, road and skyscraper, share a colour: if both are in a picture, the second gets
    a near one, where the published files have one id for both.
    """

    def __init__(self, classes: Sequence[Mapping[str, Any]]) -> None:
        self._classes = {category["id"]: category for category in classes}
        self._reserved = {_color_id(category["color"]) for category in classes if not category["isthing"]} | {0}
        self._used: set[int] = set()

    def __call__(self, category: int) -> int:
        """An id of its own for a segment of this category."""
        color, isthing = self._classes[category]["color"], self._classes[category]["isthing"]
        own = _color_id(color)
        free = own not in self._used and (own not in self._reserved or not isthing)
        found = own if free else next(near for near in _near_ids(color) if near not in self._used | self._reserved)
        self._used.add(found)
        return found


def _color_id(color: Sequence[int]) -> int:
    return color[0] + 256 * color[1] + 65536 * color[2]


def _near_ids(color: Sequence[int], distance: int = 30) -> Iterator[int]:
    """Ids of the colours that differ by at most ``distance`` in each channel, in an order that jumps about."""
    side = 2 * distance + 1
    step = 140_281  # no common divisor with the number of colours, 61 ** 3, so each comes once
    for count in range(1, side**3):
        place = count * step % side**3
        offsets = place // side**2, place // side % side, place % side
        yield _color_id([min(255, max(0, c + o - distance)) for c, o in zip(color, offsets, strict=True)])


# ----------------------------------------------------------------------------------------------------- inputs


def _inputs(root: Path, split: str, *kinds: str) -> tuple[dict[str, tuple[Path, ...]], list[Path]]:
    """Name → picture and its annotation files of each kind, whether they exist or not; the folders they are in."""
    folders = [root / kind / SPLITS[split] for kind in ("images", *kinds)]
    for folder in folders[1:]:
        files_in(folder, ".png", _HINT)
    pictures = files_in(folders[0], ".jpg", _HINT)
    return {path.stem: (path, *(folder / f"{path.stem}.png" for folder in folders[1:])) for path in pictures}, folders
