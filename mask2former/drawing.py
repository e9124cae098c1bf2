"""Pictures of a model's outputs: regions painted over the picture, names and scores written by Detectron2's visualizer.

The visualizer alone would draw every region as a vector outline, and every name wherever its object is. Here
regions are painted as pixels, so the time depends on the picture's size and not on how ragged the
regions are, holes stay holes, and a name is written only where there is room for it.

Coordinates are (x, y) in pixels of the drawn picture; boxes are (x0, y0, x1, y1) with exclusive ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

from .results import Classes, Labels, Region, instance_regions, label_regions, semantic_labels

__all__ = ["OUTPUT_KINDS", "Palette", "Picture", "draw", "draw_instances", "draw_panoptic", "draw_semantic"]

RGB = tuple[int, int, int]
Picture = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

# What :func:`draw` calls the pictures that it makes.
OUTPUT_KINDS = ("instances", "panoptic", "semantic")

# Small pictures are drawn larger, by a whole factor, up to about this many pixels for the longer side.
LEGIBLE_SIDE = 800
LARGEST_FACTOR = 4
# With more objects than this, a name is written only where it fits inside its object.
CROWD = 25
# Pixels around a label's text.
LABEL_MARGIN = 2
OBJECT_ALPHA = 0.45
STUFF_ALPHA = 0.55
EDGE: RGB = (255, 255, 240)


class Palette:
    """Colours that tell objects apart. In a video, one palette for all frames lets an object keep its colour."""

    # An object is the one of the previous picture whose box it overlaps by more than this IoU.
    SAME_OBJECT = 0.5

    def __init__(self) -> None:
        colors = colormap(rgb=True, maximum=255).astype(int)
        bright = colors @ (0.299, 0.587, 0.114) >= 90
        vivid = bright & (colors.max(axis=1) - colors.min(axis=1) >= 100)
        self._colors: list[RGB] = [(int(r), int(g), int(b)) for r, g, b in colors[vivid]]
        self._boxes = Boxes(torch.zeros(0, 4))
        self._indices: list[int] = []
        self._next = 0

    def __getitem__(self, index: int) -> RGB:
        """A colour for any number, 0 to 255 in each channel."""
        return self._colors[index % len(self._colors)]

    def for_objects(self, regions: Sequence[Region]) -> list[RGB]:
        """A colour for each object of the next picture."""
        current = Boxes(torch.tensor([region.box for region in regions], dtype=torch.float32).reshape(-1, 4))
        overlap = pairwise_iou(current, self._boxes)
        indices = []
        for row in overlap:
            best = int(row.argmax()) if len(row) else -1
            if best >= 0 and row[best] > self.SAME_OBJECT:
                overlap[:, best] = 0
                indices.append(self._indices[best])
            else:
                indices.append(self._next)
                self._next += 1
        self._boxes, self._indices = current, indices
        return [self[index] for index in indices]


def draw(
    image: Picture,
    outputs: Mapping[str, Any],
    metadata: Metadata,
    *,
    palette: Palette | None = None,
    labels: bool = True,
) -> Iterator[tuple[str, Picture]]:
    """Draw every output that is there: pairs of its name (instances, panoptic, semantic) and an RGB picture.

    Args:
        image: the picture, (H, W, 3) uint8 in RGB order.
        outputs: what the model gave for it, at its size.
        metadata: of the data set whose classes the model has: names and colours.
        palette: what gives objects their colours; hand the same one in for each frame of a video.
        labels: write names and scores.

    The drawn pictures are a whole factor (1 to 4) larger where ``image`` is small.
    """
    if "instances" in outputs:
        yield "instances", draw_instances(image, outputs["instances"], metadata, palette=palette, labels=labels)
    if "panoptic_seg" in outputs:
        panoptic_seg, segments_info = outputs["panoptic_seg"]
        yield "panoptic", draw_panoptic(image, panoptic_seg, segments_info, metadata, palette=palette, labels=labels)
    if "sem_seg" in outputs:
        yield "semantic", draw_semantic(image, semantic_labels(outputs["sem_seg"]), metadata, labels=labels)


def draw_instances(
    image: Picture, instances: Instances, metadata: Metadata, *, palette: Palette | None = None, labels: bool = True
) -> Picture:
    """Paint each instance in a colour of its own, the large ones first, with class and, if it has one, score.

    As :func:`draw`.
    """
    classes, canvas = Classes.of(metadata), _Canvas(image)
    regions = instance_regions(instances)
    colors = (palette or Palette()).for_objects(regions)
    for index in sorted(range(len(regions)), key=lambda index: -regions[index].area):
        name = classes.name(int(instances.pred_classes[index]))
        text = f"{name} {float(instances.scores[index]):.0%}" if instances.has("scores") else name
        canvas.paint_object(regions[index], colors[index], text, name)
    return canvas.finish(labels)


def draw_panoptic(
    image: Picture,
    panoptic_seg: torch.Tensor,
    segments_info: Sequence[Mapping[str, Any]],
    metadata: Metadata,
    *,
    palette: Palette | None = None,
    labels: bool = True,
) -> Picture:
    """Paint stuff in its class's colour and each thing in one of its own. As :func:`draw`."""
    classes, canvas, palette = Classes.of(metadata), _Canvas(image), palette or Palette()
    segment_ids = panoptic_seg.cpu().numpy()
    stuff = {segment["id"]: segment["category_id"] for segment in segments_info if not segment["isthing"]}
    things = {segment["id"]: segment for segment in segments_info if segment["isthing"]}

    canvas.paint_labels(segment_ids, stuff, classes, palette)
    objects = [(things[value], region) for value, region in label_regions(segment_ids) if value in things]
    colors = palette.for_objects([region for _, region in objects])
    for (segment, region), color in zip(objects, colors, strict=True):
        name = classes.name(segment["category_id"])
        text = f"{name} {segment['score']:.0%}" if "score" in segment else name
        canvas.paint_object(region, color, text, name)
    return canvas.finish(labels)


