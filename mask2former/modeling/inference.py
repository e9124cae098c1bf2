"""From the last layer's predictions to semantic, panoptic and instance results (paper, section 4.1).

Letters: ``Q`` queries, ``K`` classes, ``N`` instances; ``H`` and ``W`` are the size asked for.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..errors import UserError
from ..ops import Inside, MaskStrip, best_classes
from ..structures import CroppedMasks, boxes_around
from .mask_nms import mask_nms
from .mask_strips import mask_strips
from .predictions import Predictions

__all__ = ["InferenceSettings", "postprocess"]


@dataclass(frozen=True)
class InferenceSettings:
    """What inference makes, and where it draws the line.

    Attributes:
        semantic_on, panoptic_on, instance_on: which results are made.
        thing_classes: contiguous ids of the classes that are things; None: all.
        object_mask_threshold: panoptic: queries with a lower class score are left out.
        overlap_threshold: panoptic: a segment of which a smaller share is visible is left out.
        resize_before_inference: semantic: resize masks to the output size before they are summed into
            scores. Always so where panoptic or instance results are made.
        semantic_labels: semantic: the class of each pixel in place of the scores of all classes, which are never
            made for the whole picture then.
        max_instances: instances: how many at most, best first.
        instance_score_threshold: instances: those with a lower score are left out.
        mask_nms_threshold: instances: one that overlaps a better one of its class by more than this IoU is
            left out; 1 or more: off.
        tile_size: side of the tiles in pixels of the network's input; 0: whole pictures.
        tile_overlap: pixels shared by neighbouring tiles.
        tile_batch_size: tiles that go through the network together.
        bfloat16: backbone and head compute in bfloat16 where that costs little; results stay float32.
    """

    semantic_on: bool = True
    panoptic_on: bool = False
    instance_on: bool = False
    thing_classes: frozenset[int] | None = None
    object_mask_threshold: float = 0.0
    overlap_threshold: float = 0.0
    resize_before_inference: bool = False
    semantic_labels: bool = False
    max_instances: int = 100
    instance_score_threshold: float = 0.0
    mask_nms_threshold: float = 1.0
    tile_size: int = 0
    tile_overlap: int = 128
    tile_batch_size: int = 4
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if self.thing_classes is not None:  # a LazyConfig gives a list
            object.__setattr__(self, "thing_classes", frozenset(self.thing_classes))
        if self.tile_size and not 0 <= self.tile_overlap < self.tile_size:
            raise UserError(
                "tiles must share less than their side: "
                f"TILE_SIZE is {self.tile_size}, TILE_OVERLAP {self.tile_overlap}"
            )

    @staticmethod
    def from_config(cfg: CfgNode) -> "InferenceSettings":
        """Read ``MODEL.MASK_FORMER.TEST``, and the thing classes of the first training data set."""
        test = cfg.MODEL.MASK_FORMER.TEST
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if len(cfg.DATASETS.TRAIN) else None
        things = metadata and metadata.get("thing_dataset_id_to_contiguous_id")
        return InferenceSettings(
            semantic_on=test.SEMANTIC_ON,
            panoptic_on=test.PANOPTIC_ON,
            instance_on=test.INSTANCE_ON,
            thing_classes=frozenset(things.values()) if things else None,
            object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
            resize_before_inference=test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
            semantic_labels=test.SEMANTIC_LABELS,
            max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
            instance_score_threshold=test.INSTANCE_SCORE_THRESHOLD,
            mask_nms_threshold=test.MASK_NMS_THRESHOLD,
            tile_size=test.TILE_SIZE,
            tile_overlap=test.TILE_OVERLAP,
            tile_batch_size=test.TILE_BATCH_SIZE,
            bfloat16=test.BFLOAT16,
        )

    def is_thing(self, category: int) -> bool:
        """Whether a contiguous class id is a thing's."""
        return self.thing_classes is None or category in self.thing_classes


