"""From annotations, as data sets store them, to one boolean mask for each object of an augmented picture.

An annotation reader is a function ``reader(dataset_dict, transforms, padding) -> (classes, masks)``:

The dataset dict also has what the mapper found out about the picture: ``height`` and ``width``, and ``sem_seg``,
(H, W) int64 augmented labels with -1 for "none", where the mapper reads label maps.

========== ============================================================================================
argument   meaning
========== ============================================================================================
padding    (H, W) bool, True = padding, H and W those of the augmented picture
classes    (N) int64, contiguous class ids
masks      (N, H, W) bool, False in the padding; rows without a True pixel are the caller's to drop
========== ============================================================================================
"""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import shapely
from detectron2.data import transforms as T
from detectron2.utils.logger import log_first_n

from ..errors import UserError
from .datasets.coco_format import is_whole
from .images import read_image

__all__ = [
    "AnnotationReader",
    "check_segmentation",
    "decode_segmentation",
    "ids_from_rgb",
    "read_instances",
    "read_panoptic",
    "read_semantic",
    "rgb_from_ids",
]

AnnotationReader = Callable[[dict[str, Any], T.TransformList, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Pixels from the picture's corner that a polygon may reach.
_FARTHEST = 10**6

# Six bits a letter, of which the highest says that the number goes on.
_COMPRESSED = re.compile(r"([0-o]*[0-O])?")

# Numbers of one byte, less 0 and 255, which padding may be filled with.
_MOST_NUMBERS = 254

# A polygon as rings of (P, 2) points (x, y); a pixel is inside if an odd number of the rings enclose it.
Rings = list[np.ndarray]


# --------------------------------------------------------------------------------------------- instances


def read_instances(
    dataset_dict: dict[str, Any], transforms: T.TransformList, padding: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reader of COCO-style instance annotations: polygons, compressed and uncompressed RLE, in any mixture.

    Crowd regions are left out, since they are no single objects. Polygons stay polygons until after the
    augmentation, so enlarging a picture does not make their edges coarse.

    Raises ``UserError`` naming the picture and the annotation if a segmentation is missing or broken.
    """
    if "annotations" not in dataset_dict:
        raise UserError(
            f"picture '{dataset_dict['file_name']}' has no instance annotations ('annotations'), which this mapper "
            "reads: choose another INPUT.DATASET_MAPPER_NAME or data set"
        )
    objects = [
        (annotation, _describe(dataset_dict, annotation, index))
        for index, annotation in enumerate(dataset_dict["annotations"])
        if not annotation.get("iscrowd", 0)
    ]
    classes = np.array([annotation["category_id"] for annotation, _ in objects], dtype=np.int64)
    masks = np.zeros((len(objects), *padding.shape), dtype=bool)
    size = dataset_dict["height"], dataset_dict["width"]
    for mask, (annotation, name) in zip(masks, objects, strict=True):
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list):
            polygons = _mend_polygons(segmentation, *size, name)
            moved = [[transforms.apply_coords(ring.copy()) for ring in rings] for rings in polygons]
            _fill_polygons(moved, mask)
        else:
            pixels = _decode_rle(segmentation, *size, name)
            mask[:] = transforms.apply_segmentation(pixels) == 1
    _clear(masks, padding)
    return classes, masks


def decode_segmentation(segmentation: Any, height: int, width: int, name: str) -> np.ndarray:
    """The (height, width) bool mask of one COCO segmentation: polygons, compressed or uncompressed RLE.

    ``name`` says in warnings and errors which annotation it is.
    """
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), dtype=bool)
        _fill_polygons(_mend_polygons(segmentation, height, width, name), mask)
        return mask
    return _decode_rle(segmentation, height, width, name).astype(bool)


def check_segmentation(segmentation: Any, height: int, width: int, name: str) -> None:
    """Raise ``UserError`` unless pycocotools can make a (height, width) mask of a COCO segmentation.

    It takes what it is given for numbers, and the time and memory of polygons grow with their length in pixels.
    """
    if not isinstance(segmentation, list):
        _decode_rle(segmentation, height, width, name)
        return
    for polygon in segmentation:
        numbers = _numbers(polygon, name)
        if not numbers.size or not np.abs(numbers).max() <= _FARTHEST:  # neither is NaN
            raise UserError(
                f"{name}: it has the polygon {str(polygon)[:60]}, expected points in its picture, which is {width} x "
                f"{height}"
            )


def _describe(dataset_dict: dict[str, Any], annotation: dict[str, Any], index: int) -> str:
    number = f"id {annotation['id']}" if "id" in annotation else f"number {index + 1}"
    return f"annotation {number} of picture '{dataset_dict['file_name']}'"


def _decode_rle(segmentation: Any, height: int, width: int, name: str) -> np.ndarray:
    """The (height, width) uint8 mask, 0 or 1, of a run-length encoding."""
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError(
            f"{name}: expected 'segmentation' with polygons or a run-length encoding, got {repr(segmentation)[:60]}"
        )
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise UserError(
            f"{name}: its run-length encoding has size {str(size)[:60]}, but the picture is {height} pixels high and "
            f"{width} wide"
        )
    if isinstance(counts, list):
        _check_runs(counts, height * width, name)
    else:
        text = counts.decode("latin1") if isinstance(counts, bytes) else counts
        if not isinstance(text, str) or not _COMPRESSED.fullmatch(text):
            raise UserError(f"{name}: its run-length encoding is {repr(counts)[:60]}, expected a list or COCO's text")
    try:
        rle = coco_mask.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
        return coco_mask.decode(rle)
    except ValueError as error:
        raise UserError(f"{name}: broken run-length encoding: {error}") from error


def _check_runs(counts: list[Any], pixels: int, name: str) -> None:
    for count in counts:
        if not is_whole(count) or count < 0:
            raise UserError(f"{name}: its run-length encoding has the run {str(count)[:60]}, expected integers")
    if sum(counts) != pixels:
        raise UserError(
            f"{name}: the runs of its run-length encoding add up to {sum(counts)} pixels, expected {pixels}"
        )


def _mend_polygons(polygons: list[Any], height: int, width: int, name: str) -> list[Rings]:
    """Polygons, each a flat list x0, y0, x1, y1, ..., as rings inside the picture; degenerate ones are dropped."""
    mended = []
    for polygon in polygons:
        rings = _mend_polygon(_numbers(polygon, name), height, width)
        if rings:
            mended.append(rings)
        else:
            log_first_n(
                logging.WARNING,
                f"{name}: dropped a polygon of {len(polygon)} numbers, which has no area in the picture",
                name=__name__,
                key="message",
            )
    return mended


def _numbers(polygon: Any, name: str) -> np.ndarray:
    """A polygon's numbers (2 P) float64."""
    try:
        numbers = np.asarray(polygon)
    except ValueError:  # lists of different lengths
        numbers = np.empty((0, 0))
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iuf"):
        raise UserError(f"{name}: it has the polygon {str(polygon)[:60]}, expected numbers x, y, x, y, ...")
    return numbers.astype(np.float64)


def _mend_polygon(flat: np.ndarray, height: int, width: int) -> Rings:
    if len(flat) % 2 or len(flat) < 6 or not np.isfinite(flat).all():
        return []
    points = flat.reshape(-1, 2)
    inside = points.min() >= 0 and points[:, 0].max() <= width and points[:, 1].max() <= height
    if inside and _ring_area(points) > 0.01:
        # As it is, even if it crosses itself: the filling below follows COCO's even-odd rule for that.
        return [points]
    # Crossing parts of opposite orientation can cancel out, so only the mended polygon's area tells.
    valid = shapely.make_valid(shapely.Polygon(points)).intersection(shapely.box(0, 0, width, height))
    return [
        np.asarray(ring.coords)[:-1]
        for part in shapely.get_parts(valid)
        if isinstance(part, shapely.Polygon) and part.area > 0
        for ring in (part.exterior, *part.interiors)
    ]


def _ring_area(points: np.ndarray) -> float:
    """Area by the shoelace formula; parts of opposite orientation cancel out."""
    x, y = (points - points[0]).T  # the first is the origin, so the edges from and to it add nothing
    return abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:])) / 2


