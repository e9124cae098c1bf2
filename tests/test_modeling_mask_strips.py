"""Results made in strips against the plain way: whole masks, resized with F.interpolate."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling import InferenceSettings, Predictions, mask_strips
from mask2former.modeling.inference import InstanceCandidates, instance_candidates, postprocess
from mask2former.ops import extension

# (height, width) of the padded picture, of the picture, of the results.
SIZES = [
    ((64, 96), (64, 96), (64, 96)),
    ((64, 96), (50, 90), (50, 90)),
    ((64, 96), (50, 90), (117, 201)),
    ((64, 96), (50, 90), (31, 17)),
    ((64, 96), (64, 90), (64, 200)),
    ((32, 32), (1, 1), (7, 5)),
]


@pytest.fixture(params=[True, False])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compiled kernels, where there are any, and in plain PyTorch."""
    if not request.param:
        monkeypatch.setattr(extension, "KERNELS", frozenset())
    elif "cpu" not in extension.KERNELS:
        pytest.skip(f"no CPU kernels: {extension.reason('cpu')}")


@pytest.fixture(params=[1, 500, 1 << 20])
def strip_values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One row a strip, some, and all."""
    monkeypatch.setitem(mask_strips.STRIP_VALUES, "cpu", request.param)
    return request.param


def resized(logits: Tensor, padded: tuple[int, int], valid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Both interpolations, whole."""
    masks = F.interpolate(logits[None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[..., : valid[0], : valid[1]]
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("sizes", SIZES)
def test_strips_are_parts_of_the_resized_masks(sizes: tuple, strip_values: int) -> None:
    logits = torch.randn(5, sizes[0][0] // 4, sizes[0][1] // 4, generator=torch.Generator().manual_seed(0))
    strips = list(mask_strips.mask_strips(logits, *sizes))
    assert [row for rows, _ in strips for row in range(rows.start, rows.stop)] == list(range(sizes[2][0]))
    joined = torch.cat([strip.logits for _, strip in strips], dim=1)
    torch.testing.assert_close(joined, resized(logits, *sizes), atol=1e-5, rtol=0)


def random_predictions() -> Predictions:
    """Ten queries; some are sure of a class."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 1, 10, 6, generator=generator)
    features = F.interpolate(torch.randn(1, 8, 4, 6, generator=generator), scale_factor=4, mode="bicubic")
    return Predictions(logits, torch.randn(1, 1, 10, 8, generator=generator), features)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sizes", SIZES[:5])
def test_results_equal_the_plain_way(sizes: tuple, strip_values: int) -> None:
    predictions = random_predictions()
    settings = InferenceSettings(
        semantic_on=True, panoptic_on=True, instance_on=True, object_mask_threshold=0.3, overlap_threshold=0.3
    )
    results = postprocess(predictions, 0, sizes, settings)
    class_logits = predictions.class_logits[-1, 0]
    masks = resized(predictions.mask_logits(-1, 0), *sizes)
    probabilities = masks.sigmoid()

    scores = torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], probabilities)
    torch.testing.assert_close(results["sem_seg"], scores, atol=1e-5, rtol=0)

    best, classes = class_logits.softmax(-1).max(-1)
    kept = torch.nonzero((classes < 5) & (best > 0.3))[:, 0]
    winner = kept[(best[kept, None, None] * probabilities[kept]).argmax(0)]
    ids, segments = results["panoptic_seg"]
    assert len(segments) > 1
    for segment in segments:
        (query,) = winner[ids == segment["id"]].unique().tolist()
        assert (classes[query].item(), best[query].item()) == (segment["category_id"], segment["score"])
        expected = (winner == query) & (probabilities[query] >= 0.5)
        assert (expected != (ids == segment["id"])).float().mean() < 1e-3  # rounding may move a pixel

    instances = results["instances"]
    candidates: InstanceCandidates = instance_candidates(class_logits, settings)
    binary = masks > 0
    quality = (probabilities * binary).sum((1, 2)) / (binary.sum((1, 2)) + 1e-6)
    scores, order = (candidates.scores * quality[candidates.queries]).sort(descending=True)
    torch.testing.assert_close(instances.scores, scores, atol=1e-5, rtol=0)
    assert (instances.pred_masks != binary[candidates.queries[order]]).float().mean() < 1e-3
    for mask, box in zip(instances.pred_masks, instances.pred_boxes.tensor.tolist(), strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0] * 4
        assert box == [float(x) for x in around]


@pytest.mark.usefixtures("kernels")
def test_gradients_go_through_semantic_scores() -> None:
    predictions = random_predictions()
    predictions.class_logits.requires_grad_()
    results = postprocess(predictions, 0, SIZES[0], InferenceSettings(instance_on=True, panoptic_on=True))
    results["sem_seg"].square().sum().backward()
    assert predictions.class_logits.grad is not None and predictions.class_logits.grad.abs().sum() > 0


def test_no_queries_are_wanted() -> None:
    """Nothing is sure enough for a segment."""
    settings = InferenceSettings(semantic_on=False, panoptic_on=True, object_mask_threshold=1.1)
    ids, segments = postprocess(random_predictions(), 0, SIZES[1], settings)["panoptic_seg"]
    assert ids.shape == (50, 90) and ids.dtype == torch.int32 and not ids.any() and segments == []


def test_order_of_masks_without_a_copy() -> None:
    from mask2former.modeling.inference import _reordered

    masks = torch.arange(7)[:, None, None].expand(7, 2, 3).clone()
    in_full = [[0, 1, 2, 3, 4, 5, 6], [3, 0, 1, 2, 5, 4, 6], [6, 5, 4, 3, 2, 1, 0]]
    for order in (*in_full, [6, 2, 0, 5], [1, 2, 3, 4, 5, 0], [2, 4], []):
        index = torch.tensor(order, dtype=torch.int64)
        assert torch.equal(_reordered(masks.clone(), index), masks[index])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sizes", SIZES[:5])
@pytest.mark.parametrize("others", [True, False])
def test_labels_are_the_best_classes_of_the_scores(sizes: tuple, others: bool, strip_values: int) -> None:
    """Beside other results and alone, where scores are resized as sums, and with rounding of strips."""
    settings = InferenceSettings(panoptic_on=others, instance_on=others)
    scores = postprocess(random_predictions(), 0, sizes, settings)["sem_seg"]
    labels = postprocess(random_predictions(), 0, sizes, replace(settings, semantic_labels=True))["sem_seg"]
    assert labels.shape == sizes[2] and labels.dtype == torch.int32 and len(labels.unique()) > 1
    best, second = scores.topk(2, dim=0).values
    assert torch.equal(labels.long()[best - second > 1e-5], scores.argmax(0)[best - second > 1e-5])


@pytest.mark.slow
def test_memory_of_labels_is_that_of_the_results(repository: Path) -> None:
    """Scores, 133 classes at 2000 x 2500, would be 2.66 GB; masks of 100 instances are 0.5."""
    options = "--only labels --size 2000 2500 --input 256 320 --threads 1"
    child = [sys.executable, "-W", "ignore", str(repository / "benchmarks" / "results_memory.py"), *options.split()]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["results"] == 2000 * 2500 * (100 + 4 + 4)
    assert figures["added"] < 1.25 * figures["results"] + 200e6
