"""Results from hand-made predictions, whole and in tiles."""

from typing import Any

import pytest
import torch
from tiny_nuclei_model import tiny_config
from torch import Tensor

from mask2former.modeling import InferenceSettings, Predictions
from mask2former.modeling.inference import postprocess
from mask2former.modeling.mask_nms import mask_nms
from mask2former.modeling.predictions import DensePredictions
from mask2former.modeling.tile_merging import TileInstances, Window, merge_tiles
from mask2former.modeling.tiling import TiledInference, tile_windows
from mask2former.structures import CroppedMasks

THING, STUFF = 0, 1
ALL = InferenceSettings(
    semantic_on=True,
    panoptic_on=True,
    instance_on=True,
    thing_classes=frozenset({THING}),
    object_mask_threshold=0.5,
    overlap_threshold=0.5,
)
SIZES = ((32, 32), (32, 32), (32, 32))


def predict(*queries: tuple[int, Tensor], confidence: float = 6.0) -> Predictions:
    """Queries with a class each (2: no object) and masks (32, 32), as a decoder's dict at full size."""
    logits = torch.zeros(1, len(queries), 3)
    masks = torch.stack([torch.where(mask, 8.0, -8.0) for _, mask in queries])[None]
    for index, (category, _) in enumerate(queries):
        logits[0, index, category] = confidence
    return Predictions.from_outputs({"pred_logits": logits, "pred_masks": masks})


def box(y0: int, x0: int, y1: int, x1: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_panoptic_segments_things_apart_and_stuff_together() -> None:
    left, right = box(2, 2, 10, 10), box(2, 20, 10, 30)
    ground_a, ground_b = box(16, 0, 32, 16), box(16, 16, 32, 32)
    predictions = predict((THING, left), (STUFF, ground_a), (THING, right), (STUFF, ground_b), (2, box(0, 0, 32, 32)))
    ids, segments = postprocess(predictions, 0, SIZES, ALL)["panoptic_seg"]
    assert [(s["id"], s["isthing"], s["category_id"]) for s in segments] == [(1, True, 0), (2, False, 1), (3, True, 0)]
    assert torch.equal(ids == 1, left)
    assert torch.equal(ids == 3, right)
    assert torch.equal(ids == 2, ground_a | ground_b)
    assert ids.dtype == torch.int32


def test_panoptic_leaves_out_what_is_mostly_covered_and_unsure() -> None:
    whole, covered = box(0, 0, 20, 20), box(0, 0, 20, 12)
    logits = torch.zeros(1, 3, 3)
    logits[0, 0, THING], logits[0, 1, THING], logits[0, 2, THING] = 8.0, 4.0, 0.5
    masks = torch.stack([torch.where(m, 8.0, -8.0) for m in (whole, covered, box(25, 25, 30, 30))])[None]
    predictions = DensePredictions(logits[None], masks[None])
    ids, segments = postprocess(predictions, 0, SIZES, ALL)["panoptic_seg"]
    assert [s["id"] for s in segments] == [1]
    assert torch.equal(ids == 1, whole)
    nothing = InferenceSettings(semantic_on=False, panoptic_on=True, object_mask_threshold=0.9999)
    ids, segments = postprocess(predictions, 0, SIZES, nothing)["panoptic_seg"]
    assert segments == []
    assert not ids.any()


def test_instances_are_things_best_first_with_boxes_around_their_masks() -> None:
    predictions = predict((STUFF, box(16, 0, 32, 32)), (THING, box(2, 4, 10, 12)), (2, box(0, 0, 5, 5)))
    instances = postprocess(predictions, 0, SIZES, ALL)["instances"]
    assert set(instances.pred_classes.tolist()) == {THING}
    assert torch.equal(instances.pred_masks[0], box(2, 4, 10, 12))
    assert instances.pred_boxes.tensor[0].tolist() == [4, 2, 12, 10]
    assert (instances.scores.diff() <= 0).all()
    probability = torch.tensor([6.0, 0, 0]).softmax(0)[0] * torch.tensor(8.0).sigmoid()
    assert instances.scores[0].item() == pytest.approx(probability.item(), rel=1e-4)
    without_panoptic = InferenceSettings(semantic_on=False, instance_on=True, max_instances=1000)
    assert len(postprocess(predictions, 0, SIZES, without_panoptic)["instances"]) == 3 * 2  # all there are


def test_thresholds_of_the_instances() -> None:
    twin_a, twin_b, other = box(0, 0, 10, 10), box(0, 0, 10, 9), box(20, 20, 30, 30)
    predictions = predict((THING, twin_a), (THING, twin_b), (THING, other))
    settings = InferenceSettings(semantic_on=False, instance_on=True, instance_score_threshold=0.5)
    assert len(postprocess(predictions, 0, SIZES, settings)["instances"]) == 3
    settings = InferenceSettings(
        semantic_on=False, instance_on=True, instance_score_threshold=0.5, mask_nms_threshold=0.5
    )
    kept = postprocess(predictions, 0, SIZES, settings)["instances"]
    assert len(kept) == 2
    assert sorted(kept.pred_masks.flatten(1).sum(1).tolist()) in ([90, 100], [100, 100])


def test_results_have_the_size_asked_for_and_padding_is_cut_off() -> None:
    mask = box(0, 0, 16, 32)
    sizes = ((32, 32), (16, 24), (40, 50))  # padded, picture, results
    results = postprocess(predict((THING, mask), (STUFF, ~mask)), 0, sizes, ALL)
    assert results["sem_seg"].shape == (2, 40, 50)
    assert (results["sem_seg"].argmax(0) == THING).all()
    assert results["panoptic_seg"][0].shape == (40, 50)
    assert results["instances"].pred_masks.shape[1:] == (40, 50)


def test_semantic_alone_sums_before_it_resizes() -> None:
    torch.manual_seed(0)
    predictions = Predictions(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 8), torch.randn(1, 8, 8, 8))
    sizes = ((32, 32), (30, 28), (60, 70))
    before, after = (
        postprocess(predictions, 0, sizes, InferenceSettings(resize_before_inference=value))["sem_seg"]
        for value in (True, False)
    )
    assert before.shape == after.shape == (3, 60, 70)
    assert not torch.allclose(before, after, atol=1e-4)
    assert (before.argmax(0) == after.argmax(0)).float().mean() > 0.95


