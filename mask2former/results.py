"""A model's outputs as regions of a picture, and as plain data ready for ``json.dump``.

Letters: N instances, K classes, (H, W) the picture, (h, w) the part of it that a region takes. In the data boxes
are [x, y, width, height] in pixels and masks COCO's run lengths, so that pycocotools can read them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import shapely
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from scipy import ndimage

from .ops import best_classes
from .structures import CroppedMasks

__all__ = ["Classes", "Region", "confident", "instance_regions", "label_regions", "semantic_labels", "to_json"]

Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Classes:
    """Names, colours and the data set's ids of a model's classes, by contiguous id.

    The models here number things and stuff in one row, so one list serves every output.
    """

    names: list[str]
    # RGB, 0 to 255; as many as names, or none where the data set has no colours.
    colors: list[tuple[int, int, int]]
    # From the contiguous ids to those of the data set's files, where they are known.
    dataset_ids: dict[int, int]

    @classmethod
    def of(cls, metadata: Metadata) -> "Classes":
        """Read them from a data set's metadata; it may lack any of them."""
        # Where both lists are there, the longer one has all classes: things alone are a part of it.
        kind = max(("stuff", "thing"), key=lambda kind: len(metadata.get(f"{kind}_classes", [])))
        names = list(metadata.get(f"{kind}_classes", []))
        colors = [(r, g, b) for r, g, b in metadata.get(f"{kind}_colors", [])]
        contiguous_ids = {
            **metadata.get("stuff_dataset_id_to_contiguous_id", {}),
            **metadata.get("thing_dataset_id_to_contiguous_id", {}),
        }
        return cls(
            names=names,
            colors=colors if len(colors) == len(names) else [],
            dataset_ids={contiguous: dataset for dataset, contiguous in contiguous_ids.items()},
        )

    def name(self, class_id: int) -> str:
        """The class's name, or its number as text where the data set doesn't name it."""
        return self.names[class_id] if class_id < len(self.names) else str(class_id)

    def describe(self, class_id: int) -> dict[str, Any]:
        """``category_id``, as the data set's files have it, and ``class``, its name."""
        return {"category_id": self.dataset_ids.get(class_id, class_id), "class": self.name(class_id)}


