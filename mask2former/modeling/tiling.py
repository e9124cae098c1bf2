"""Inference in overlapping tiles: pictures of any size in bounded memory, objects at the scale trained on.

Letters: ``N`` instances, ``Q`` queries, ``K`` classes; ``H`` and ``W`` are the size of the results.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from ..ops import MaskStrip
from ..structures import CroppedMasks
from .inference import InferenceSettings, instance_candidates, mask_quality
from .predictions import Predictions
from .tile_merging import TileInstances, Window, merge_tiles

__all__ = ["TiledInference", "tile_windows"]


def tile_windows(size: tuple[int, int], tile_size: int, overlap: int) -> list[Window]:
    """Windows of ``tile_size`` that cover (height, width), neighbours sharing at least ``overlap`` pixels."""
    height, width = size
    return [
        Window(y, x, min(y + tile_size, height), min(x + tile_size, width))
        for y in _starts(height, tile_size, overlap)
        for x in _starts(width, tile_size, overlap)
    ]


def _starts(length: int, tile_size: int, overlap: int) -> list[int]:
    if length <= tile_size:
        return [0]
    steps = math.ceil((length - tile_size) / (tile_size - overlap))
    return [round(step * (length - tile_size) / steps) for step in range(steps + 1)]


class TiledInference:
    """Collects the predictions of a picture's tiles and makes results of them.

    Args:
        input_size: (height, width) of the picture that is cut into tiles.
        size: (height, width) of the results.
        settings: what is made.
    """

    def __init__(self, input_size: tuple[int, int], size: tuple[int, int], settings: InferenceSettings) -> None:
        self.input_size = input_size
        self.size = size
        self.settings = settings
        self._found: list[TileInstances] = []
        self._semantic: _SemanticMean | None = None

    def add(self, tile: Window, predictions: Predictions, image: int, padded_size: tuple[int, int]) -> None:
        """Take in one tile; they come from top to bottom, as :func:`tile_windows` has them.

        Args:
            tile: where it lies in the input.
            predictions: of a batch of tiles.
            image: index of the tile in the batch.
            padded_size: (height, width) of the batch.
        """
        window = self._window_in_results(tile)
        if window.y0 >= window.y1 or window.x0 >= window.x1:
            return
        grid = self._grid(tile, window, padded_size, predictions.class_logits.device)
        class_logits = predictions.class_logits[-1, image].float()
        logits = F.grid_sample(
            predictions.mask_logits(-1, image)[None], grid[None], padding_mode="border", align_corners=False
        )[0]  # (Q, h, w)
        strip = MaskStrip.whole(logits)
        if self.settings.semantic_on or self.settings.panoptic_on:
            class_probabilities = class_logits.softmax(-1)[:, :-1].T
            scores = logits.new_empty(len(class_probabilities), *logits.shape[1:])
            strip.write_class_scores(class_probabilities, scores)
            self._add_semantic(tile, window, scores.cpu())
        if self.settings.instance_on or self.settings.panoptic_on:
            self._found.append(self._find_instances(window, class_logits, strip))

    def results(self) -> dict[str, Any]:
        """Results as :func:`inference.postprocess` describes them, ``pred_masks`` a ``CroppedMasks``."""
        results: dict[str, Any] = {}
        found = merge_tiles(self._found, self.settings.mask_nms_threshold) if self._found else None
        if self._semantic is not None:
            self._semantic.finish()
        if self.settings.semantic_on and self._semantic is not None:
            labels = self.settings.semantic_labels
            results["sem_seg"] = self._semantic.best()[1] if labels else self._semantic.scores()
        if self.settings.panoptic_on and found is not None:
            results["panoptic_seg"] = self._panoptic(found)
        if self.settings.instance_on and found is not None:
            results["instances"] = self._instances(found[found.scores >= self.settings.instance_score_threshold])
        return results

    def _window_in_results(self, tile: Window) -> Window:
        """Pixels of the results whose centres lie in a tile."""
        bounds = []
        for axis, (start, stop) in enumerate([(tile.y0, tile.y1), (tile.x0, tile.x1)]):
            scale = self.size[axis] / self.input_size[axis]
            bounds.append((math.ceil(start * scale - 0.5), min(math.ceil(stop * scale - 0.5), self.size[axis])))
        (y0, y1), (x0, x1) = bounds
        return Window(max(y0, 0), max(x0, 0), y1, x1)

    def _grid(self, tile: Window, window: Window, padded_size: tuple[int, int], device: torch.device) -> Tensor:
        """Where the window's pixels lie in the tile, as ``grid_sample`` wants it: (h, w, 2) of (x, y) in [-1, 1]."""
        axes = []
        for axis, (start, stop, offset) in enumerate(
            [(window.y0, window.y1, tile.y0), (window.x0, window.x1, tile.x0)]
        ):
            scale = self.input_size[axis] / self.size[axis]
            centres = (torch.arange(start, stop, device=device) + 0.5) * scale - offset
            axes.append(2 * centres / padded_size[axis] - 1)
        y, x = axes
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)

    def _add_semantic(self, tile: Window, window: Window, scores: Tensor) -> None:
        """Add a tile's scores, with less weight towards its inner borders."""
        if self._semantic is None:
            keep_scores = self.settings.semantic_on and not self.settings.semantic_labels
            self._semantic = _SemanticMean(len(scores), self.size, keep_scores)
        height, width = self.size
        rows = self._ramp(window.y0, window.y1, height, tile.y1 - tile.y0)
        columns = self._ramp(window.x0, window.x1, width, tile.x1 - tile.x0)
        self._semantic.add(window, scores, rows[:, None] * columns)

    def _ramp(self, start: int, stop: int, length: int, tile_length: int) -> Tensor:
        """Weights in (0, 1] that rise over the overlap from the window's inner ends."""
        position = torch.arange(start, stop) + 0.5
        width = max((stop - start) * self.settings.tile_overlap / tile_length, 1.0)
        weights = torch.ones(stop - start)
        if start > 0:
            weights = torch.minimum(weights, (position - start) / width)
        if stop < length:
            weights = torch.minimum(weights, (stop - position) / width)
        return weights

    def _find_instances(self, window: Window, class_logits: Tensor, strip: MaskStrip) -> TileInstances:
        candidates = instance_candidates(class_logits, self.settings)
        queries = candidates.queries
        masks = torch.empty(len(queries), *strip.maps.shape[1:], dtype=torch.bool, device=queries.device)
        inside = strip.write_binary_masks(queries, masks)
        scores = candidates.scores * mask_quality(inside)[queries]
        likely = (inside.area[queries] > 0) & (scores >= self.settings.instance_score_threshold)
        masks = masks[likely]
        height, width = self.size
        cut = torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
        for inner, line in [
            (window.y0 > 0, masks[:, 0]),
            (window.y1 < height, masks[:, -1]),
            (window.x0 > 0, masks[:, :, 0]),
            (window.x1 < width, masks[:, :, -1]),
        ]:
            if inner:
                cut |= line.any(1)
        crops = CroppedMasks.from_masks(masks).to("cpu")
        corners = [(y + window.y0, x + window.x0) for y, x in crops.corners]
        return TileInstances(
            CroppedMasks(crops.crops, corners, self.size),
            candidates.classes[likely].cpu(),
            candidates.scores[likely].cpu(),
            scores[likely].cpu(),
            cut.cpu(),
            [window] * len(masks),
        )

    def _instances(self, found: TileInstances) -> Instances:
        result = Instances(self.size)
        result.pred_masks = found.masks
        result.pred_boxes = found.masks.boxes()
        result.scores = found.scores
        result.pred_classes = found.classes
        return result

    def _panoptic(self, found: TileInstances) -> tuple[Tensor, list[dict[str, Any]]]:
        """Things from the instances, best first; stuff from the semantic scores where no thing is."""
        assert self._semantic is not None
        panoptic = torch.zeros(self.size, dtype=torch.int32)
        segments: list[dict[str, Any]] = []
        for index, (category, score) in enumerate(
            zip(found.classes.tolist(), found.class_scores.tolist(), strict=True)
        ):
            if score <= self.settings.object_mask_threshold or not self.settings.is_thing(category):
                continue
            crop = found.masks.crops[index]
            y, x = found.masks.corners[index]
            region = panoptic[y : y + crop.shape[0], x : x + crop.shape[1]]
            visible = crop & (region == 0)
            area = int(visible.sum())
            if area == 0 or area / int(crop.sum()) < self.settings.overlap_threshold:
                continue
            segments.append({"id": len(segments) + 1, "isthing": True, "category_id": category, "score": score})
            region[visible] = len(segments)
        best, winner = self._semantic.best()
        free = panoptic == 0
        for category in winner[free].unique().tolist():
            if self.settings.is_thing(category):
                continue
            area = free & (winner == category)
            score = min(best[area].mean().item(), 1.0)
            segments.append({"id": len(segments) + 1, "isthing": False, "category_id": category, "score": score})
            panoptic[area] = len(segments)
        return panoptic, segments


