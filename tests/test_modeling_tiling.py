"""Inference in tiles of large pictures: what looks at a part only, against what looks at everything."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mask2former.modeling import InferenceSettings, Predictions, tile_merging
from mask2former.modeling.mask_nms import NearbyMasks, mask_iou, mask_nms
from mask2former.modeling.tile_merging import AGREEMENT, TileInstances, Window
from mask2former.modeling.tiling import TiledInference, tile_windows
from mask2former.structures import CroppedMasks

K, TILE, OVERLAP = 5, 48, 16


# ------------------------------------------------------------------------------------------------ semantic


def random_predictions(seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 1, 12, K + 1), (1, 1, 12, 8), (1, 8, TILE // 4, TILE // 4))
    return Predictions(*(torch.randn(shape, generator=generator) for shape in shapes))


def tiled(input_size: tuple[int, int], size: tuple[int, int], **changes: Any) -> TiledInference:
    """A picture whose tiles have random predictions, the same at every call."""
    settings = InferenceSettings(tile_size=TILE, tile_overlap=OVERLAP, **changes)
    tiles = TiledInference(input_size, size, settings)
    for index, window in enumerate(tile_windows(input_size, TILE, OVERLAP)):
        tiles.add(window, random_predictions(index), 0, (TILE, TILE))
    return tiles


@pytest.mark.parametrize("size", [(150, 170), (61, 75), (331, 205)])
def test_labels_without_scores_are_the_best_of_the_scores(size: tuple[int, int]) -> None:
    panoptic = {
        "panoptic_on": True,
        "thing_classes": frozenset({0, 1}),
        "object_mask_threshold": 0.3,
        "instance_score_threshold": 0.3,
    }
    expected = tiled((150, 170), size, **panoptic).results()
    results = tiled((150, 170), size, **panoptic, semantic_labels=True).results()
    assert results["sem_seg"].dtype == torch.int32
    assert torch.equal(results["sem_seg"], expected["sem_seg"].argmax(0).int())
    assert len(results["sem_seg"].unique()) == K
    assert torch.equal(results["panoptic_seg"][0], expected["panoptic_seg"][0])
    assert results["panoptic_seg"][1] == expected["panoptic_seg"][1]
    assert any(not segment["isthing"] for segment in expected["panoptic_seg"][1])


@pytest.mark.parametrize("input_size", [(150, 170), (30, 170), (150, 40)])
def test_mean_of_the_scores_is_weighted(input_size: tuple[int, int]) -> None:
    """Every tile's scores alone, put together afterwards."""
    height, width = input_size
    total, weights = torch.zeros(K, height, width), torch.zeros(height, width)
    for index, window in enumerate(tile_windows(input_size, TILE, OVERLAP)):
        rows, columns = slice(window.y0, window.y1), slice(window.x0, window.x1)
        shape = (window.y1 - window.y0, window.x1 - window.x0)
        alone = TiledInference(shape, shape, InferenceSettings(tile_size=TILE, tile_overlap=OVERLAP))
        alone.add(Window(0, 0, *shape), random_predictions(index), 0, (TILE, TILE))
        ramps = [
            ramp(start, stop, length)
            for start, stop, length in ((window.y0, window.y1, height), (window.x0, window.x1, width))
        ]
        weight = ramps[0][:, None] * ramps[1]
        total[:, rows, columns] += alone.results()["sem_seg"] * weight
        weights[rows, columns] += weight
    scores = tiled(input_size, input_size).results()["sem_seg"]
    torch.testing.assert_close(scores, total / weights)


def ramp(start: int, stop: int, length: int) -> Tensor:
    """Rises over the overlap from each end that isn't the picture's."""
    values = []
    for position in range(stop - start):
        ends = [position + 0.5] * (start > 0) + [stop - start - position - 0.5] * (stop < length)
        values.append(min([1.0, *(end / OVERLAP for end in ends)]))
    return torch.tensor(values)


def test_scores_are_kept_for_one_row_of_tiles_where_labels_are_asked_for() -> None:
    tiles = tiled((1000, 60), (1000, 60), semantic_labels=True)
    assert tiles._semantic is not None
    assert tiles._semantic.scores().shape == (K, TILE, 60)


def test_tiles_in_another_order_are_refused() -> None:
    tiles = tiled((100, 60), (100, 60), semantic_labels=True)
    with pytest.raises(ValueError, match="from top to bottom, but one starts at row 0"):
        tiles.add(Window(0, 0, TILE, TILE), random_predictions(0), 0, (TILE, TILE))