def _fill_polygons(polygons: Iterable[Rings], mask: np.ndarray) -> None:
    """Set what polygons cover in the (H, W) bool mask, filled as COCO's own tools do it."""
    for rings in polygons:
        points = np.concatenate(rings)
        (x0, y0), (x1, y1) = _window(points, *mask.shape)
        if x0 >= x1 or y0 >= y1:
            continue
        # What COCO's filling sets lies within a pixel of the points, and moves along with them.
        runs = coco_mask.frPyObjects([(ring - (x0, y0)).ravel() for ring in rings], y1 - y0, x1 - x0)
        filled = coco_mask.decode(runs).T  # (rings, w, h)
        odd = filled[0] if len(filled) == 1 else np.bitwise_xor.reduce(filled, axis=0)
        mask[y0:y1, x0:x1] |= cv2.transpose(odd).view(bool)


def _window(points: np.ndarray, height: int, width: int) -> tuple[list[int], list[int]]:
    """The smallest window of the picture with the pixels that points (P, 2) may set: first (x, y), and one past."""
    size = (width, height)
    # Clipped before they become integers, which can't hold all floating-point numbers.
    first = np.floor(points.min(axis=0)).clip(0, size).astype(int)
    past = (np.ceil(points.max(axis=0)) + 1).clip(0, size).astype(int)
    return first.tolist(), past.tolist()


def _clear(masks: np.ndarray, padding: np.ndarray) -> None:
    """Set masks (N, H, W) to False in the padding (H, W)."""
    if padding.any():
        masks &= ~padding


# ---------------------------------------------------------------------------------------------- panoptic


