"""Backbones of the timm library in Detectron2's form."""

import pytest
import torch
from torch import nn

from mask2former.config import get_default_config
from mask2former.errors import UserError
from mask2former.modeling import TimmBackbone

pytest.importorskip("timm", reason="needs timm")


def test_feature_maps_have_the_strides_and_channels_promised() -> None:
    backbone = TimmBackbone(name="efficientnet_lite0", out_features=["res2", "res3", "res5"]).eval()
    with torch.inference_mode():
        features = backbone(torch.zeros(1, 3, 64, 96))
    assert list(features) == ["res2", "res3", "res5"]
    for name, shape in backbone.output_shape().items():
        assert features[name].shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert backbone.size_divisibility == 32


def test_what_becomes_of_batch_norms() -> None:
    def norms(norm: str) -> list[nn.BatchNorm2d]:
        backbone = TimmBackbone(name="efficientnet_lite0", norm=norm).train()
        return [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]

    assert all(module.training and module.weight.requires_grad for module in norms("BN"))
    frozen = norms("FrozenBN")
    assert frozen
    assert not any(module.training or module.weight.requires_grad for module in frozen)
    assert norms("folded") == []


def test_built_from_a_config() -> None:
    from detectron2.modeling import build_backbone

    cfg = get_default_config()
    cfg.MODEL.BACKBONE.NAME = "TimmBackbone"
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.OUT_FEATURES = "resnet18", ["res3", "res4"]
    cfg.MODEL.TIMM.NORM, cfg.MODEL.TIMM.BN_EPS = "BN", 0.25
    backbone = build_backbone(cfg)
    assert {name: shape.channels for name, shape in backbone.output_shape().items()} == {"res3": 128, "res4": 256}
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.eps == 0.25 and norm.weight.requires_grad for norm in norms)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="similar names: .*efficientnet"):
        TimmBackbone(name="efficientnet_lit0")
    with pytest.raises(UserError, match="strides"):
        TimmBackbone(name="vit_tiny_patch16_224", out_features=["res2"])
    with pytest.raises(UserError, match="folded"):
        TimmBackbone(name="resnet18", norm="GN")
