"""Activation checkpointing: less memory, and the losses, gradients and statistics of the plain step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from config_keys import SWIN, H, M, S, build, train_sample
from detectron2.config import instantiate
from recipe_parts import load
from test_engine_accumulation import accumulated_gradients, batch
from test_engine_accumulation import build as build_for_accumulation
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mask2former.errors import UserError
from mask2former.modeling.checkpointing import PARTS, checkpoint_activations

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

KEY = f"{M}ACTIVATION_CHECKPOINTING"
ALL = list(PARTS)
MASK_FORMER = {
    f"{H}PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
    f"{M}TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
    f"{M}TRANSFORMER_IN_FEATURE": "transformer_encoder",
    f"{M}ENC_LAYERS": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "frozen norms": {},
    "batch norms": {"MODEL.RESNETS.NORM": "BN", f"{H}NORM": "BN"},
    "Swin": {**SWIN, f"{S}DROP_PATH_RATE": 0.5, f"{S}DROP_RATE": 0.1, f"{S}ATTN_DROP_RATE": 0.1},
    "timm": {"MODEL.BACKBONE.NAME": "TimmBackbone", "MODEL.TIMM.NORM": "BN"},
    "MaskFormer": MASK_FORMER,
}


class Step:
    """A training step: losses, gradients, buffers and how many bytes are kept for the backward pass."""

    def __init__(self, model: nn.Module, autocast: bool = False) -> None:
        torch.manual_seed(1)
        self.kept = 0
        known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def count(x: Tensor) -> Tensor:
            address = x.untyped_storage().data_ptr()
            if address not in known:
                known.add(address)
                held.append(x)  # so that no other gets its address
                self.kept += x.untyped_storage().nbytes()
            return x

        held: list[Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            self.losses = model.train()([train_sample(), train_sample()])
        sum(self.losses.values()).backward()
        self.random = torch.rand(3)  # what comes behind the step
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.buffers = dict(model.named_buffers())


def same(first: Step, second: Step) -> None:
    """To the bit."""
    for what in ("losses", "gradients", "buffers", "random"):
        torch.testing.assert_close(getattr(first, what), getattr(second, what), rtol=0, atol=0)


@pytest.mark.parametrize("parts", [*([part] for part in ALL), ALL], ids=" and ".join)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_plain_step(name: str, parts: list[str]) -> None:
    """And so are dropout, stochastic depth and the statistics of batch norms."""
    if name == "timm":
        pytest.importorskip("timm", reason="needs timm")
    plain = Step(build(MODELS[name]))
    checkpointed = Step(build({**MODELS[name], KEY: parts}))
    same(checkpointed, plain)
    assert checkpointed.kept < plain.kept


def test_under_autocast() -> None:
    same(Step(build({KEY: ALL}), autocast=True), Step(build(), autocast=True))


def test_with_accumulation() -> None:
    plain, checkpointed = (
        accumulated_gradients(build_for_accumulation(**{KEY.replace(".", "__"): parts}), batch(), 2)
        for parts in ([], ALL)
    )
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_nothing_inside_a_block_is_kept(norm: str) -> None:
    """Convolutions with frozen norms, too, which pack by themselves what they keep."""

    def kept_inside(parts: list[str]) -> set[bool]:
        stage = build({"MODEL.RESNETS.NORM": norm, KEY: parts}).train().backbone.res3
        inside = []
        for block in stage:
            for conv in (block.conv2, block.conv3):
                conv.register_forward_pre_hook(lambda _, x: inside.append(StorageWeakRef(x[0].untyped_storage())))
        output = stage(torch.randn(1, 16, 16, 16, requires_grad=True))
        assert output.requires_grad and len(inside) == 8
        return {not storage.expired() for storage in inside}

    assert kept_inside([]) == {True}
    assert kept_inside(["backbone"]) == {False}


def test_published_key_of_swin() -> None:
    """It does what "backbone" does."""
    published, ours, plain = (
        Step(build({**MODELS["Swin"], **values})) for values in ({f"{S}USE_CHECKPOINT": True}, {KEY: ["backbone"]}, {})
    )
    same(published, ours)
    assert published.kept == ours.kept < plain.kept


def test_nothing_is_computed_twice_without_gradients() -> None:
    model = build({KEY: ALL}).eval()
    calls = []
    model.backbone.res3[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model([train_sample()])
    assert len(calls) == 1


def test_lazy_config() -> None:
    config = load("lazy/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.py").config.model
    config.activation_checkpointing = ["backbone", "pixel_decoder"]
    with torch.device("meta"):
        model = instantiate(config)
    switched_on = {name: parts_on(model.get_submodule(path)) for name, path in PARTS.items()}
    assert all(switched_on["backbone"]) and len(switched_on["backbone"]) == 4
    assert all(switched_on["pixel_decoder"]) and len(switched_on["pixel_decoder"]) == 2
    assert switched_on["transformer_decoder"] == [False]


def parts_on(module: nn.Module) -> list[bool]:
    return [part.checkpointing for part in module.modules() if hasattr(part, "checkpointing")]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["backbones"], r"is \['backbones'\], expected some of backbone, pixel_decoder, transformer_decoder"),
        (["backbone"], "Linear has no layers for activation checkpointing: take 'backbone' out"),
    ],
)
def test_parts_that_can_not_be(parts: Sequence[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checkpoint_activations(nn.ModuleDict({"backbone": nn.Linear(1, 1)}), parts)


def test_per_pixel_heads_say_that_they_have_none() -> None:
    values = {f"{H}NAME": "PerPixelBaselineHead", "MODEL.META_ARCHITECTURE": "SemanticSegmentor"}
    with pytest.raises(UserError, match="needs MaskFormer"):
        build({**values, f"{H}PIXEL_DECODER_NAME": "BasePixelDecoder", KEY: ["backbone"]})
