"""From the instances of overlapping tiles to those of the picture, each once.

An object that lies whole in a tile is taken from there. One that an inner border of tiles cuts is known
only in parts: parts that agree where their tiles overlap are joined, and a part that a whole object
covers already is left out.

Letters: ``N`` instances.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..structures import CroppedMasks
from .mask_nms import NearbyMasks, intersection, mask_iou, suppress

__all__ = ["TileInstances", "Window", "merge_tiles"]

AGREEMENT = 0.5  # IoU from which two tiles are taken to show one object
CONTAINMENT = 0.5  # a part of which a whole object covers more than this share is left out


@dataclass(frozen=True)
class Window:
    """Rows y0 to y1 and columns x0 to x1, ends exclusive, in pixels."""

    y0: int
    x0: int
    y1: int
    x1: int

    def cut(self, mask: Tensor, corner: tuple[int, int]) -> Tensor:
        """The part of a crop with this top left (y, x) that lies in the window, at the window's size."""
        inside = torch.zeros(max(self.y1 - self.y0, 0), max(self.x1 - self.x0, 0), dtype=torch.bool)
        y, x = corner
        y0, x0 = max(self.y0, y), max(self.x0, x)
        y1, x1 = min(self.y1, y + mask.shape[0]), min(self.x1, x + mask.shape[1])
        if y0 < y1 and x0 < x1:
            region = (slice(y0 - self.y0, y1 - self.y0), slice(x0 - self.x0, x1 - self.x0))
            inside[region] = mask[y0 - y : y1 - y, x0 - x : x1 - x]
        return inside

    def __and__(self, other: "Window") -> "Window":
        """What two windows share; y0 >= y1 or x0 >= x1 where it is nothing."""
        return Window(max(self.y0, other.y0), max(self.x0, other.x0), min(self.y1, other.y1), min(self.x1, other.x1))


@dataclass
class TileInstances:
    """Instances found in tiles.

    Attributes:
        masks: N masks, in pixels of the results.
        classes: (N) contiguous class ids.
        class_scores: (N) probability of the class.
        scores: (N) class score x mask quality.
        cut: (N) bool, True where the mask touches an inner border of its tile.
        windows: the tile of each, in pixels of the results.
    """

    masks: CroppedMasks
    classes: Tensor
    class_scores: Tensor
    scores: Tensor
    cut: Tensor
    windows: list[Window]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Tensor) -> "TileInstances":
        return TileInstances(
            self.masks[index],
            self.classes[index],
            self.class_scores[index],
            self.scores[index],
            self.cut[index],
            [self.windows[i] for i in torch.arange(len(self))[index].tolist()],
        )

    @staticmethod
    def cat(parts: Sequence["TileInstances"]) -> "TileInstances":
        """Put the instances of several tiles of one picture together."""
        return TileInstances(
            CroppedMasks.cat([part.masks for part in parts]),
            torch.cat([part.classes for part in parts]),
            torch.cat([part.class_scores for part in parts]),
            torch.cat([part.scores for part in parts]),
            torch.cat([part.cut for part in parts]),
            [window for part in parts for window in part.windows],
        )

    def best_first(self) -> "TileInstances":
        """In order of score."""
        return self[self.scores.argsort(descending=True, stable=True)]


def merge_tiles(tiles: Sequence[TileInstances], nms_threshold: float) -> TileInstances:
    """The picture's instances, each once, best first.

    Args:
        tiles: the instances of each tile.
        nms_threshold: within a tile, an instance that overlaps a better one of its class by more than
            this IoU is left out; 1 or more: none.
    """
    found = TileInstances.cat(tiles).best_first()
    whole, parts = found[~found.cut], found[found.cut]
    whole = _leave_out_duplicates(whole, nms_threshold, across_tiles=min(nms_threshold, AGREEMENT))
    parts = _leave_out_duplicates(parts, nms_threshold, across_tiles=1.0)
    joined = _join_parts(parts).best_first()
    return _leave_out_covered(whole, joined).best_first()


def _leave_out_duplicates(found: TileInstances, within_tile: float, across_tiles: float) -> TileInstances:
    """Mask NMS with one IoU threshold within a tile and another between tiles."""
    areas = found.masks.areas().tolist()

    def excess(better: int, worse: int) -> float:
        same_tile = found.windows[better] == found.windows[worse]
        return mask_iou(found.masks, areas, better, worse) - (within_tile if same_tile else across_tiles)

    return found[suppress(found.masks, found.classes, excess, 0.0)]


def _leave_out_covered(whole: TileInstances, parts: TileInstances) -> TileInstances:
    """Whole instances, and those parts that none of them nor a better part covers."""
    everything = TileInstances.cat([whole, parts])
    areas = everything.masks.areas().tolist()

    def covered(better: int, worse: int) -> float:
        if worse < len(whole):
            return 0.0
        return intersection(everything.masks, better, worse) / max(areas[worse], 1)

    return everything[suppress(everything.masks, everything.classes, covered, CONTAINMENT)]


def _join_parts(parts: TileInstances) -> TileInstances:
    """Join parts of one class that agree where their tiles overlap."""
    if not len(parts):
        return parts
    earlier = NearbyMasks(parts.masks, parts.classes)
    pairs = []
    for second in range(len(parts)):
        pairs += [(first, second) for first in earlier.near(second) if _agree(parts, first, second)]
        earlier.add(second)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(_connected(len(parts), pairs)):
        members.setdefault(group, []).append(index)
    return TileInstances.cat([_union(parts[torch.tensor(indices)]) for indices in members.values()])


def _connected(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """For each of ``count`` indices a number, the same for two that pairs connect, if only through others."""
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    graph = coo_array(([True] * len(pairs), (first, second)), shape=(count, count))
    return connected_components(graph, directed=False)[1].tolist()


def _agree(parts: TileInstances, i: int, j: int) -> bool:
    """Whether two parts are from different tiles and much the same where these overlap."""
    if parts.windows[i] == parts.windows[j]:
        return False
    shared = parts.windows[i] & parts.windows[j]
    if shared.y0 >= shared.y1 or shared.x0 >= shared.x1:
        return False
    first, second = (shared.cut(parts.masks.crops[k], parts.masks.corners[k]) for k in (i, j))
    union = int((first | second).sum())
    return union > 0 and int((first & second).sum()) / union >= AGREEMENT


def _union(parts: TileInstances) -> TileInstances:
    """One instance of several parts; the best part's class score, and scores weighted by area."""
    if len(parts) == 1:
        return parts
    corners = parts.masks.corners
    y0, x0 = min(y for y, _ in corners), min(x for _, x in corners)
    y1 = max(y + crop.shape[0] for crop, (y, _) in zip(parts.masks.crops, corners, strict=True))
    x1 = max(x + crop.shape[1] for crop, (_, x) in zip(parts.masks.crops, corners, strict=True))
    window = Window(y0, x0, y1, x1)
    mask = torch.zeros(y1 - y0, x1 - x0, dtype=torch.bool)
    for crop, corner in zip(parts.masks.crops, corners, strict=True):
        mask |= window.cut(crop, corner)
    areas = parts.masks.areas().to(parts.scores.dtype)
    return TileInstances(
        CroppedMasks([mask], [(y0, x0)], parts.masks.size),
        parts.classes[:1],
        parts.class_scores.max()[None],
        ((parts.scores * areas).sum() / areas.sum())[None],
        parts.cut[:1],
        [window],
    )