def ids_from_rgb(pixels: np.ndarray) -> np.ndarray:
    """Segment ids (..., ) uint32 of a COCO panoptic picture (..., 3) uint8: R + 256 G + 65536 B."""
    if pixels.size == 0:
        return np.zeros(pixels.shape[:-1], dtype=np.uint32)
    # A fourth channel makes the bytes of a pixel those of an integer, which is quicker than arithmetic.
    four = cv2.cvtColor(np.ascontiguousarray(pixels).reshape(1, -1, 3), cv2.COLOR_RGB2RGBA)
    return (four.view("<u4") & np.uint32(0xFFFFFF)).reshape(pixels.shape[:-1])


def rgb_from_ids(ids: np.ndarray) -> np.ndarray:
    """The COCO panoptic picture (..., 3) uint8 of segment ids (...) in [0, 2**24)."""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def read_panoptic(
    dataset_dict: dict[str, Any], transforms: T.TransformList, padding: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reader of COCO-style panoptic annotations: a PNG of segment ids, and ``segments_info``.

    Crowd segments are left out, and so is what no segment covers: padding and unlabelled pixels belong to no mask.

    Raises ``UserError`` if the PNG can't be read or differs in size from the picture.
    """
    if "pan_seg_file_name" not in dataset_dict:
        raise UserError(
            f"picture '{dataset_dict['file_name']}' has no panoptic annotation ('pan_seg_file_name'), which this "
            "mapper reads: choose another INPUT.DATASET_MAPPER_NAME or data set"
        )
    path = dataset_dict["pan_seg_file_name"]
    pixels = read_image(path, "RGB")
    height, width = dataset_dict["height"], dataset_dict["width"]
    if pixels.shape[:2] != (height, width):
        raise UserError(
            f"panoptic annotation '{path}' is {pixels.shape[1]} x {pixels.shape[0]} pixels, but its picture "
            f"'{dataset_dict['file_name']}' is {width} x {height}: make the annotation anew from the right picture"
        )
    segments = [segment for segment in dataset_dict["segments_info"] if not segment.get("iscrowd", 0)]
    classes = np.array([segment["category_id"] for segment in segments], dtype=np.int64)
    ids = np.array([segment["id"] for segment in segments], dtype=np.uint32)
    numbers, wanted = _augmented_numbers(pixels, ids, transforms)
    numbers = np.where(padding, numbers.dtype.type(0), numbers)  # which is no segment
    kept = _occur(wanted, numbers)
    return classes[kept], numbers == wanted[kept, np.newaxis, np.newaxis]


def _occur(values: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """For each of the values (N), whether one of the pixels (H, W) has it: crops remove many, whose masks cost time."""
    if pixels.dtype == np.uint8:
        return cv2.calcHist([pixels], [0], None, [256], [0, 256]).ravel()[values] > 0
    return np.isin(values, pixels)


def _augmented_numbers(
    pixels: np.ndarray, ids: np.ndarray, transforms: T.TransformList
) -> tuple[np.ndarray, np.ndarray]:
    """The augmented panoptic picture as one number a pixel (H, W), and which number each of the ids (N) has.

    Labels are never mixed, so the transforms move a number of one byte to where they would move an id's three.
    """
    if len(ids) > _MOST_NUMBERS:
        return ids_from_rgb(transforms.apply_segmentation(pixels)), ids
    found = ids_from_rgb(pixels)
    number_of_pixel = np.zeros(found.shape, dtype=np.uint8)
    numbers = np.arange(1, len(ids) + 1, dtype=np.uint8)
    for number, segment_id in zip(numbers, ids, strict=True):
        number_of_pixel |= (found == segment_id).view(np.uint8) * number  # many pixels at a time: there is no branch
    return transforms.apply_segmentation(number_of_pixel), numbers


# ---------------------------------------------------------------------------------------------- semantic


def read_semantic(
    dataset_dict: dict[str, Any], transforms: T.TransformList, padding: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reader of semantic label maps: one mask for each class in the picture, in the order of the class ids.

    Raises ``UserError`` if the picture has no label map, and ``ValueError`` if the mapper was not told to read it.
    """
    if "sem_seg_file_name" not in dataset_dict:
        raise UserError(
            f"picture '{dataset_dict['file_name']}' has no semantic annotation ('sem_seg_file_name'), which this "
            "mapper reads: choose another INPUT.DATASET_MAPPER_NAME or data set"
        )
    if "sem_seg" not in dataset_dict:
        raise ValueError("read_semantic needs a mapper with label_map=True")
    labels = dataset_dict["sem_seg"]
    counts = np.bincount((labels + 1).ravel())  # the first counts pixels without a label
    classes = np.flatnonzero(counts[1:])
    # Numbers of two bytes are compared four times as fast as those of eight.
    dtype = np.int16 if len(counts) < np.iinfo(np.int16).max else np.int64
    return classes, labels.astype(dtype) == classes.astype(dtype)[:, np.newaxis, np.newaxis]