def postprocess(
    predictions: Predictions,
    image: int,
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    settings: InferenceSettings,
) -> dict[str, Any]:
    """Results for one picture of a batch.

    Args:
        predictions: the decoder's; the last layer counts.
        image: index of the picture.
        sizes: (height, width) of the padded batch, of the picture within it, and of the results.

    Returns:
        As switched on: ``sem_seg``, class scores (K, H, W), or with ``semantic_labels`` the best class of each
        pixel (H, W) int32; ``panoptic_seg``, segment ids (H, W) int32 with 0 for none, and a list of dicts with
        ``id``, ``isthing``, ``category_id`` and ``score``;
        ``instances``, an ``Instances`` with ``pred_masks`` (N, H, W) bool, ``pred_boxes`` around them,
        ``scores`` and ``pred_classes``, best first.
    """
    class_logits = predictions.class_logits[-1, image].float()
    padded_size, image_size, size = sizes
    sums_first = not (settings.resize_before_inference or settings.panoptic_on or settings.instance_on)
    results: dict[str, _Result] = {}
    if settings.semantic_on:
        if sums_first:
            results["sem_seg"] = _SemanticScores(class_logits, padded_size)
        else:
            results["sem_seg"] = (_SemanticLabels if settings.semantic_labels else _SemanticScores)(class_logits, size)
    if settings.panoptic_on:
        results["panoptic_seg"] = _PanopticSegments(class_logits, size, settings)
    if settings.instance_on:
        results["instances"] = _InstanceMasks(class_logits, size, settings)

    wanted = torch.cat([class_logits.new_zeros(0, dtype=torch.int64), *(x.queries for x in results.values())]).unique()
    places = {name: torch.searchsorted(wanted, result.queries) for name, result in results.items()}
    logits = predictions.mask_logits(-1, image, wanted if len(wanted) < len(class_logits) else None)
    last_sizes = (padded_size, padded_size) if sums_first else (image_size, size)
    for rows, strip in mask_strips(logits, padded_size, *last_sizes):
        for name, result in results.items():
            result.add(rows, strip, places[name])
    made = {name: result.finish(places[name]) for name, result in results.items()}
    if sums_first and settings.semantic_on:
        resize = _resized_labels if settings.semantic_labels else resize_valid
        made["sem_seg"] = resize(made["sem_seg"], image_size, size)
    return made


class _Result(Protocol):
    """A result that is made of strips of masks.

    ``queries`` are the indices of those that it needs. ``places`` says which of the masks of a strip are theirs.
    """

    queries: Tensor

    def add(self, rows: slice, strip: MaskStrip, places: Tensor) -> None:
        """Take in some rows of the masks."""

    def finish(self, places: Tensor) -> Any:
        """The result."""


