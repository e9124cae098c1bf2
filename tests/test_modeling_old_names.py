"""State dicts of the published code's first version load to equal outputs, whatever brings them."""

import copy
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from test_modeling_fpn import config_of
from test_modeling_per_pixel import config as per_pixel_config
from torch import Tensor, nn

from mask2former.checkpoint import load_weights, write_safetensors
from mask2former.modeling.old_names import rename_old_weights

HEAD = "sem_seg_head."
MODELS = {
    "MaskFormerHead": config_of(
        "MSDeformAttnPixelDecoder", "MultiScaleMaskedTransformerDecoder", "multi_scale_pixel_decoder"
    ),
    "StandardTransformerDecoder": config_of(
        "TransformerEncoderPixelDecoder", "StandardTransformerDecoder", "transformer_encoder"
    ),
    "PerPixelBaselineHead": per_pixel_config("PerPixelBaselineHead"),
    "PerPixelBaselinePlusHead": per_pixel_config("PerPixelBaselinePlusHead"),
}


@pytest.fixture(scope="module", params=MODELS)
def cfg(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def in_old_names(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The pixel decoder's parts were the head's; the learned query features were static."""
    return OrderedDict(
        (name.replace(f"{HEAD}pixel_decoder.", HEAD).replace("query_feat", "static_query"), value)
        for name, value in state.items()
    )


def build(cfg: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(cfg).eval()


def outputs(model: nn.Module) -> Tensor:
    image = torch.arange(3 * 64 * 64, dtype=torch.float32).reshape(3, 64, 64) % 255
    with torch.inference_mode():
        return model([{"image": image}])[0]["sem_seg"]


@pytest.mark.parametrize("way", ["state dict", "state dict of version 1", ".pth", ".safetensors"])
def test_old_names_load(cfg: Any, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, other = build(cfg, seed=0), build(cfg, seed=1)
    expected = outputs(model)
    assert not torch.allclose(outputs(other), expected)
    old = in_old_names(model.state_dict())
    path = tmp_path / f"old{way}"
    with caplog.at_level(logging.WARNING):
        if way.startswith("state dict"):
            if way.endswith("version 1"):
                metadata = copy.deepcopy(model.state_dict()._metadata)
                for name in ("sem_seg_head", "sem_seg_head.predictor"):
                    metadata[name]["version"] = 1
                old._metadata = metadata
            other.load_state_dict(old, strict=True)
        elif way == ".pth":
            torch.save({"model": old}, path)
            load_weights(other, str(path))
        else:
            write_safetensors(old, str(path))
            load_weights(other, str(path))
    torch.testing.assert_close(outputs(other), expected)
    assert "names of an old version" in caplog.text


def test_old_names_of_other_shapes_are_skipped(tmp_path: Path) -> None:
    """As for fine-tuning with another number of queries."""
    cfg = MODELS["MaskFormerHead"].clone()
    old = in_old_names(build(cfg, seed=0).state_dict())
    torch.save({"model": old}, tmp_path / "old.pth")
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES += 3
    other = build(cfg, seed=1)
    features = other.sem_seg_head.predictor.query_feat.weight.clone()
    load_weights(other, str(tmp_path / "old.pth"))
    assert torch.equal(other.sem_seg_head.predictor.query_feat.weight, features)
    loaded = other.sem_seg_head.predictor.class_embed.weight
    assert torch.equal(loaded, old["sem_seg_head.predictor.class_embed.weight"])


def test_new_names_load_without_a_version(cfg: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As files have them whose format keeps names and tensors alone."""
    model, other = build(cfg, seed=0), build(cfg, seed=1)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(dict(model.state_dict()), strict=True)
    torch.testing.assert_close(outputs(other), outputs(model))
    assert "old version" not in caplog.text


def test_version_is_saved_as_published(cfg: Any, tmp_path: Path) -> None:
    model = build(cfg, seed=0)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert state._metadata["sem_seg_head"]["version"] == 2
    if hasattr(model.sem_seg_head.predictor, "query_feat"):
        assert state._metadata["sem_seg_head.predictor"]["version"] == 2


def test_names_of_version_2_are_never_changed() -> None:
    """A weight that has no place is reported by its own name."""
    model = build(MODELS["MaskFormerHead"], seed=0)
    state = model.state_dict()
    state[f"{HEAD}predictor.static_query.weight"] = state.pop(f"{HEAD}predictor.query_feat.weight")
    incompatible = model.load_state_dict(state, strict=False)
    assert incompatible.missing_keys == [f"{HEAD}predictor.query_feat.weight"]
    assert incompatible.unexpected_keys == [f"{HEAD}predictor.static_query.weight"]


def test_old_names_can_be_renamed_before_loading(cfg: Any) -> None:
    model = build(cfg, seed=0)
    state = model.state_dict()
    old = in_old_names(state)
    assert set(old) != set(state)
    rename_old_weights(model, old)
    assert set(old) == set(state) and all(torch.equal(old[name], state[name]) for name in state)
    rename_old_weights(model, old)
    assert set(old) == set(state)


def test_a_parameter_of_the_head_itself_keeps_its_name() -> None:
    """As one that a class derived from it may have."""
    model, other = (build(MODELS["MaskFormerHead"], seed=0) for _ in range(2))
    model.sem_seg_head.scale, other.sem_seg_head.scale = (nn.Parameter(torch.tensor(x)) for x in (2.0, 1.0))
    other.load_state_dict(dict(model.state_dict()), strict=True)
    assert other.sem_seg_head.scale == 2