class _SemanticMean:
    """Weighted mean of the class scores of tiles.

    Where only best classes are asked for, scores are kept for those rows alone that tiles still reach: these come from
    top to bottom.

    Args:
        num_classes: K.
        size: (height, width) of the picture.
        keep_scores: whether all scores are kept.
    """

    def __init__(self, num_classes: int, size: tuple[int, int], keep_scores: bool) -> None:
        self._keep_scores = keep_scores
        self._start = 0  # the first row of the sums
        rows = size[0] if keep_scores else 0
        self._sums = torch.zeros(num_classes, rows, size[1])
        self._weights = torch.zeros(rows, size[1])
        if not keep_scores:
            self._best = torch.zeros(size)
            self._labels = torch.zeros(size, dtype=torch.int32)

    def add(self, window: Window, scores: Tensor, weights: Tensor) -> None:
        """Add scores (K, h, w) in a window of the picture with weights (h, w)."""
        if not self._keep_scores:
            self._move(window.y0, window.y1)
        region = (slice(window.y0 - self._start, window.y1 - self._start), slice(window.x0, window.x1))
        self._sums[(slice(None), *region)] += scores * weights
        self._weights[region] += weights

    def finish(self) -> None:
        """Take the mean; all tiles are there."""
        if self._keep_scores:
            self._sums /= self._weights
        else:
            self._complete(len(self._weights))

    def scores(self) -> Tensor:
        """Mean scores (K, H, W), if they were kept."""
        return self._sums

    def best(self) -> tuple[Tensor, Tensor]:
        """The highest mean score (H, W) and its class (H, W) int32, the first of equal ones."""
        if not self._keep_scores:
            return self._best, self._labels
        best, labels = self._sums.max(0)
        return best, labels.int()

    def _move(self, start: int, stop: int) -> None:
        """Make the sums those of rows from ``start`` to ``stop`` or further; rows above ``start`` are complete."""
        if start < self._start:
            raise ValueError(f"tiles must come from top to bottom, but one starts at row {start}, above {self._start}")
        complete, missing = start - self._start, stop - self._start - len(self._weights)
        if not complete and missing <= 0:
            return
        self._complete(complete)
        padding = (0, 0, 0, max(missing, 0))
        self._sums = F.pad(self._sums[:, complete:], padding)
        self._weights = F.pad(self._weights[complete:], padding)
        self._start = start

    def _complete(self, rows: int) -> None:
        """Find the best classes of the first rows of the sums."""
        done = slice(self._start, self._start + rows)
        self._best[done], self._labels[done] = (self._sums[:, :rows] / self._weights[:rows]).max(0)
