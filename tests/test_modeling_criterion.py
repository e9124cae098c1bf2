"""Losses, matching and gradients: against plain formulas, with and without objects."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import point_sample
from detectron2.structures import BitMasks, Instances, PolygonMasks
from tiny_nuclei_model import build_tiny_model
from torch import Tensor

from mask2former.modeling import HungarianMatcher, Predictions, SetCriterion
from mask2former.modeling import matcher as matcher_module
from mask2former.modeling import points as points_module
from mask2former.modeling import predictions as predictions_module
from mask2former.modeling.losses import PairSums, cross_entropy_loss, dice_loss, losses_of_sums
from mask2former.modeling.points import (
    loss_sums_at_chosen_points,
    sample_features,
    sample_masks,
    sample_points,
    uncertain_points,
)
from mask2former.modeling.targets import Targets, prepare_targets
from mask2former.ops import extension

K, Q, C = 3, 6, 8


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_predictions(layers: int = 2, pictures: int = 2) -> Predictions:
    return Predictions(
        torch.randn(layers, pictures, Q, K + 1), torch.randn(layers, pictures, Q, C), torch.randn(pictures, C, 8, 10)
    )


def boxes(*corners: tuple[int, int, int, int], size: tuple[int, int] = (32, 40)) -> Tensor:
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def targets() -> list[Targets]:
    return [
        Targets(torch.tensor([0, 2]), boxes((0, 0, 16, 20), (8, 20, 30, 40))),
        Targets(torch.tensor([1]), boxes((4, 4, 28, 36))),
    ]


def make_criterion(**values: Any) -> SetCriterion:
    return SetCriterion(K, HungarianMatcher(2.0, 5.0, 5.0, num_points=64), num_points=64, **values)


def test_costs_of_all_pairs_equal_the_losses_of_each() -> None:
    logits, objects = torch.randn(Q, 50) * 3, torch.randint(0, 2, (4, 50)).float()
    sums = PairSums(Q, 4, logits.device)
    for here in (slice(30), slice(30, 50)):
        sums.add(logits[:, here].clone(), objects[:, here])
    cross_entropy, dice_losses = sums.losses()
    for query in range(Q):
        for index in range(4):
            pair = logits[query : query + 1], objects[index : index + 1]
            bce = F.binary_cross_entropy_with_logits(*pair)
            torch.testing.assert_close(cross_entropy[query, index], bce)
            torch.testing.assert_close(cross_entropy_loss(*pair), bce)
            probability, label = pair[0].sigmoid()[0], pair[1][0]
            dice = 1 - (2 * (probability * label).sum() + 1) / (probability.sum() + label.sum() + 1)
            torch.testing.assert_close(dice_losses[query, index], dice)
            torch.testing.assert_close(dice_loss(*pair), dice)


@pytest.mark.parametrize("logits_at_a_time", [1, 7 * 2 * Q, 1 << 20])
def test_masks_at_points_equal_points_of_masks(logits_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(predictions_module.LOGITS_AT_A_TIME, "cpu", logits_at_a_time)
    predictions = random_predictions()
    points = torch.rand(30, 2) * 2.4 - 1.2  # some outside
    for image in range(2):
        parts = [(here, logits.clone()) for here, logits in predictions.mask_logits_at(image, points)]
        expected = [sample_points(predictions.mask_logits(layer, image), points) for layer in range(2)]
        torch.testing.assert_close(torch.cat([x for _, x in parts], -1), torch.stack(expected), atol=1e-4, rtol=1e-4)
        assert [point for here, _ in parts for point in range(30)[here]] == list(range(30))


def test_points_are_read_as_in_point_rend() -> None:
    maps, points = torch.randn(3, 9, 7), torch.rand(3, 20, 2) * 1.2 - 0.1  # some outside
    expected = point_sample(maps[:, None], points, align_corners=False)[:, 0]
    torch.testing.assert_close(sample_points(maps, 2 * points - 1), expected)
    torch.testing.assert_close(sample_points(maps, 2 * points[1] - 1)[1], expected[1])
    for layout in (torch.contiguous_format, torch.channels_last):
        features = maps[None].contiguous(memory_format=layout)[0]
        torch.testing.assert_close(sample_features(features, 2 * points[1] - 1)[1], expected[1])
    masks = maps > 0
    expected = point_sample(masks[:, None].float(), points, align_corners=False)[:, 0]
    torch.testing.assert_close(sample_masks(masks, 2 * points - 1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("values_at_a_time", [1, 5 * 72, 1 << 22])
def test_losses_at_chosen_points_are_those_of_whole_masks(
    values_at_a_time: int, channels_last: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients, too, with kernels (float32) and without."""
    monkeypatch.setitem(points_module.VALUES_AT_A_TIME, "cpu", values_at_a_time)
    monkeypatch.setitem(points_module.CHOSEN_AT_A_TIME, "cpu", 2)
    monkeypatch.setattr(points_module, "VALUES_IN_CACHE", 7 * C)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(1, C, 8, 9, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    embeddings = torch.randn(7, C, dtype=dtype, requires_grad=True)
    points, labels = torch.rand(7, 20, 2, dtype=dtype) * 2.4 - 1.2, torch.rand(7, 20, dtype=dtype)
    seen: list[Tensor] = []

    def choose(rows: slice, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(masks.clone())  # their memory is used again
        return points[rows], sample_points(masks, points[rows]), labels[rows]

    def total(cross_entropy: Tensor, dice: Tensor) -> Tensor:
        return 2 * cross_entropy.sum() + 3 * dice.sum()

    sums = loss_sums_at_chosen_points(embeddings, features, choose)
    losses = losses_of_sums(sums, 20)
    gradients = torch.autograd.grad(total(*losses), (embeddings, features))
    whole = torch.einsum("nc,chw->nhw", embeddings, features[0])
    logits = sample_points(whole, points)
    expected = [loss(logits[:, None], labels[:, None]) for loss in (cross_entropy_loss, dice_loss)]
    torch.testing.assert_close(torch.cat(seen), whole)
    torch.testing.assert_close(losses, tuple(expected))
    torch.testing.assert_close(gradients, torch.autograd.grad(total(*expected), (embeddings, features)))
    assert gradients[1].stride() == features.stride()


def test_kernels_change_no_loss_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where points are the same, and none is chosen by uncertainty."""
    logits, embeddings, features = torch.randn(3, 2, Q, K + 1), torch.randn(3, 2, Q, C), torch.randn(2, C, 8, 10)
    leaves = [logits, embeddings, features.contiguous(memory_format=torch.channels_last)]
    points = torch.rand(64, 2) * 2 - 1
    for module in (points_module, matcher_module):
        monkeypatch.setattr(module, "random_points", lambda *shape, device: points.expand(*shape, 2))

    def losses_and_gradients() -> list[Tensor]:
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        losses = make_criterion(importance_sample_ratio=0.0)(Predictions(*inputs), targets())
        return [*losses.values(), *torch.autograd.grad(sum(losses.values()), inputs)]

    results = losses_and_gradients()
    monkeypatch.setattr(extension, "KERNELS", frozenset())
    for ours, plain in zip(results, losses_and_gradients(), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_predictions_read_as_the_published_dict_and_are_made_from_one() -> None:
    predictions = random_predictions(layers=3)
    assert set(predictions) == {"pred_logits", "pred_masks", "aux_outputs"}
    expected = torch.einsum("bqc,bchw->bqhw", predictions.mask_embeddings[-1], predictions.mask_features)
    torch.testing.assert_close(predictions["pred_masks"], expected)
    assert len(predictions["aux_outputs"]) == 2

    dense = Predictions.from_outputs(dict(predictions))
    points, labels, queries = torch.rand(9, 2), torch.rand(6, 9), torch.tensor([[0, 3, 1], [1, 5, 2]])

    def choose(rows: slice, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = points.expand(len(masks), -1, -1)
        return here, sample_points(masks, here), labels[rows]

    for image in range(2):
        at_points = [next(iter(kind.mask_logits_at(image, points)))[1] for kind in (dense, predictions)]
        torch.testing.assert_close(*at_points, atol=1e-5, rtol=1e-4)
        sums = [kind.loss_sums(image, queries, choose) for kind in (dense, predictions)]
        torch.testing.assert_close(*sums, atol=1e-5, rtol=1e-4)
        row = predictions.mask_logits(2, image, queries[1, 2:])  # the last of N*L, layer by layer
        torch.testing.assert_close(sums[0][5:, 1], sample_points(row, points).sigmoid().sum(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(dense.last_layer()["pred_masks"], expected)
    assert dense.mask_size == predictions.mask_size == (8, 10)
    with pytest.raises(ValueError, match="pred_masks"):
        Predictions.from_outputs({"pred_logits": torch.zeros(1, Q, K + 1)})


def test_uncertain_points_lie_where_logits_are_near_zero() -> None:
    x = torch.linspace(-1, 1, 64)
    masks = (x * 20).expand(2, 64, 64)  # 0 in the middle column
    points, at_points = uncertain_points(masks, 100, oversample_ratio=3.0, importance_sample_ratio=0.75)
    assert points.shape == (2, 100, 2)
    assert (points.abs() <= 1).all()
    torch.testing.assert_close(at_points, sample_points(masks, points), atol=1e-5, rtol=1e-5)
    logits = at_points.abs()
    assert logits[:, :75].max() < logits[:, 75:].max()
    assert logits[:, :75].mean() < 4


def test_matcher_gives_each_object_the_query_that_predicts_it() -> None:
    target = targets()[0]
    masks = F.interpolate(target.masks[None].float(), size=(8, 10))[0]
    logits = torch.full((1, 1, Q, K + 1), -5.0)
    mask_logits = torch.full((1, 1, Q, 8, 10), -8.0)
    for query, index in [(4, 0), (1, 1)]:
        logits[0, 0, query, target.classes[index]] = 5.0
        mask_logits[0, 0, query] = masks[index] * 16 - 8
    outputs = {"pred_logits": logits[0], "pred_masks": mask_logits[0]}
    [[(queries, objects)]] = HungarianMatcher(2.0, 5.0, 5.0, 100)(Predictions.from_outputs(outputs), [target])
    assert queries.tolist() == [4, 1]
    assert objects.tolist() == [0, 1]


def test_more_objects_than_queries() -> None:
    many = [Targets(torch.zeros(9, dtype=torch.int64), boxes(*[(i, i, i + 8, i + 9) for i in range(9)]))]
    predictions = random_predictions(pictures=1)
    matches = HungarianMatcher(2.0, 5.0, 5.0, 100)(predictions, many)
    assert [len(layer[0][0]) for layer in matches] == [Q, Q]
    assert all(math.isfinite(loss) for loss in make_criterion()(predictions, many).values())


@pytest.mark.parametrize("what", ["a class", "a mask"])
def test_predictions_that_are_not_finite(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """The picture is named and all losses are NaN, for a query without an object too; the next pictures are as ever."""
    predictions, broken = random_predictions(), random_predictions()
    if what == "a class":
        broken.class_logits[0, 1, 0, 0] = math.nan
    else:
        broken.mask_embeddings[1, 1, 5] = math.inf
    pictures = targets()
    pictures[1].name = "second.jpg"
    criterion = make_criterion()
    losses = criterion(broken, pictures)
    assert all(math.isnan(loss) for loss in losses.values())
    assert caplog.messages == ["the predictions for second.jpg are not finite"]
    assert losses.keys() == criterion(predictions, pictures).keys()
    assert all(math.isfinite(loss) for loss in criterion(predictions, pictures).values())


def test_loss_of_the_last_layer_alone_without_deep_supervision() -> None:
    predictions = random_predictions(layers=3)
    deep = make_criterion()(predictions, targets())
    shallow = make_criterion(deep_supervision=False)(predictions, targets())
    names = {"loss_ce", "loss_mask", "loss_dice"}
    assert set(shallow) == names
    assert set(deep) == names | {f"{name}_{layer}" for name in names for layer in range(2)}


def test_class_loss_is_the_weighted_cross_entropy() -> None:
    predictions = random_predictions(layers=1)
    criterion = make_criterion(no_object_weight=0.1, class_weight=2.0)
    torch.manual_seed(1)
    loss = criterion(predictions, targets())["loss_ce"]
    torch.manual_seed(1)
    [matches] = criterion.matcher(predictions, targets())
    total, weight = 0.0, 0.0
    for picture, (target, (queries, objects)) in enumerate(zip(targets(), matches, strict=True)):
        log_probabilities = predictions.class_logits[0, picture].log_softmax(-1)
        expected = dict(zip(queries.tolist(), target.classes[objects].tolist(), strict=True))
        for query in range(Q):
            w = 1.0 if query in expected else 0.1
            total -= w * log_probabilities[query, expected.get(query, K)].item()
            weight += w
    assert loss.item() == pytest.approx(2.0 * total / weight, rel=1e-5)


def test_targets_are_padded_and_bitmasks_are_read() -> None:
    instances = Instances((10, 12))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = BitMasks(torch.ones(1, 10, 12, dtype=torch.bool))
    [target] = prepare_targets([{"instances": instances, "file_name": "a.jpg"}], (16, 16), torch.device("cpu"))
    assert target.masks.shape == (1, 16, 16)
    assert target.masks.sum() == 120
    assert target.name == "a.jpg"
    polygons = Instances((10, 12))
    polygons.gt_classes, polygons.gt_masks = torch.tensor([1]), PolygonMasks([[[0, 0, 5, 0, 5, 5]]])
    with pytest.raises(TypeError, match="bitmask"):
        prepare_targets([{"instances": polygons}], (16, 16), torch.device("cpu"))


def sample(*corners: tuple[int, int, int, int]) -> dict[str, Any]:
    instances = Instances((64, 64))
    instances.gt_masks = boxes(*corners, size=(64, 64))
    instances.gt_classes = torch.zeros(len(corners), dtype=torch.int64)
    return {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), "instances": instances}


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([[(4, 4, 40, 40)], [(0, 0, 20, 60), (30, 10, 60, 30)]], id="objects"),
        pytest.param([[(4, 4, 40, 40)], []], id="one picture is empty"),
        pytest.param([[], []], id="all pictures are empty"),
    ],
)
def test_losses_are_finite_and_reach_every_parameter(batch: list[list[tuple[int, int, int, int]]]) -> None:
    model = build_tiny_model().train()
    losses = model([sample(*corners) for corners in batch])
    assert len(losses) == 3 * 3
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