@dataclass(frozen=True)
class Region:
    """Some of a picture's pixels, kept as the part of the picture that they take."""

    mask: npt.NDArray[np.bool_]  # (h, w)
    # The top left corner of the part, in the picture's pixels.
    x: int
    y: int

    @property
    def area(self) -> int:
        """Pixels."""
        return int(np.count_nonzero(self.mask))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) with exclusive ends."""
        height, width = self.mask.shape
        return self.x, self.y, self.x + width, self.y + height

    def rle(self, height: int, width: int) -> dict[str, Any]:
        """COCO's run lengths for a picture of this size, ``counts`` as text."""
        # COCO counts down the columns: the columns of the region alone are looked at, the others are added.
        columns = np.zeros((self.mask.shape[1], height), dtype=np.int8)
        columns[:, self.y : self.y + self.mask.shape[0]] = self.mask.T
        changes = np.flatnonzero(np.diff(columns.ravel(), prepend=0, append=0)) + self.x * height
        changes = changes[changes < height * width]  # the picture's end is no change
        counts = np.diff(changes, prepend=0, append=height * width)
        rle = mask_util.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        return {"size": [height, width], "counts": rle["counts"].decode("ascii")}

    def geojson(self) -> dict[str, Any]:
        """The outline along pixel edges, holes included: a GeoJSON geometry of exactly the region's area.

        Coordinates are (x, y) in pixels from the picture's top left corner, y pointing down.
        """
        # A run of pixels in a row is a rectangle; their union is the outline.
        steps = np.diff(np.pad(self.mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
        rows, starts = np.nonzero(steps == 1)
        ends = np.nonzero(steps == -1)[1]
        rows, starts, ends = rows + self.y, starts + self.x, ends + self.x
        outline = shapely.union_all(shapely.box(starts, rows, ends, rows + 1))
        # With tolerance 0 nothing moves: points in the middle of straight lines go.
        return shapely.geometry.mapping(shapely.simplify(outline, 0))


def instance_regions(instances: Instances) -> list[Region]:
    """The region of each instance, in their order."""
    masks = instances.pred_masks
    cropped = masks if isinstance(masks, CroppedMasks) else CroppedMasks.from_masks(masks)
    return [Region(crop.cpu().numpy(), x, y) for crop, (y, x) in zip(cropped.crops, cropped.corners, strict=True)]


def label_regions(labels: Labels) -> Iterator[tuple[int, Region]]:
    """Each value of ``labels`` (H, W), none negative, with the region that has it, in ascending order."""
    # SciPy takes 0 for the background.
    for value, part in enumerate(ndimage.find_objects(labels + 1)):
        if part is not None:
            rows, columns = part
            yield value, Region(labels[part] == value, columns.start, rows.start)


def semantic_labels(sem_seg: torch.Tensor) -> Labels:
    """The class of each pixel, (H, W): from scores (K, H, W) the best one, labels (H, W) as they are."""
    labels = sem_seg if sem_seg.ndim == 2 else best_classes(sem_seg)
    return labels.cpu().numpy()


def confident(outputs: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The outputs without the instances that score below ``threshold``; the rest is as it was."""
    kept = dict(outputs)
    if "instances" in kept:
        instances = kept["instances"]
        kept["instances"] = instances[instances.scores >= threshold]
    return kept


def to_json(
    outputs: Mapping[str, Any], metadata: Metadata, *, file: str | None = None, polygons: bool = False
) -> dict[str, Any]:
    """Make plain data of what the model gave for one picture.

    Args:
        outputs: ``sem_seg``, ``panoptic_seg`` and ``instances``, as switched on, at the picture's size.
        metadata: of the data set whose classes the model has.
        file: name of the picture, kept under ``file``.
        polygons: add each region's outline as a GeoJSON geometry, see :meth:`Region.geojson`.

    Returns:
        ``file``, ``width``, ``height`` and a list for each output: ``instances`` (best score first),
        ``panoptic`` (segments, with the ``id`` that they have in ``panoptic_seg``) and ``semantic``
        (the classes that are there). An entry has ``category_id``, ``class``, ``area`` in pixels, ``bbox``
        and ``segmentation``; instances and segments have a ``score`` in [0, 1], segments ``isthing``.
    """
    height, width = _picture_size(outputs)
    writer = _Writer(Classes.of(metadata), height, width, polygons)
    document: dict[str, Any] = {"file": file, "width": width, "height": height}
    if "instances" in outputs:
        document["instances"] = writer.instances(outputs["instances"])
    if "panoptic_seg" in outputs:
        document["panoptic"] = writer.segments(*outputs["panoptic_seg"])
    if "sem_seg" in outputs:
        document["semantic"] = writer.classes_present(semantic_labels(outputs["sem_seg"]))
    return document


def _picture_size(outputs: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the picture that the outputs are for."""
    if "instances" in outputs:
        height, width = outputs["instances"].image_size
    elif "panoptic_seg" in outputs:
        height, width = outputs["panoptic_seg"][0].shape
    else:
        height, width = outputs["sem_seg"].shape[-2:]
    return int(height), int(width)


@dataclass(frozen=True)
class _Writer:
    """Makes the lists of :func:`to_json`."""

    classes: Classes
    height: int
    width: int
    polygons: bool

    def instances(self, instances: Instances) -> list[dict[str, Any]]:
        regions = instance_regions(instances)
        return [
            {
                **self.classes.describe(int(instances.pred_classes[index])),
                "score": _rounded(instances.scores[index]),
                **self._describe(regions[index]),
            }
            for index in instances.scores.argsort(descending=True, stable=True).tolist()
        ]

    def segments(self, segment_ids: torch.Tensor, segments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        regions = dict(label_regions(segment_ids.cpu().numpy()))
        return [
            {
                "id": int(segment["id"]),
                **self.classes.describe(int(segment["category_id"])),
                "isthing": bool(segment["isthing"]),
                **({"score": _rounded(segment["score"])} if "score" in segment else {}),
                **self._describe(regions[segment["id"]]),
            }
            for segment in segments
        ]

    def classes_present(self, labels: Labels) -> list[dict[str, Any]]:
        return [
            {**self.classes.describe(class_id), **self._describe(region)} for class_id, region in label_regions(labels)
        ]

    def _describe(self, region: Region) -> dict[str, Any]:
        x0, y0, x1, y1 = region.box
        record: dict[str, Any] = {
            "area": region.area,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": region.rle(self.height, self.width),
        }
        if self.polygons:
            record["polygons"] = region.geojson()
        return record


def _rounded(score: float | torch.Tensor) -> float:
    return round(float(score), 6)
