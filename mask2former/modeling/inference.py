"""From the last layer's predictions to semantic, panoptic and instance results (paper, section 4.1).

Letters: ``Q`` queries, ``K`` classes, ``N`` instances; ``H`` and ``W`` are the size asked for.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..errors import UserError
from ..structures import CroppedMasks, mask_boxes
from .mask_nms import mask_nms
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
        max_instances: instances: how many at most, best first.
        instance_score_threshold: instances: those with a lower score are left out.
        mask_nms_threshold: instances: one that overlaps a better one of its class by more than this IoU is
            left out; 1 or more: off.
        tile_size: side of the tiles in pixels of the network's input; 0: whole pictures.
        tile_overlap: pixels shared by neighbouring tiles.
        tile_batch_size: tiles that go through the network together.
    """

    semantic_on: bool = True
    panoptic_on: bool = False
    instance_on: bool = False
    thing_classes: frozenset[int] | None = None
    object_mask_threshold: float = 0.0
    overlap_threshold: float = 0.0
    resize_before_inference: bool = False
    max_instances: int = 100
    instance_score_threshold: float = 0.0
    mask_nms_threshold: float = 1.0
    tile_size: int = 0
    tile_overlap: int = 128
    tile_batch_size: int = 4

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
            max_instances=cfg.TEST.DETECTIONS_PER_IMAGE,
            instance_score_threshold=test.INSTANCE_SCORE_THRESHOLD,
            mask_nms_threshold=test.MASK_NMS_THRESHOLD,
            tile_size=test.TILE_SIZE,
            tile_overlap=test.TILE_OVERLAP,
            tile_batch_size=test.TILE_BATCH_SIZE,
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
        As switched on: ``sem_seg``, class scores (K, H, W); ``panoptic_seg``, segment ids (H, W) int32 with 0
        for none, and a list of dicts with ``id``, ``isthing``, ``category_id`` and ``score``;
        ``instances``, an ``Instances`` with ``pred_masks`` (N, H, W) bool, ``pred_boxes`` around them,
        ``scores`` and ``pred_classes``, best first.
    """
    class_logits = predictions.class_logits[-1, image].float()
    masks = _MasksOfSize(predictions, image, sizes)
    results: dict[str, Any] = {}
    if settings.semantic_on:
        if settings.resize_before_inference or settings.panoptic_on or settings.instance_on:
            results["sem_seg"] = semantic_scores(class_logits, masks.all())
        else:
            scores = semantic_scores(class_logits, masks.padded())
            results["sem_seg"] = resize_valid(scores, sizes[1], sizes[2])
    if settings.panoptic_on:
        results["panoptic_seg"] = _panoptic(class_logits, masks, settings)
    if settings.instance_on:
        results["instances"] = _instances(class_logits, masks, settings)
    return results


class _MasksOfSize:
    """One picture's mask logits at the output size; made once where all are asked for."""

    def __init__(
        self,
        predictions: Predictions,
        image: int,
        sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    ) -> None:
        self._predictions = predictions
        self._image = image
        self._padded_size, self._image_size, self.size = sizes
        self._all: Tensor | None = None

    def padded(self, queries: Tensor | None = None) -> Tensor:
        """Mask logits (Q, H', W') at the padded size."""
        logits = self._predictions.mask_logits(-1, self._image, queries)
        return F.interpolate(logits[None], size=self._padded_size, mode="bilinear", align_corners=False)[0]

    def all(self) -> Tensor:
        """Mask logits (Q, H, W) of all queries."""
        if self._all is None:
            self._all = resize_valid(self.padded(), self._image_size, self.size)
        return self._all

    def of(self, queries: Tensor) -> Tensor:
        """Mask logits (n, H, W) of the queries whose indices (n) are given."""
        if self._all is not None:
            return self._all[queries]
        if not len(queries):
            return self._predictions.class_logits.new_zeros((0, *self.size))
        return resize_valid(self.padded(queries), self._image_size, self.size)


def resize_valid(maps: Tensor, valid_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cut padding off maps (N, H', W') and resize what is left to (height, width), bilinearly."""
    maps = maps[:, : valid_size[0], : valid_size[1]]
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def semantic_scores(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Class scores (K, H, W): each query gives its mask's probability to its classes (MaskFormer, section 3.4)."""
    return torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], mask_logits.sigmoid())


def _panoptic(
    class_logits: Tensor, masks: _MasksOfSize, settings: InferenceSettings
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Every pixel goes to the query with the best class score x mask probability (MaskFormer, section 3.4)."""
    num_classes = class_logits.shape[-1] - 1
    scores, classes = class_logits.softmax(-1).max(-1)
    queries = torch.nonzero((classes != num_classes) & (scores > settings.object_mask_threshold))[:, 0]
    if not len(queries):
        return torch.zeros(masks.size, dtype=torch.int32, device=class_logits.device), []
    probabilities = masks.of(queries).sigmoid()
    winner = (scores[queries, None, None] * probabilities).argmax(0)  # (H, W)
    inside = probabilities.gather(0, winner[None])[0] >= 0.5
    count = len(queries)
    visible = torch.bincount(winner.flatten(), minlength=count).tolist()
    remaining = torch.bincount(winner[inside], minlength=count).tolist()
    whole = (probabilities >= 0.5).flatten(1).sum(1).tolist()

    segments: list[dict[str, Any]] = []
    stuff: dict[int, dict[str, Any]] = {}
    ids = [0] * count
    for index, (score, category) in enumerate(zip(scores[queries].tolist(), classes[queries].tolist(), strict=True)):
        if not remaining[index] or visible[index] / whole[index] < settings.overlap_threshold:
            continue
        isthing = settings.is_thing(category)
        if not isthing and category in stuff:  # parts of one stuff class are one segment
            segment = stuff[category]
            segment["score"] = max(segment["score"], score)
        else:
            segment = {"id": len(segments) + 1, "isthing": isthing, "category_id": category, "score": score}
            segments.append(segment)
            if not isthing:
                stuff[category] = segment
        ids[index] = segment["id"]
    table = torch.tensor(ids, dtype=torch.int32, device=winner.device)
    return table[winner] * inside, segments


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


def mask_quality(mask_logits: Tensor) -> Tensor:
    """Mean probability (N) inside each mask (N, H, W): how sure the model is of its shape."""
    masks = (mask_logits > 0).flatten(1)
    probabilities = mask_logits.sigmoid().flatten(1)
    return (probabilities * masks).sum(1) / (masks.sum(1) + 1e-6)


def _instances(class_logits: Tensor, masks: _MasksOfSize, settings: InferenceSettings) -> Instances:
    candidates = instance_candidates(class_logits, settings)
    queries, inverse = candidates.queries.unique(return_inverse=True)
    logits = masks.of(queries)
    scores = candidates.scores * mask_quality(logits)[inverse]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= settings.instance_score_threshold]
    binary = logits > 0
    if settings.mask_nms_threshold < 1:
        crops = CroppedMasks.from_masks(binary)[inverse[order]]
        order = order[mask_nms(crops, candidates.classes[order], settings.mask_nms_threshold)]
    result = Instances(masks.size)
    result.pred_masks = binary[inverse[order]]
    result.pred_boxes = Boxes(mask_boxes(binary)[inverse[order]].float())
    result.scores = scores[order]
    result.pred_classes = candidates.classes[order]
    return result
