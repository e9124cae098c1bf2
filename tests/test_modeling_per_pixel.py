"""The per-pixel baselines, in Detectron2's ``SemanticSegmentor``."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from published_keys import built_keys, published_keys
from test_engine_train import RECIPE
from tiny_dataset import tiny_dataset
from tiny_nuclei_model import one_thread, tiny_config
from torch import Tensor, nn

from mask2former.engine import load_recipe, train
from mask2former.errors import UserError
from mask2former.modeling import PerPixelBaselineHead, PerPixelBaselinePlusHead, StandardTransformerDecoder

K, IGNORED = 3, 255


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Given(nn.Module):
    """Pixel decoder and transformer decoder in one: gives what it was made with."""

    def __init__(self, mask_features: Tensor | None = None, layers: list[Tensor] | None = None) -> None:
        super().__init__()
        self.mask_features, self.layers = mask_features, layers

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Any, None, list[Tensor]]:
        return self.mask_features, None, []

    def forward(self, x: Tensor, mask_features: Tensor) -> dict[str, Any]:
        *earlier, last = [{"pred_masks": masks} for masks in self.layers]
        return {**last, "aux_outputs": earlier}


SHAPES = {"res5": ShapeSpec(channels=4, stride=32), "res2": ShapeSpec(channels=4, stride=4)}
FEATURES = {"res2": torch.zeros(2, 4, 8, 10), "res5": torch.zeros(2, 4, 1, 2)}


def labels() -> Tensor:
    targets = torch.randint(0, K, (2, 32, 40))
    targets[:, :5] = IGNORED
    return targets


def expected_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The paper's: cross-entropy at the picture's size, mean over pixels that have a class."""
    resized = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    return F.cross_entropy(resized, targets, ignore_index=IGNORED)


def test_baseline_classifies_mask_features() -> None:
    mask_features, targets = torch.randn(2, 6, 8, 10), labels()
    head = PerPixelBaselineHead(
        SHAPES,
        num_classes=K,
        pixel_decoder=Given(mask_features),
        mask_dim=6,
        loss_weight=2.0,
        ignore_value=IGNORED,
    )
    logits = F.conv2d(mask_features, head.predictor.weight, head.predictor.bias)
    nothing, losses = head.train()(FEATURES, targets)
    assert nothing is None and set(losses) == {"loss_sem_seg"}
    torch.testing.assert_close(losses["loss_sem_seg"], 2 * expected_loss(logits, targets))
    result, losses = head.eval()(FEATURES)
    assert losses == {}
    expected = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(result, expected)


def plus_head(layers: list[Tensor], **values: Any) -> PerPixelBaselinePlusHead:
    """A head whose transformer decoder gives these logits, layer by layer."""
    return PerPixelBaselinePlusHead(
        SHAPES,
        num_classes=K,
        pixel_decoder=Given(),
        transformer_predictor=Given(layers=layers),
        transformer_in_feature="res5",
        ignore_value=IGNORED,
        **values,
    )


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_plus_trains_every_layer(deep_supervision: bool) -> None:
    layers, targets = [torch.randn(2, K, 8, 10) for _ in range(3)], labels()
    head = plus_head(layers, deep_supervision=deep_supervision, loss_weight=0.5)
    _, losses = head.train()(FEATURES, targets)
    expected = {"loss_sem_seg": layers[2]}
    if deep_supervision:
        expected |= {"loss_sem_seg_0": layers[0], "loss_sem_seg_1": layers[1]}
    assert losses.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(losses[name], 0.5 * expected_loss(logits, targets))
    result, _ = head.eval()(FEATURES)
    torch.testing.assert_close(result, F.interpolate(layers[2], scale_factor=4, mode="bilinear", align_corners=False))


def test_pixels_that_the_backbone_adds_have_no_loss() -> None:
    """Pictures of 30 x 37 pixels have features of 8 x 10 cells."""
    layers, targets = [torch.randn(2, K, 8, 10)], labels()[:, :30, :37]
    head = plus_head(layers)
    _, losses = head(FEATURES, targets)
    resized = F.interpolate(layers[0], scale_factor=4, mode="bilinear", align_corners=False)[..., :30, :37]
    torch.testing.assert_close(losses["loss_sem_seg"], F.cross_entropy(resized, targets, ignore_index=IGNORED))


def test_targets_are_needed_in_training() -> None:
    head = PerPixelBaselineHead(SHAPES, num_classes=K, pixel_decoder=Given(torch.zeros(2, 6, 8, 10)), mask_dim=6)
    with pytest.raises(ValueError, match="sem_seg"):
        head.train()(FEATURES)


def test_baseline_has_the_published_weights() -> None:
    options = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]
    options += ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"]
    recipe = "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml"
    assert built_keys(recipe, options) == published_keys("per_pixel_r50_ade20k")