# ------------------------------------------------------------------------------------------------ instances

WINDOWS = [Window(y, x, y + 100, x + 100) for y in range(0, 250, 50) for x in range(0, 250, 50)]


def random_tiles(seed: int, count: int = 150) -> list[TileInstances]:
    """Rectangles with a corner missing, seen in some of the overlapping tiles that they reach into."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for _ in range(count):
        y, x, height, width, category = draw(0, 280), draw(0, 280), draw(2, 60), draw(2, 60), draw(0, 2)
        mask = torch.ones(min(height, 300 - y), min(width, 300 - x), dtype=torch.bool)
        mask[: height // 3, : width // 3] = False
        whole = Window(y, x, y + mask.shape[0], x + mask.shape[1])
        for window in WINDOWS:
            shared = window & whole
            if shared.y0 >= shared.y1 or shared.x0 >= shared.x1 or draw(0, 4) == 0:
                continue
            crop = shared.cut(mask, (y, x))
            if not crop.any():
                continue
            score = torch.rand(1, generator=generator)
            found.append(
                TileInstances(
                    CroppedMasks([crop], [(shared.y0, shared.x0)], (300, 300)),
                    torch.tensor([category]),
                    score,
                    score,
                    torch.tensor([shared != whole]),
                    [window],
                )
            )
    return found


def iou(first: Tensor, second: Tensor) -> float:
    return int((first & second).sum()) / max(int((first | second).sum()), 1)


def groups_of_parts(parts: TileInstances) -> list[list[int]]:
    """Which parts are of one object, found with whole masks and a look at all pairs."""
    masks = list(parts.masks)

    def agree(first: int, second: int) -> bool:
        if parts.classes[first] != parts.classes[second] or parts.windows[first] == parts.windows[second]:
            return False
        shared = parts.windows[first] & parts.windows[second]
        region = (slice(shared.y0, max(shared.y1, shared.y0)), slice(shared.x0, max(shared.x1, shared.x0)))
        return iou(masks[first][region], masks[second][region]) >= AGREEMENT

    groups, rest = [], list(range(len(parts)))
    while rest:
        group = [rest.pop(0)]
        while more := [other for other in rest if any(agree(member, other) for member in group)]:
            group += more
            rest = [other for other in rest if other not in more]
        groups.append(sorted(group))
    return groups


@pytest.mark.parametrize("seed", range(2))
def test_joining_finds_what_a_look_at_all_pairs_finds(seed: int) -> None:
    found = TileInstances.cat(random_tiles(seed)).best_first()
    parts = found[found.cut]
    groups, joined = groups_of_parts(parts), tile_merging._join_parts(parts)
    assert len(joined) == len(groups) and len(found) / 10 < len(groups) < len(parts) / 2
    for index, group in enumerate(groups):
        members = parts[torch.tensor(group)]
        assert torch.equal(joined.masks[index], torch.stack(list(members.masks)).any(0))
        assert joined.classes[index] == members.classes[0]
        assert joined.class_scores[index] == members.class_scores.max()


def test_nms_finds_what_a_look_at_all_pairs_finds() -> None:
    found = TileInstances.cat(random_tiles(0)).best_first()
    areas = found.masks.areas().tolist()
    expected: list[int] = []
    for index in range(len(found)):
        rivals = [other for other in expected if found.classes[other] == found.classes[index]]
        if all(mask_iou(found.masks, areas, rival, index) <= 0.4 for rival in rivals):
            expected.append(index)
    assert mask_nms(found.masks, found.classes, 0.4).tolist() == expected
    assert len(expected) < 0.8 * len(found)


def test_masks_near_another() -> None:
    corners = [(0, 0), (60, 60), (63, 0), (64, 0), (0, 0), (500, 500), (0, 10)]
    crops = [torch.ones(64, 64, dtype=torch.bool)] * 6 + [torch.ones(0, 0, dtype=torch.bool)]
    nearby = NearbyMasks(CroppedMasks(crops, corners, (600, 600)), torch.tensor([0, 0, 0, 0, 1, 0, 0]))
    assert nearby.near(0) == []
    for index in reversed(range(1, 7)):
        nearby.add(index)
    assert nearby.near(0) == [1, 2]  # not what touches it, nor another class's, nor an empty mask
    assert nearby.near(6) == []