def draw_semantic(
    image: Picture, class_ids: Labels, metadata: Metadata, *, labels: bool = True, ignore_label: int | None = None
) -> Picture:
    """Paint each pixel in the colour of its class. As :func:`draw`.

    Args:
        class_ids: (H, W), contiguous, none negative.
        ignore_label: pixels with this in place of a class stay as they are.
    """
    canvas = _Canvas(image)
    painted = {int(i): int(i) for i in _present(class_ids) if i != ignore_label}
    canvas.paint_labels(class_ids, painted, Classes.of(metadata), Palette())
    return canvas.finish(labels)


def _present(labels: Labels) -> Labels:
    return np.flatnonzero(np.bincount(labels.ravel()))


def _class_color(classes: Classes, class_id: int, palette: Palette) -> RGB:
    return classes.colors[class_id] if class_id < len(classes.colors) else palette[class_id]


@dataclass(frozen=True)
class _Label:
    text: str
    box: Box
    # The point of the region that is farthest from its border.
    center: tuple[float, float]
    color: RGB
    is_object: bool


class _Canvas:
    """A picture that regions are painted on, and labels remembered for."""

    def __init__(self, image: Picture) -> None:
        height, width = image.shape[:2]
        self.factor = min(max(LEGIBLE_SIDE // max(height, width), 1), LARGEST_FACTOR)
        size = (width * self.factor, height * self.factor)
        self.pixels = np.array(cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
        self._labels: list[_Label] = []
        self._counts: dict[str, int] = {}

    def paint_labels(self, labels: Labels, class_ids: Mapping[int, int], classes: Classes, palette: Palette) -> None:
        """Paint the pixels whose value in ``labels`` (H, W, none negative) has an entry in ``class_ids``."""
        table = np.zeros((int(labels.max()) + 1, 3), dtype=np.uint8)
        painted = np.zeros(len(table), dtype=bool)
        for value, region in label_regions(labels):
            if value in class_ids:
                color = _class_color(classes, class_ids[value], palette)
                table[value], painted[value] = color, True
                self._remember(region, classes.name(class_ids[value]), color, is_object=False)

        large = labels.repeat(self.factor, axis=0).repeat(self.factor, axis=1) if self.factor > 1 else labels
        inside = painted[large]
        blended = cv2.addWeighted(self.pixels, 1 - STUFF_ALPHA, table[large], STUFF_ALPHA, 0)
        self.pixels[inside] = blended[inside]
        edges = np.zeros_like(inside)
        edges[:, 1:] |= (large[:, 1:] != large[:, :-1]) & inside[:, 1:] & inside[:, :-1]
        edges[1:] |= (large[1:] != large[:-1]) & inside[1:] & inside[:-1]
        self.pixels[edges] = EDGE

    def paint_object(self, region: Region, color: RGB, text: str, name: str) -> None:
        """Paint one region and its outline; its label is ``text``, and it counts as a ``name``."""
        if not region.area:
            return
        self._remember(region, text, color, is_object=True)
        self._counts[name] = self._counts.get(name, 0) + 1

        x0, y0, x1, y1 = (side * self.factor for side in region.box)
        # Interpolated, so that an enlarged outline is smooth; the frame lets erosion see the mask's end.
        grown = cv2.resize(region.mask.astype(np.float32), (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        mask = grown >= 0.5
        inner = cv2.erode(np.pad(mask.astype(np.uint8), 1), np.ones((3, 3), np.uint8))[1:-1, 1:-1].astype(bool)
        part = self.pixels[y0:y1, x0:x1]
        tinted = cv2.addWeighted(part, 1 - OBJECT_ALPHA, np.full_like(part, color), OBJECT_ALPHA, 0)
        part[mask] = tinted[mask]
        part[mask & ~inner] = color

    def finish(self, labels: bool) -> Picture:
        """The picture, with the labels written if asked for."""
        if not labels:
            return self.pixels
        visualizer = Visualizer(self.pixels)
        writer = _Writer(visualizer)
        crowded = sum(label.is_object for label in self._labels) > CROWD
        for label in sorted(self._labels, key=lambda label: label.is_object):
            writer.write(label, inside_only=crowded and label.is_object)
        if crowded:
            writer.write_note(", ".join(f"{count} {name}" for name, count in self._counts.items()))
        return visualizer.output.get_image()

    def _remember(self, region: Region, text: str, color: RGB, *, is_object: bool) -> None:
        """Keep what is needed to label the region later."""
        # A coarse look is enough to find the region's middle.
        step = max(max(region.mask.shape) // 256, 1)
        depth = cv2.distanceTransform(np.pad(region.mask[::step, ::step].astype(np.uint8), 1), cv2.DIST_L2, 3)
        row, column = (int(index) for index in np.unravel_index(depth.argmax(), depth.shape))
        x0, y0, x1, y1 = (float(side * self.factor) for side in region.box)
        # Half a pixel on to the pixel's middle, one back for the frame.
        center = (x0 + (column - 0.5) * step * self.factor, y0 + (row - 0.5) * step * self.factor)
        self._labels.append(_Label(text, (x0, y0, x1, y1), center, color, is_object))


class _Writer:
    """Writes labels where they cover no other label and stay within the picture."""

    def __init__(self, visualizer: Visualizer) -> None:
        self._visualizer = visualizer
        self._axes = visualizer.output.ax
        self._renderer = visualizer.output.canvas.get_renderer()
        self._width, self._height = visualizer.output.width, visualizer.output.height
        # In points: about 11 pixels in pictures of up to 900 pixels, more in larger ones.
        self._font_size = max((self._width * self._height) ** 0.5 / 110, 8)
        self._written: list[Box] = []

    def write(self, label: _Label, *, inside_only: bool) -> None:
        """Write the label at the first place that suits it, or nowhere."""
        color = np.array(label.color) / 255
        lighter = color + (1 - color) * 0.5
        self._visualizer.draw_text(label.text, (0, 0), color=lighter, font_size=self._font_size)
        text = self._axes.texts[-1]
        extent = text.get_window_extent(self._renderer)
        # The black box reaches beyond the text, which hangs down from the middle of its upper end.
        width, height = extent.width + 2 * LABEL_MARGIN, extent.height + 2 * LABEL_MARGIN
        for box in _places(label, width, height, inside_only=inside_only):
            if self._is_free(box):
                self._written.append(box)
                text.set_position(((box[0] + box[2]) / 2, box[1] + LABEL_MARGIN))
                return
        text.remove()

    def write_note(self, text: str) -> None:
        """Write in the upper left corner."""
        self._visualizer.draw_text(
            text, (4, 4), color="w", font_size=self._font_size * 1.2, horizontal_alignment="left"
        )

    def _is_free(self, box: Box) -> bool:
        within = box[0] >= 0 and box[1] >= 0 and box[2] <= self._width and box[3] <= self._height
        return within and not any(_overlap(box, other) for other in self._written)


def _places(label: _Label, width: float, height: float, *, inside_only: bool) -> Iterator[Box]:
    """Boxes of the text's size to try, best first: in the middle of the region, then at its sides."""
    x0, y0, x1, y1 = label.box
    x, y = label.center
    fits = width <= x1 - x0 and 2 * height <= y1 - y0
    if fits or not label.is_object:
        yield (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if inside_only:
        return
    middle = (x0 + x1 - width) / 2
    for left, top in ((middle, y1), (middle, y0 - height), (x1, y0), (x0 - width, y0), (x0, y0), (x - width / 2, y)):
        yield (left, top, left + width, top + height)


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]
