"""Nothing that a model keeps between calls outlives a training step, a load or a move."""

import copy
from typing import Any

import pytest
import torch
from config_keys import SWIN, M, build, picture, train_sample
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

TIMM = {"MODEL.BACKBONE.NAME": "TimmBackbone", "MODEL.TIMM.NAME": "efficientnet_lite0"}
KINDS: dict[str, dict[str, Any]] = {
    "R50, frozen norms": {},
    "R50, all results in tiles": {f"{M}TEST.TILE_SIZE": 64, f"{M}TEST.TILE_OVERLAP": 16},
    "Swin": SWIN,
    "EfficientNet, folded norms": {**TIMM, "MODEL.TIMM.NORM": "folded"},
    "EfficientNet, frozen norms": {**TIMM, "MODEL.TIMM.NORM": "FrozenBN"},
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    if request.param.startswith("EfficientNet"):
        pytest.importorskip("timm", reason="needs timm")
    return build(KINDS[request.param]).eval()


def scores(model: nn.Module) -> list[Tensor]:
    """Of pictures of two sizes, one after the other."""
    with torch.inference_mode():
        return [model.eval()([picture(*size)])[0]["sem_seg"] for size in ((64, 96), (50, 70))]


def train_a_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.01)
    sum(model.train()([train_sample()]).values()).backward()
    optimizer.step()


def without_history(model: nn.Module, untouched: nn.Module) -> nn.Module:
    """A model that has never run, with the weights of one that has."""
    fresh = copy.deepcopy(untouched)
    fresh.load_state_dict(model.state_dict())
    return fresh


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_evaluate_train_evaluate(model: nn.Module) -> None:
    untouched, names = copy.deepcopy(model), list(model.state_dict())
    before = scores(model)
    train_a_step(model)
    after = scores(model)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert_same(after, scores(without_history(model, untouched)))
    assert list(model.state_dict()) == names


def test_evaluate_load_evaluate(model: nn.Module) -> None:
    untouched, trained = copy.deepcopy(model), copy.deepcopy(model)
    before = scores(model)
    train_a_step(trained)
    model.load_state_dict(trained.state_dict())
    after = scores(model)
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert_same(after, scores(without_history(trained, untouched)))


def test_evaluate_move_evaluate(model: nn.Module) -> None:
    names, before = list(model.state_dict()), scores(model)
    with torch.inference_mode():
        maps = model.double().backbone(model.preprocess([picture()]).tensor)
    assert {x.dtype for x in maps.values()} == {torch.float64}
    assert {x.dtype for x in model.state_dict().values() if x.is_floating_point()} == {torch.float64}
    assert_same(scores(model.float()), before)
    assert list(model.state_dict()) == names


def test_hooks_on_frozen_norms_are_called_before_and_after_a_step() -> None:
    model = build()
    norms = [name for name, _ in model.backbone.named_modules() if name.endswith("norm")]
    calls: list[str] = []
    for name in norms:
        model.backbone.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    model.eval()
    hooked = scores(model)
    assert norms and sorted(calls) == sorted(2 * norms)
    torch.testing.assert_close(hooked, scores(build()), atol=1e-4, rtol=1e-3)
    train_a_step(model)
    calls.clear()
    scores(model)
    assert sorted(calls) == sorted(2 * norms)
