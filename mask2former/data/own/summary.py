"""What is in the user's own data: counted while they are checked, told before the first step."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..datasets.catalog import Category

__all__ = ["Tally"]

# More classes than this are told by their number, and the rarest.
_MOST_LINES = 40
_MOSTLY_IGNORED = 0.5


@dataclass
class Tally:
    """Counts over the pictures of one split.

    Objects are instances or panoptic segments; in semantic data, the area of one class in one picture.
    """

    pictures: int = 0
    empty: list[str] = field(default_factory=list)
    objects: Counter[int] = field(default_factory=Counter)  # by contiguous class id
    pixels: Counter[int] = field(default_factory=Counter)
    all_pixels: int = 0
    # (pixels, text)
    small_picture: tuple[int, str] | None = None
    large_picture: tuple[int, str] | None = None
    small_object: tuple[int, str] | None = None
    large_object: tuple[int, str] | None = None
    warnings: list[str] = field(default_factory=list)

    def add(self, name: str, size: tuple[int, int], objects: Iterable[tuple[int, int]]) -> None:
        """Count a picture of ``size`` (height, width) with ``objects``: contiguous class id and area in pixels."""
        height, width = size
        self.pictures += 1
        self.all_pixels += height * width
        text = (height * width, f"{width} x {height} ('{name}')")
        self.small_picture = min(self.small_picture or text, text)
        self.large_picture = max(self.large_picture or text, text)
        empty = True
        for class_id, area in objects:
            empty = False
            self.objects[class_id] += 1
            self.pixels[class_id] += area
            item = (area, f"{area} pixels (in '{name}')")
            self.small_object = min(self.small_object or item, item)
            self.large_object = max(self.large_object or item, item)
        if empty:
            self.empty.append(name)

    def lines(self, split: str, form: str, classes: Sequence[Category]) -> list[str]:
        """The summary, with warnings at its end."""
        noun = {"semantic": "areas", "panoptic": "segments"}.get(form, "objects")
        count = sum(self.objects.values())
        of_classes = "one class" if len(classes) == 1 else f"{len(classes)} classes"
        lines = [f"{split}: {self.pictures} pictures, {count} {noun} of {of_classes}, read as {form}"]
        lines += [f"  {line}" for line in self._class_lines(form, noun, classes)]
        if self.small_picture and self.large_picture:
            lines.append(f"  smallest picture {self.small_picture[1]}, largest {self.large_picture[1]}")
        if self.small_object and self.large_object:
            lines.append(f"  smallest {noun[:-1]} {self.small_object[1]}, largest {self.large_object[1]}")
        if self.empty:
            lines.append(f"  {len(self.empty)} pictures have no {noun}, the first is '{self.empty[0]}'")
        return lines + [f"  warning: {text}" for text in [*self.warnings, *self._find_warnings(form, classes)]]

    def _class_lines(self, form: str, noun: str, classes: Sequence[Category]) -> list[str]:
        rows = [(self.objects[index], index, category) for index, category in enumerate(classes)]
        skipped = sum(row[0] > 0 for row in rows) - _MOST_LINES
        if skipped > 0:
            rows = sorted((row for row in rows if row[0]), key=lambda row: row[:2])[:_MOST_LINES]
        lines = []
        for count, index, category in rows:
            share = f", {100 * self.pixels[index] / max(self.all_pixels, 1):.1f} % of the pixels"
            value = f"#{index} (in the files {category['id']})" if category["id"] != index else f"#{index}"
            lines.append(f"{value} {category['name']}: {count} {noun}{'' if form == 'instances' else share}")
        return lines + ([f"({skipped} more classes are more frequent than these)"] if skipped > 0 else [])

    def _find_warnings(self, form: str, classes: Sequence[Category]) -> list[str]:
        warnings = []
        absent = [category["name"] for index, category in enumerate(classes) if not self.objects[index]]
        if absent:
            warnings.append(f"{len(absent)} classes occur nowhere: {', '.join(absent[:8])}{' ...' * (len(absent) > 8)}")
        if form == "semantic" and len(classes) - len(absent) == 1:
            warnings.append("one class is left: each pixel is of it or ignored, so there is nothing to learn")
        if form != "instances" and self.all_pixels:
            ignored = 1 - sum(self.pixels.values()) / self.all_pixels
            if ignored > _MOSTLY_IGNORED:
                warnings.append(f"{100 * ignored:.0f} % of the pixels have no label and are ignored")
        return warnings