def test_mask_nms_keeps_the_better_of_one_class() -> None:
    masks = torch.stack([box(0, 0, 10, 10), box(0, 0, 10, 8), box(0, 0, 10, 4), box(0, 0, 10, 10), box(20, 20, 25, 25)])
    classes = torch.tensor([0, 0, 0, 1, 0])
    assert mask_nms(CroppedMasks.from_masks(masks), classes, 0.5).tolist() == [0, 2, 3, 4]
    assert mask_nms(CroppedMasks.from_masks(masks), classes, 0.9).tolist() == [0, 1, 2, 3, 4]
    assert mask_nms(CroppedMasks.from_masks(masks[:0]), classes[:0], 0.5).tolist() == []


@pytest.mark.parametrize("size", [(256, 256), (100, 300), (640, 513), (257, 1000)])
def test_tiles_cover_the_picture_and_overlap(size: tuple[int, int]) -> None:
    windows = tile_windows(size, 256, 64)
    covered = torch.zeros(size, dtype=torch.int64)
    for window in windows:
        assert window.y1 - window.y0 == min(256, size[0])
        assert window.x1 - window.x0 == min(256, size[1])
        covered[window.y0 : window.y1, window.x0 : window.x1] += 1
    assert covered.min() == 1
    for starts in (sorted({w.y0 for w in windows}), sorted({w.x0 for w in windows})):
        assert all(b - a <= 256 - 64 for a, b in zip(starts, starts[1:], strict=False))


def in_tiles(
    objects: list[tuple[int, Tensor]], size: tuple[int, int], tile: int, overlap: int, **changes: Any
) -> dict[str, Any]:
    """Perfect predictions of each tile, put together."""
    settings = InferenceSettings(
        **{**vars(ALL), "tile_size": tile, "tile_overlap": overlap, "mask_nms_threshold": 0.5, **changes}
    )
    tiled = TiledInference(size, size, settings)
    for window in tile_windows(size, tile, overlap):
        parts = [(category, mask[window.y0 : window.y1, window.x0 : window.x1]) for category, mask in objects]
        parts = [(category, mask) if mask.any() else (2, mask) for category, mask in parts]
        tiled.add(window, predict(*parts), 0, (tile, tile))
    return tiled.results()


