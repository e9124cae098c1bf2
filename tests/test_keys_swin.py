"""Every key of the Swin backbone does what it does in the published code."""

from typing import Any

import pytest
import torch
from config_keys import SWIN, H, S, build, effect_of, names, train_sample
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


def swin(values: dict[str, Any]) -> nn.Module:
    return build({**SWIN, **{f"{S}{key}": value for key, value in values.items()}}).backbone


def outputs_of(backbone: nn.Module, training: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    backbone.train(training)
    with torch.no_grad():
        return list(backbone(torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))).values())


def differ(first: list[Tensor], second: list[Tensor]) -> bool:
    return any(not torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True))


@effect_of("MODEL.BACKBONE.NAME", f"{S}EMBED_DIM", f"{S}DEPTHS", f"{S}NUM_HEADS", f"{S}WINDOW_SIZE", f"{S}MLP_RATIO")
def test_shape_of_a_swin() -> None:
    shapes = names(swin({"EMBED_DIM": 24, "DEPTHS": [1, 2, 3, 1], "NUM_HEADS": [2, 4, 6, 8], "MLP_RATIO": 3.0}))
    assert shapes["patch_embed.proj.weight"] == [24, 3, 4, 4]
    assert shapes["layers.2.blocks.2.mlp.fc1.weight"] == [3 * 96, 96]
    assert "layers.2.blocks.3.mlp.fc1.weight" not in shapes
    assert shapes["layers.1.blocks.0.attn.relative_position_bias_table"] == [7 * 7, 4]
    table = names(swin({"WINDOW_SIZE": 6}))["layers.0.blocks.0.attn.relative_position_bias_table"]
    assert table == [11 * 11, 1]


@effect_of(f"{S}PATCH_SIZE")
def test_patch_size_of_a_swin() -> None:
    backbone = swin({"PATCH_SIZE": 2})
    assert names(backbone)["patch_embed.proj.weight"] == [16, 3, 2, 2]
    assert outputs_of(backbone)[0].shape[-2:] == (32, 48)


@effect_of(f"{S}OUT_FEATURES")
def test_out_features_of_a_swin() -> None:
    cfg = {**SWIN, f"{S}OUT_FEATURES": ["res3", "res5"], f"{H}IN_FEATURES": ["res3", "res5"]}
    cfg[f"{H}DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"] = ["res3", "res5"]
    cfg[f"{H}COMMON_STRIDE"] = 8
    backbone = build(cfg).backbone
    assert list(backbone.output_shape()) == ["res3", "res5"]
    assert {name.split(".")[0] for name in names(backbone) if name.startswith("norm")} == {"norm1", "norm3"}


@effect_of(f"{S}QKV_BIAS", f"{S}PATCH_NORM")
def test_optional_weights_of_a_swin() -> None:
    with_all, without = names(swin({})), names(swin({"QKV_BIAS": False, "PATCH_NORM": False}))
    missing = with_all.keys() - without.keys()
    assert {name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in missing} == {
        "qkv.bias",
        "norm.weight",
        "norm.bias",
    }


@effect_of(f"{S}QK_SCALE")
def test_scale_of_a_swins_attention() -> None:
    usual = outputs_of(swin({}))
    assert not differ(usual, outputs_of(swin({"QK_SCALE": 16**-0.5})))  # the default: head width ** -0.5
    assert differ(usual, outputs_of(swin({"QK_SCALE": 8.0})))


@effect_of(f"{S}APE", f"{S}PRETRAIN_IMG_SIZE")
def test_absolute_position_embedding_of_a_swin() -> None:
    assert not names(swin({}), "absolute_pos_embed")
    backbone = swin({"APE": True, "PRETRAIN_IMG_SIZE": 32})
    assert names(backbone)["absolute_pos_embed"] == [1, 16, 8, 8]
    before = outputs_of(backbone)
    nn.init.normal_(backbone.absolute_pos_embed)
    assert differ(before, outputs_of(backbone))


@effect_of(f"{S}DROP_RATE", f"{S}ATTN_DROP_RATE", f"{S}DROP_PATH_RATE")
@pytest.mark.parametrize("key", ["DROP_RATE", "ATTN_DROP_RATE", "DROP_PATH_RATE"])
def test_dropout_of_a_swin(key: str) -> None:
    off = {"DROP_RATE": 0.0, "ATTN_DROP_RATE": 0.0, "DROP_PATH_RATE": 0.0}
    usual, dropping = swin(off), swin({**off, key: 0.5})
    assert not differ(outputs_of(usual), outputs_of(usual, training=True))
    assert differ(outputs_of(dropping), outputs_of(dropping, training=True))
    assert not differ(outputs_of(usual), outputs_of(dropping))


@effect_of(f"{S}USE_CHECKPOINT")
def test_activation_checkpointing_of_a_swin() -> None:
    """The same gradients from activations that are computed twice instead of kept."""

    def gradients(use_checkpoint: bool) -> tuple[list[Tensor], int]:
        model = build({**SWIN, f"{S}USE_CHECKPOINT": use_checkpoint}).train()
        kept: list[int] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            total = sum(model([train_sample()]).values())
        total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], sum(kept)

    (plain, much), (checkpointed, little) = gradients(False), gradients(True)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)
    assert little < 0.9 * much
