"""torch.compile takes backbones and heads whole: one graph for pictures of all sizes, with results as in eager mode."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.modeling import build_model
from tiny_nuclei_model import tiny_config
from torch import Tensor, nn

from mask2former.modeling import D2SwinTransformer, Predictions
from mask2former.ops import convolution, products

pytestmark = pytest.mark.slow

# Batch, height and width. The compiler takes equal numbers for one: at first no two of them are equal at any stride.
SHAPES = ((6, 160, 224), (4, 288, 160), (5, 352, 192))
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}

HEADS: dict[str, dict[str, Any]] = {
    "multi-scale deformable and masked attention": {},
    "a pyramid, masked attention": {"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder"},
    "MaskFormer's": {
        "SEM_SEG_HEAD.PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
        "MASK_FORMER.TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
        "MASK_FORMER.TRANSFORMER_IN_FEATURE": "transformer_encoder",
    },
}


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """Torch's compiler with nothing compiled before."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


def tiny_model(**values: Any) -> Any:
    """A small R50 model with one layer of each kind; dropout, which is random, is off."""
    cfg = tiny_config()
    layers = {"MASK_FORMER.DEC_LAYERS": 2, "MASK_FORMER.DROPOUT": 0.0}
    cfg.MODEL.merge_from_list([word for item in {**layers, **values}.items() for word in item])
    torch.manual_seed(0)
    return build_model(cfg)


def graphs_and_breaks(dynamo: Any) -> tuple[int, int]:
    """How many graphs the compiler has made, and where it could not go on."""
    counters = dynamo.utils.counters
    return counters["stats"]["unique_graphs"], len(counters["graph_break"])


def torchs_own(*_: Tensor | None) -> bool:
    return False


def compare(module: nn.Module, inputs: Any, results_of: Any) -> None:
    """Outputs and gradients of the module, compiled and not.

    Both with torch's own convolutions and products, as the compiler has them: where rounding takes a ReLU's input to
    the other side of 0, gradients jump.
    """
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for x in inputs:
        with (
            mock.patch.object(convolution, "kernels_take", torchs_own),
            mock.patch.object(products, "kernels_take", torchs_own),
        ):
            ours, expected = results_of(compiled(x)), results_of(module(x))
        torch.testing.assert_close(ours, expected)
        grads = [
            torch.autograd.grad(sum(x.square().sum() for x in results), trained, allow_unused=True)
            for results in (ours, expected)
        ]
        largest = max(grad.abs().max().item() for grad in grads[1] if grad is not None)  # some are rounding alone
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["R50", "Swin"])
def test_backbone_has_one_graph_for_all_sizes(dynamo: Any, name: str) -> None:
    torch.manual_seed(0)
    if name == "R50":
        backbone = tiny_model().backbone
    else:
        names = ("res2", "res3")
        backbone = D2SwinTransformer(
            embed_dim=8, depths=(2, 2), num_heads=(2, 2), drop_path_rate=0.0, out_features=names
        )
    shapes = SHAPES if name == "R50" else ((6, 160, 256), (4, 288, 160), (5, 352, 190))  # no whole number of windows
    pictures = [torch.randn(batch, 3, height, width) for batch, height, width in shapes]
    compare(backbone, pictures, lambda maps: list(maps.values()))
    assert graphs_and_breaks(dynamo) == (1, 0)


@pytest.mark.parametrize("name", HEADS)
def test_head_has_one_graph_for_all_sizes(dynamo: Any, name: str) -> None:
    model = tiny_model(**HEADS[name])
    channels = {feature: shape.channels for feature, shape in model.backbone.output_shape().items()}
    features = [
        {
            feature: torch.randn(batch, channels[feature], height // stride, width // stride)
            for feature, stride in STRIDES.items()
        }
        for batch, height, width in SHAPES
    ]
    compare(model.sem_seg_head, features, tensors_of)
    assert graphs_and_breaks(dynamo) == (1, 0)


def test_activation_checkpointing_is_part_of_the_graph(dynamo: Any) -> None:
    """With the statistics of batch norms, too."""
    resnet = {"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64, "RESNETS.NORM": "BN"}
    backbone = tiny_model(**{"MASK_FORMER.ACTIVATION_CHECKPOINTING": ["backbone"], **resnet}).backbone
    compare(backbone, [torch.randn(2, 3, 64, 96)], lambda maps: list(maps.values()))
    assert graphs_and_breaks(dynamo) == (1, 0)


@pytest.mark.parametrize("name", HEADS)
def test_head_in_bfloat16_has_one_graph(dynamo: Any, name: str) -> None:
    head = tiny_model(**HEADS[name]).eval().sem_seg_head
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for batch, height, width in SHAPES:
            features = {
                feature: torch.randn(batch, 16 * stride // 4, height // stride, width // stride, dtype=torch.bfloat16)
                for feature, stride in STRIDES.items()
            }
            ours, expected = tensors_of(compiled(features)), tensors_of(head(features))
            torch.testing.assert_close(ours, expected)
    assert graphs_and_breaks(dynamo) == (1, 0)


def tensors_of(predictions: Predictions) -> list[Tensor]:
    return [predictions.class_logits, predictions.mask_embeddings, predictions.mask_features]


def test_compiled_in_place_by_inductor(dynamo: Any) -> None:
    model = tiny_model(**{"RESNETS.DEPTH": 18, "RESNETS.RES2_OUT_CHANNELS": 64}).eval()  # fewer kernels than R50
    names = list(model.state_dict())
    # Not the smallest: torch takes another convolution, and another graph, for a few thousand numbers.
    pictures = [{"image": torch.randint(0, 256, (3, height, width))} for _, height, width in SHAPES[1:]]
    with torch.inference_mode():
        expected = [model([picture])[0]["sem_seg"] for picture in pictures]
        for part in (model.backbone, model.sem_seg_head):
            part.compile(fullgraph=True, dynamic=True)
        results = [model([picture])[0]["sem_seg"] for picture in pictures]
    assert list(model.state_dict()) == names
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one of each part
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
