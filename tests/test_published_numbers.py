"""The R50 panoptic recipe computes what the published code computes, on weights made from names.

The figures in ``tests/data/r50_coco_panoptic*`` were taken from the published code in float32 on a CPU.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from reference_weights import load_reference_weights, reference_image, reference_targets
from torch import nn

from mask2former.engine import load_config

pytestmark = pytest.mark.usefixtures("two_threads")

DATA = Path(__file__).parent / "data"
RECIPE = "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"


@pytest.fixture(scope="module")
def figures() -> Any:
    return np.load(DATA / "r50_coco_panoptic.npz")


@pytest.fixture(scope="module")
def model(figures: Any, repository: Path) -> nn.Module:
    cfg = load_config(str(repository / RECIPE), [str(option) for option in figures["opts"]])
    model = build_model(cfg)
    load_reference_weights(model)
    return model


@pytest.fixture(scope="module")
def batch(figures: Any) -> list[dict[str, Any]]:
    """Two pictures of different sizes in one batch, so that padding is tested; results at yet other sizes."""
    return [
        {
            "image": torch.from_numpy(reference_image(height, width, seed=1 + index)),
            "height": height * 3 // 2,
            "width": width * 5 // 4,
        }
        for index, (height, width) in enumerate(figures["sizes"].tolist())
    ]


@pytest.fixture(scope="module")
def predictions(model: nn.Module, batch: list[dict[str, Any]]) -> Any:
    captured = []
    handle = model.sem_seg_head.register_forward_hook(lambda module, inputs, output: captured.append(output))
    with torch.inference_mode():
        model.eval()(batch)
    handle.remove()
    return captured[0]


@pytest.fixture(scope="module")
def results(model: nn.Module, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with torch.inference_mode():
        return model.eval()(batch)


def assert_close(ours: torch.Tensor, theirs: np.ndarray, quantile: float, limit: float, largest: float) -> None:
    difference = np.abs(ours.numpy() - theirs)
    assert np.quantile(difference, quantile) <= limit
    assert difference.max() <= largest


def test_state_dict_has_the_published_names_and_shapes(model: nn.Module) -> None:
    with gzip.open(DATA / "r50_coco_panoptic.keys.json.gz", "rt") as file:
        published = json.load(file)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == published


def test_class_logits(predictions: Any, figures: Any) -> None:
    assert_close(predictions["pred_logits"], figures["pred_logits"], 0.99, 2e-4, 5e-3)
    aux = torch.stack([layer["pred_logits"] for layer in predictions["aux_outputs"]])
    assert_close(aux[:, :, ::7, ::5], figures["aux_logits"], 0.99, 2e-4, 5e-3)


def test_mask_logits(predictions: Any, figures: Any) -> None:
    assert_close(predictions["pred_masks"][:, ::4], figures["pred_masks"], 0.99, 5e-4, np.inf)
    means = torch.stack([layer["pred_masks"].mean((2, 3)) for layer in predictions["aux_outputs"]])
    assert_close(means, figures["aux_masks_mean"], 0.99, 5e-4, np.inf)


@pytest.mark.parametrize("picture", [0, 1])
def test_panoptic_result(results: list[dict[str, Any]], figures: Any, picture: int) -> None:
    ids, segments = results[picture]["panoptic_seg"]
    assert (ids.numpy() == figures[f"panoptic_{picture}"]).mean() >= 0.999
    described = [[segment["id"], int(segment["isthing"]), segment["category_id"]] for segment in segments]
    assert described == figures[f"panoptic_info_{picture}"].tolist()


@pytest.mark.parametrize("picture", [0, 1])
def test_semantic_result(results: list[dict[str, Any]], figures: Any, picture: int) -> None:
    scores = results[picture]["sem_seg"]
    assert (scores.argmax(0).numpy() == figures[f"sem_argmax_{picture}"]).mean() >= 0.999
    np.testing.assert_allclose(scores.mean((1, 2)).numpy(), figures[f"sem_mean_{picture}"], atol=1e-3)


@pytest.mark.parametrize("picture", [0, 1])
def test_instance_result(results: list[dict[str, Any]], figures: Any, picture: int) -> None:
    instances = results[picture]["instances"]
    order = np.argsort(-figures[f"scores_{picture}"], kind="stable")
    assert_close(instances.scores, figures[f"scores_{picture}"][order], 0.9, 1e-4, 5e-3)
    assert (instances.pred_classes.numpy() == figures[f"classes_{picture}"][order]).mean() >= 0.95
    published = figures[f"mask_area_{picture}"][order]
    areas = instances.pred_masks.flatten(1).sum(1).numpy()
    difference = np.abs(areas - published) / np.maximum(published, 1)
    assert np.quantile(difference, 0.9) <= 0.005
    assert difference.max() <= 0.05


@pytest.mark.slow
def test_losses(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    published = json.loads((DATA / "r50_coco_panoptic_losses.json").read_text())
    samples = []
    for index, sample in enumerate(batch):
        height, width = sample["image"].shape[1:]
        classes, masks = reference_targets(height, width, model.criterion.num_classes, seed=1 + index)
        instances = Instances((height, width))
        instances.gt_classes = torch.from_numpy(classes)
        instances.gt_masks = torch.from_numpy(masks)
        samples.append({"image": sample["image"], "instances": instances})
    losses: dict[str, list[float]] = {}
    with torch.no_grad():
        model.train()
        for seed in range(8):
            torch.manual_seed(seed)
            for name, loss in model(samples).items():
                losses.setdefault(name, []).append(loss.item())
    assert losses.keys() == published.keys()
    for name, (mean, deviation) in published.items():
        assert abs(np.mean(losses[name]) - mean) <= 4 * deviation / np.sqrt(8) + 0.01 * mean, name