def resize_valid(maps: Tensor, valid_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cut padding off maps (N, H', W') and resize what is left to (height, width), bilinearly."""
    maps = maps[:, : valid_size[0], : valid_size[1]]
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _resized_labels(scores: Tensor, valid_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The best classes (height, width) of scores that are resized as :func:`resize_valid` does, in strips."""
    labels = torch.empty(size, dtype=torch.int32, device=scores.device)
    valid = scores[:, : valid_size[0], : valid_size[1]]
    for rows, strip in mask_strips(valid, valid_size, valid_size, size):
        labels[rows] = best_classes(strip.logits)
    return labels


class _SemanticScores:
    """Class scores (K, H, W)."""

    def __init__(self, class_logits: Tensor, size: tuple[int, int]) -> None:
        self.queries = torch.arange(len(class_logits), device=class_logits.device)
        self.class_probabilities = class_logits.softmax(-1)[:, :-1].T
        self.scores = class_logits.new_empty(len(self.class_probabilities), *size)

    def add(self, rows: slice, strip: MaskStrip, places: Tensor) -> None:
        """Take in a strip."""
        strip.write_class_scores(self.class_probabilities, self.scores[:, rows])

    def finish(self, places: Tensor) -> Tensor:
        """The scores."""
        return self.scores


class _SemanticLabels:
    """The best class (H, W) of each pixel, int32."""

    def __init__(self, class_logits: Tensor, size: tuple[int, int]) -> None:
        self.queries = torch.arange(len(class_logits), device=class_logits.device)
        self.class_probabilities = class_logits.softmax(-1)[:, :-1].T
        self.labels = torch.empty(size, dtype=torch.int32, device=class_logits.device)

    def add(self, rows: slice, strip: MaskStrip, places: Tensor) -> None:
        """Take in a strip."""
        self.labels[rows] = strip.class_labels(self.class_probabilities)

    def finish(self, places: Tensor) -> Tensor:
        """The labels."""
        return self.labels


class _PanopticSegments:
    """Every pixel goes to the query with the best class score x mask probability (MaskFormer, section 3.4)."""

    def __init__(self, class_logits: Tensor, size: tuple[int, int], settings: InferenceSettings) -> None:
        num_classes = class_logits.shape[-1] - 1
        scores, classes = class_logits.softmax(-1).max(-1)
        self.queries = torch.nonzero((classes != num_classes) & (scores > settings.object_mask_threshold))[:, 0]
        self.scores = scores[self.queries]
        self.classes = classes[self.queries]
        self.settings = settings
        count = len(self.queries)
        # count: no one
        self.winner = torch.full(size, count, dtype=torch.int32, device=class_logits.device)
        self.visible, self.remaining, self.whole = torch.zeros(3, count, dtype=torch.int64, device=class_logits.device)

    def add(self, rows: slice, strip: MaskStrip, places: Tensor) -> None:
        """Take in a strip."""
        if not len(self.queries):
            return
        found = strip.winners(places, self.scores)
        self.winner[rows] = found.winner
        self.visible += found.visible
        self.remaining += found.remaining
        self.whole += found.whole

    def finish(self, places: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Segment ids (H, W) and segments."""
        segments: list[dict[str, Any]] = []
        stuff: dict[int, dict[str, Any]] = {}
        ids = []
        for score, category, visible, remaining, whole in zip(
            *(x.tolist() for x in (self.scores, self.classes, self.visible, self.remaining, self.whole)), strict=True
        ):
            if not remaining or visible / whole < self.settings.overlap_threshold:
                ids.append(0)
                continue
            isthing = self.settings.is_thing(category)
            if not isthing and category in stuff:  # parts of one stuff class are one segment
                segment = stuff[category]
                segment["score"] = max(segment["score"], score)
            else:
                segment = {"id": len(segments) + 1, "isthing": isthing, "category_id": category, "score": score}
                segments.append(segment)
                if not isthing:
                    stuff[category] = segment
            ids.append(segment["id"])
        table = torch.tensor([*ids, 0], dtype=torch.int32, device=self.winner.device)
        return table[self.winner], segments


@dataclass
class InstanceCandidates:
    """Pairs of a query and a class, best first: indices, contiguous class ids and class scores, each (N)."""

    queries: Tensor
    classes: Tensor
    scores: Tensor


def instance_candidates(class_logits: Tensor, settings: InferenceSettings) -> InstanceCandidates:
    """The ``max_instances`` best pairs of query and class, things alone where panoptic results are made too."""
    num_classes = class_logits.shape[-1] - 1
    scores = class_logits.softmax(-1)[:, :-1].flatten()
    scores, index = scores.topk(min(settings.max_instances, len(scores)))
    candidates = InstanceCandidates(index // num_classes, index % num_classes, scores)
    if settings.panoptic_on and settings.thing_classes is not None:
        things = torch.tensor(sorted(settings.thing_classes), device=index.device)
        keep = torch.isin(candidates.classes, things)
        candidates = InstanceCandidates(candidates.queries[keep], candidates.classes[keep], candidates.scores[keep])
    return candidates


def mask_quality(inside: Inside) -> Tensor:
    """Mean probability (N) inside each of N masks: how sure the model is of its shape; 0 for an empty mask."""
    return (inside.above_half + 0.5 * inside.area) / (inside.area + 1e-6)


class _InstanceMasks:
    """The best pairs of query and class, with binary masks."""

    def __init__(self, class_logits: Tensor, size: tuple[int, int], settings: InferenceSettings) -> None:
        self.candidates = instance_candidates(class_logits, settings)
        self.queries = self.candidates.queries
        self.settings = settings
        self.size = size
        self.masks = torch.empty(len(self.queries), *size, dtype=torch.bool, device=class_logits.device)
        self.inside: Inside | None = None  # of all rows

    def add(self, rows: slice, strip: MaskStrip, places: Tensor) -> None:
        """Take in a strip."""
        found = strip.write_binary_masks(places, self.masks[:, rows])
        if self.inside is None:
            # One tensor for all rows: small ones that are kept would split the memory that large ones come from.
            in_rows = found.in_rows.new_zeros(len(found.in_rows), self.size[0])
            self.inside = found._replace(in_rows=in_rows)
        else:
            self.inside.above_half.add_(found.above_half)
            self.inside.area.add_(found.area)
            self.inside.in_columns.logical_or_(found.in_columns)
        self.inside.in_rows[:, rows] = found.in_rows

    def finish(self, places: Tensor) -> Instances:
        """The instances, best first."""
        result = Instances(self.size)
        candidates, settings = self.candidates, self.settings
        assert self.inside is not None
        scores = candidates.scores * mask_quality(self.inside)[places]
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] >= settings.instance_score_threshold]
        if settings.mask_nms_threshold < 1:
            crops = CroppedMasks.from_masks(self.masks, copy=False)[order]
            order = order[mask_nms(crops, candidates.classes[order], settings.mask_nms_threshold)]
        boxes = boxes_around(self.inside.in_rows, self.inside.in_columns)
        result.pred_masks = _reordered(self.masks, order)
        result.pred_boxes = Boxes(boxes[places[order]].float())
        result.scores = scores[order]
        result.pred_classes = candidates.classes[order]
        return result


def _reordered(masks: Tensor, order: Tensor) -> Tensor:
    """``masks[order]`` of masks that no one else needs, with memory for at most a half of them besides."""
    if 2 * len(order) <= len(masks):
        return masks[order]
    sources = order.tolist()
    sources += sorted(set(range(len(masks))).difference(sources))
    for start in range(len(sources)):  # each cycle of the permutation once
        if sources[start] == start:
            continue
        kept, place = masks[start].clone(), start
        while sources[place] != start:
            masks[place] = masks[sources[place]]
            sources[place], place = place, sources[place]
        masks[place] = kept
        sources[place] = place
    return masks[: len(order)]