def test_objects_on_tile_borders_are_found_once_and_whole() -> None:
    size = (96, 96)
    small, on_border, large = box(4, 4, 12, 12, size), box(40, 28, 52, 44, size), box(10, 56, 90, 70, size)
    ground = ~(small | on_border | large)
    objects = [(THING, small), (THING, on_border), (THING, large), (STUFF, ground)]
    results = in_tiles(objects, size, tile=48, overlap=24, instance_score_threshold=0.5)
    found = results["instances"]
    assert isinstance(found.pred_masks, CroppedMasks)
    assert len(found) == 3
    for expected in (small, on_border, large):
        best = max((mask & expected).sum() / (mask | expected).sum() for mask in found.pred_masks)
        assert best > 0.99
    ids, segments = results["panoptic_seg"]
    assert sorted(s["isthing"] for s in segments) == [False, True, True, True]
    assert torch.equal(results["sem_seg"].argmax(0) == STUFF, ground)
    [stuff] = [s["id"] for s in segments if not s["isthing"]]
    assert torch.equal(ids == stuff, ground)


def test_one_tile_gives_what_the_whole_picture_gives() -> None:
    objects = [(THING, box(2, 2, 12, 12)), (THING, box(15, 15, 30, 28)), (STUFF, box(0, 0, 2, 32))]
    tiled = in_tiles(objects, (32, 32), tile=32, overlap=8)
    whole = postprocess(predict(*objects), 0, SIZES, ALL)
    torch.testing.assert_close(tiled["sem_seg"], whole["sem_seg"])
    ours, theirs = tiled["instances"], whole["instances"]
    likely = theirs.scores > 0.5
    assert torch.equal(ours.pred_boxes.tensor[:2], theirs.pred_boxes.tensor[likely])
    torch.testing.assert_close(ours.scores[:2], theirs.scores[likely])


def test_a_part_that_a_whole_object_covers_is_left_out() -> None:
    def found(mask: Tensor, score: float, cut: bool, window: Window) -> TileInstances:
        return TileInstances(
            CroppedMasks.from_masks(mask[None]),
            torch.tensor([THING]),
            torch.tensor([score]),
            torch.tensor([score]),
            torch.tensor([cut]),
            [window],
        )

    left, right = Window(0, 0, 32, 20), Window(0, 12, 32, 32)
    whole = found(box(5, 13, 15, 27), 0.6, False, right)
    part = found(box(5, 13, 15, 20), 0.9, True, left)
    merged = merge_tiles([part, whole], nms_threshold=1.0)
    assert len(merged) == 1
    assert torch.equal(merged.masks[0], box(5, 13, 15, 27))


def test_picture_without_any_object_in_tiles() -> None:
    nothing = torch.zeros(64, 64, dtype=torch.bool)
    results = in_tiles([(2, nothing), (2, nothing)], (64, 64), tile=32, overlap=8, instance_score_threshold=0.5)
    assert len(results["instances"]) == 0
    assert results["panoptic_seg"][1] == []


def test_settings_come_from_the_config() -> None:
    cfg = tiny_config()
    test = cfg.MODEL.MASK_FORMER.TEST
    test.TILE_SIZE, test.TILE_OVERLAP, test.TILE_BATCH_SIZE, test.MASK_NMS_THRESHOLD = 64, 16, 3, 0.4
    test.INSTANCE_SCORE_THRESHOLD, cfg.TEST.DETECTIONS_PER_IMAGE = 0.3, 7
    settings = InferenceSettings.from_config(cfg)
    assert (settings.tile_size, settings.tile_overlap, settings.tile_batch_size) == (64, 16, 3)
    assert settings.mask_nms_threshold == 0.4
    assert (settings.instance_score_threshold, settings.max_instances) == (0.3, 7)
    assert settings.thing_classes == frozenset({0})
    test.TILE_OVERLAP = 64
    with pytest.raises(ValueError, match="TILE_OVERLAP"):
        InferenceSettings.from_config(cfg)