def config(head: str, pixel_decoder: str = "BasePixelDecoder", source: str = "res5") -> CfgNode:
    cfg = tiny_config()
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.SEM_SEG_HEAD.NAME = head
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = pixel_decoder
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = IGNORED
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = K
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = K
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = source
    cfg.MODEL.MASK_FORMER.PRE_NORM = True  # post-norm, the first layer's self-attention of zeros has no gradient
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.0
    return cfg


def sample(height: int, width: int, label: int | None = None) -> dict[str, Tensor]:
    targets = torch.randint(0, K, (height, width)) if label is None else torch.full((height, width), label)
    return {"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8), "sem_seg": targets}


MODELS = [
    ("PerPixelBaselineHead", "BasePixelDecoder", "res5"),
    ("PerPixelBaselineHead", "MSDeformAttnPixelDecoder", "res5"),
    ("PerPixelBaselinePlusHead", "BasePixelDecoder", "res5"),
    ("PerPixelBaselinePlusHead", "TransformerEncoderPixelDecoder", "transformer_encoder"),
]


@pytest.mark.parametrize(("head", "pixel_decoder", "source"), MODELS)
def test_trains_and_segments(head: str, pixel_decoder: str, source: str) -> None:
    """Pictures of two sizes, neither of them a multiple of the strides, one of them without a label."""
    model = build_model(config(head, pixel_decoder, source)).train()
    batch = [sample(70, 90), sample(66, 75, IGNORED)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(4):
        losses = model(batch)
        assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
        values.append(losses["loss_sem_seg"].item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        optimizer.step()
    assert values[-1] < values[0]
    assert ("loss_sem_seg_1" in losses) == (head == "PerPixelBaselinePlusHead")
    with torch.inference_mode():
        results = model.eval()([{**batch[0], "height": 35, "width": 45}, batch[1]])
    assert [result["sem_seg"].shape for result in results] == [(K, 35, 45), (K, 66, 75)]


def test_pictures_without_labels_have_no_loss() -> None:
    model = build_model(config("PerPixelBaselineHead")).train()
    losses = model([sample(64, 64, IGNORED)])
    losses["loss_sem_seg"].backward()
    assert losses["loss_sem_seg"] == 0
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None)


@pytest.mark.parametrize("head", ["PerPixelBaselineHead", "PerPixelBaselinePlusHead"])
def test_losses_stay_float32_under_autocast(head: str) -> None:
    model = build_model(config(head)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([sample(64, 64)])
        result = model.eval()([sample(64, 64)])[0]["sem_seg"]
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    assert result.dtype == torch.float32 and torch.isfinite(result).all()


def test_config_reaches_the_heads() -> None:
    cfg = config("PerPixelBaselinePlusHead")
    cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT = 3.0
    cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = False
    plus = build_model(cfg).sem_seg_head
    assert isinstance(plus, PerPixelBaselinePlusHead) and isinstance(plus.predictor, StandardTransformerDecoder)
    assert (plus.loss_weight, plus.ignore_value, plus.deep_supervision) == (3.0, IGNORED, False)
    assert not any("class_embed" in name for name in plus.state_dict())
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PerPixelBaselineHead"
    baseline = build_model(cfg).sem_seg_head
    assert (baseline.loss_weight, baseline.ignore_value, baseline.predictor.out_channels) == (3.0, IGNORED, K)


def test_queries_other_than_classes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config("PerPixelBaselinePlusHead")
    build_model(cfg)
    assert "NUM_OBJECT_QUERIES" not in caplog.text
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = K - 1
    with caplog.at_level(logging.WARNING):
        model = build_model(cfg).train()
    assert "NUM_OBJECT_QUERIES, 2, to MODEL.SEM_SEG_HEAD.NUM_CLASSES, 3" in caplog.text
    with pytest.raises(UserError, match="NUM_OBJECT_QUERIES, 2, to .*NUM_CLASSES, 3"):
        model([sample(64, 64)])


@pytest.mark.parametrize("head", ["PerPixelBaselineHead", "PerPixelBaselinePlusHead"])
def test_a_recipe_trains_and_evaluates(head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From files: the semantic mapper's samples have what the head is trained with."""
    caplog.set_level(logging.INFO, logger="mask2former")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    options = {
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.SEM_SEG_HEAD.NAME": head,
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
        "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5",
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": "3",
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": "False",
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": "False",
        "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "SOLVER.MAX_ITER": "2",
        "SOLVER.STEPS": "()",
        "OUTPUT_DIR": str(tmp_path / "output"),
    }
    (tmp_path / "output").mkdir()
    with tiny_dataset(tmp_path / "data"), one_thread():
        arguments = [word for option in options.items() for word in option]
        results = train(replace(load_recipe(str(tmp_path / "recipe.yaml"), arguments), log_period=1))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    # A head with one loss has it as total_loss.
    assert ("  loss_sem_seg " in caplog.text) == (head == "PerPixelBaselinePlusHead")
