"""The Swin backbone: equal to Hugging Face's and timm's with the same weights, and what its keys do."""

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from mask2former.config import get_default_config
from mask2former.errors import UserError
from mask2former.modeling import D2SwinTransformer

# A backbone of three stages that takes milliseconds; every stage has a shifted block.
SMALL = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (2, 4, 4), "drop_path_rate": 0.0}
SMALL["out_features"] = ("res2", "res3", "res4")

PUBLISHED = {
    "swin_tiny_coco_instance": {},
    "swin_base384_ade20k_semantic": {
        **{"PRETRAIN_IMG_SIZE": 384, "EMBED_DIM": 128, "DEPTHS": [2, 2, 18, 2]},
        **{"NUM_HEADS": [4, 8, 16, 32], "WINDOW_SIZE": 12},
    },
}

# Names of Hugging Face's Swin, before and since version 5.
THEIR_NAMES = [
    (r"^swin\.", ""),
    (r"^embeddings\.position_embeddings", "absolute_pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.norm", "patch_embed.norm"),
    (r"^encoder\.", ""),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.(self|relative_position_bias)\.relative_position", "attn.relative_position"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"attention\.(self\.(query|key|value)|[qkv]_proj)", "attn.qkv"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
]


def small(**options: Any) -> D2SwinTransformer:
    """A small backbone whose every parameter matters: none is 0, as biases are at first, or 1."""
    torch.manual_seed(0)
    backbone = D2SwinTransformer(**{**SMALL, **options})
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            std = 1.0 if "relative_position" in name or "absolute_pos" in name else 0.3
            parameter.copy_(std * torch.randn_like(parameter) + ("norm" in name and "weight" in name))
    return backbone


def from_config(**keys: Any) -> D2SwinTransformer:
    cfg = get_default_config()
    cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    for key, value in keys.items():
        cfg.MODEL.SWIN[key] = value
    return build_backbone(cfg)


def picture(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, **tolerance)


@pytest.mark.parametrize("case", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(case: str, repository: Path) -> None:
    with gzip.open(repository / "tests" / "data" / "checkpoint_keys" / f"{case}.keys.json.gz") as file:
        published = {name: shape for name, shape in json.load(file).items() if name.startswith("backbone.")}
    with torch.device("meta"):
        backbone = from_config(**PUBLISHED[case])
    assert {f"backbone.{name}": list(value.shape) for name, value in backbone.state_dict().items()} == published
    assert backbone.state_dict()["layers.0.blocks.0.attn.relative_position_index"].dtype == torch.int64


def hugging_faces(ours: D2SwinTransformer, **options: Any) -> nn.Module:
    """Hugging Face's backbone with our weights."""
    import transformers

    stages = [f"stage{index + 1}" for index in range(3)]
    config = transformers.SwinConfig(
        embed_dim=8, depths=[2, 2, 2], num_heads=[2, 4, 4], out_features=stages, drop_path_rate=0.0, **options
    )
    theirs = transformers.SwinBackbone(config)
    state = ours.state_dict()
    unused = set(state)

    def our_value(name: str, value: Tensor) -> Tensor:
        if name.startswith("swin.layernorm"):  # of the classifier
            return value
        new = name
        for pattern, replacement in THEIR_NAMES:
            new = re.sub(pattern, replacement, new)
        new = re.sub(r"^hidden_states_norms\.stage(\d)", lambda match: f"norm{int(match[1]) - 1}", new)
        unused.discard(new)
        if ".qkv." in new:
            part = re.search(r"\.(q|k|v)[a-z_]*\.(weight|bias)$", name)[1]
            return state[new].chunk(3)["qkv".index(part)]
        if new == "absolute_pos_embed":
            if value.shape[1] != state[new][0, 0].numel():
                pytest.skip(f"Swin of transformers {transformers.__version__} has a position too many")
            return state[new].flatten(2).transpose(1, 2)
        return state[new]

    theirs.load_state_dict({name: our_value(name, value) for name, value in theirs.state_dict().items()})
    assert not {name for name in unused if not name.endswith("relative_position_index")}
    return theirs.eval()


@pytest.mark.usefixtures("hugging_face")
@pytest.mark.parametrize(
    ("size", "window_size"),
    [
        ((64, 96), 4),  # whole windows in the first two stages
        ((61, 75), 7),  # nothing divides anything
        ((33, 130), 5),
        ((18, 21), 7),  # the map is smaller than the window in every stage
    ],
)
def test_equals_hugging_faces(size: tuple[int, int], window_size: int) -> None:
    ours = small(window_size=window_size).eval()
    theirs = hugging_faces(ours, window_size=window_size)
    inputs = [picture(*size).requires_grad_() for _ in range(2)]
    maps = ours(inputs[0])
    expected = dict(zip(maps, theirs(inputs[1]).feature_maps, strict=True))
    assert_equal(maps, expected, rtol=0, atol=1e-4)

    for outputs in (maps, expected):
        sum((output**3).mean() for output in outputs.values()).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-6)
    table = "layers.2.blocks.1.attn.relative_position_bias_table"
    their_table = next(p for n, p in theirs.named_parameters() if "layers.2.blocks.1" in n and "bias_table" in n)
    torch.testing.assert_close(ours.get_parameter(table).grad, their_table.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("hugging_face")
def test_absolute_position_embedding_equals_hugging_faces() -> None:
    ours = small(ape=True, pretrain_img_size=24).eval()
    assert ours.absolute_pos_embed.shape == (1, 8, 6, 6)
    theirs = hugging_faces(ours, image_size=24, use_absolute_embeddings=True)
    x = picture(60, 44)
    with torch.inference_mode():
        maps = ours(x)
        expected = theirs(x, interpolate_pos_encoding=True).feature_maps
        assert_equal(maps, dict(zip(maps, expected, strict=True)), rtol=0, atol=1e-4)
        with torch.no_grad():
            ours.absolute_pos_embed.zero_()
        assert (ours(x)["res2"] - maps["res2"]).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "mlp_ratio": 2.5}])
def test_equals_timms(options: dict[str, Any]) -> None:
    """On maps of whole windows: where a map is padded to them, timm rolls it before and the published code after."""
    swin = pytest.importorskip("timm.models.swin_transformer", reason="needs timm to compare with")
    ours = small(window_size=4, **options).eval()
    theirs = swin.SwinTransformer(
        img_size=(64, 128),
        window_size=4,
        embed_dim=8,
        depths=(2, 2, 2),
        num_heads=(2, 4, 4),
        num_classes=0,
        always_partition=True,
        **options,
    ).eval()
    renamed = {}
    for name, value in ours.state_dict().items():
        new = re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name)
        if not re.match(r"norm[01]|.*relative_position_index", new):
            renamed[new.replace("norm2.", "norm.") if new.startswith("norm2") else new] = value
    theirs.load_state_dict(renamed)

    x = picture(61, 127)
    with torch.inference_mode():
        maps = ours(x)
        last, intermediates = theirs.forward_intermediates(F.pad(x, (0, 1, 0, 3)))
        torch.testing.assert_close(maps["res4"], last.permute(0, 3, 1, 2), rtol=0, atol=1e-4)
        for stage, (name, value) in enumerate(maps.items()):
            norm = ours.get_submodule(f"norm{stage}")
            expected = norm(intermediates[stage].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-4, msg=f"{name} differs")


def test_maps_have_the_strides_and_channels_promised() -> None:
    backbone = small(patch_size=2, out_features=["res4", "res2"])
    assert backbone.output_shape() == {
        "res2": ShapeSpec(channels=8, stride=2),
        "res4": ShapeSpec(channels=32, stride=8),
    }
    maps = backbone(picture(33, 50))
    assert all(value.is_contiguous() for value in maps.values())
    assert {name: value.shape for name, value in maps.items()} == {
        "res2": (2, 8, 17, 25),
        "res4": (2, 32, 5, 7),
    }
    assert from_config().size_divisibility == 32


def test_stages_past_the_last_feature_are_left_out() -> None:
    whole, part = small().eval(), small(out_features=["res3"]).eval()
    assert len(part.layers) == 2
    assert part.size_divisibility == whole.size_divisibility == 16
    result = part.load_state_dict(whole.state_dict(), strict=False)
    assert result.missing_keys == []
    x = picture(30, 30)
    assert_equal(part(x), {"res3": whole(x)["res3"]})
    assert all(parameter.requires_grad for parameter in part.parameters())
    part(x)["res3"].sum().backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


def training_step(backbone: D2SwinTransformer, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Maps and gradients in training mode, from one seed."""
    torch.manual_seed(5)
    maps = backbone.train()(x)
    sum((value**3).mean() for value in maps.values()).backward()
    return maps, {name: parameter.grad for name, parameter in backbone.named_parameters()}


def test_checkpointing_changes_memory_alone() -> None:
    options = {"drop_path_rate": 0.5, "drop_rate": 0.1, "attn_drop_rate": 0.1, "ape": True, "pretrain_img_size": 32}
    x = picture(40, 52, batch=4)

    def stored(backbone: D2SwinTransformer) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone(x)
        return count

    plain, checkpointed = small(**options), small(**options, use_checkpoint=True)
    maps, gradients = training_step(plain, x)
    their_maps, their_gradients = training_step(checkpointed, x)
    assert_equal(their_maps, maps, rtol=0, atol=0)
    assert_equal(their_gradients, gradients, rtol=1e-5, atol=1e-7)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert stored(checkpointed) < 0.5 * stored(plain)


def test_stochastic_depth_grows_over_all_blocks_and_is_off_in_evaluation() -> None:
    backbone = small(drop_path_rate=0.5)
    rates = [module.p for module in backbone.modules() if isinstance(module, StochasticDepth)]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.5, 6))
    x = picture(32, 32, batch=1).expand(8, -1, -1, -1)
    rows = backbone.train()(x)["res4"].flatten(1)
    assert len(rows.unique(dim=0)) > 2  # each picture has its own draws
    assert_equal(backbone.eval()(x), small().eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("frozen_stages", "frozen"),
    [
        (-1, ()),
        (0, ("patch_embed",)),
        (1, ("patch_embed", "absolute_pos_embed")),
        (2, ("patch_embed", "absolute_pos_embed", "pos_drop", "layers.0")),
        (3, ("patch_embed", "absolute_pos_embed", "pos_drop", "layers.0", "layers.1")),
        (4, ("patch_embed", "absolute_pos_embed", "pos_drop", "layers")),
    ],
)
def test_frozen_stages_keep_their_weights_and_stay_in_evaluation_mode(
    frozen_stages: int, frozen: tuple[str, ...]
) -> None:
    backbone = small(frozen_stages=frozen_stages, ape=True, pretrain_img_size=32, drop_rate=0.1)
    assert backbone.train() is backbone
    sum(value.mean() for value in backbone(picture(32, 32)).values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen or "-"), name
    for name, module in backbone.named_modules():
        if name not in ("", "layers"):
            assert module.training != name.startswith(frozen or "-"), name
    assert not any(module.training for module in backbone.eval().modules())


def test_weights_start_as_swins() -> None:
    torch.manual_seed(0)
    backbone = D2SwinTransformer(embed_dim=48, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1), ape=True)
    for name in ("layers.1.blocks.0.attn.qkv.weight", "layers.2.downsample.reduction.weight", "absolute_pos_embed"):
        weight = backbone.get_parameter(name)
        assert abs(weight.std().item() - 0.02) < 1e-3 and weight.abs().max() > 0.05, name
    assert 0.01 < backbone.get_parameter("layers.3.blocks.0.attn.relative_position_bias_table").std() < 0.03
    assert not any(p.any() for n, p in backbone.named_parameters() if n.endswith("bias") and "proj" not in n)


def test_scale_of_the_attention() -> None:
    """A larger factor is the same as larger queries."""
    x = picture(32, 48)
    scaled, plain = small(qk_scale=0.9).eval(), small().eval()
    with torch.no_grad():
        for module in plain.modules():
            if hasattr(module, "qkv"):
                channels = module.qkv.in_features
                factor = 0.9 * (channels / module.num_heads) ** 0.5
                module.qkv.weight[:channels] *= factor
                module.qkv.bias[:channels] *= factor
        assert_equal(scaled(x), plain(x), rtol=0, atol=1e-5)
        assert (scaled(x)["res4"] - small().eval()(x)["res4"]).abs().max() > 1e-2


SMALL_KEYS = {"EMBED_DIM": 8, "DEPTHS": [2, 2, 2, 2], "NUM_HEADS": [2, 4, 4, 4], "PRETRAIN_IMG_SIZE": 32, "APE": True}


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("PRETRAIN_IMG_SIZE", 48, "absolute_pos_embed"),
        ("PATCH_SIZE", 2, "patch_embed.proj.weight"),
        ("EMBED_DIM", 16, "patch_embed.proj.weight"),
        ("DEPTHS", [2, 2, 3, 2], "layers.2.blocks.2.norm1.weight"),
        ("NUM_HEADS", [2, 4, 8, 4], "layers.2.blocks.0.attn.relative_position_bias_table"),
        ("WINDOW_SIZE", 5, "layers.2.blocks.0.attn.relative_position_index"),
        ("MLP_RATIO", 2.0, "layers.2.blocks.0.mlp.fc1.weight"),
        ("QKV_BIAS", False, "layers.2.blocks.0.attn.qkv.bias"),
        ("APE", False, "absolute_pos_embed"),
        ("PATCH_NORM", False, "patch_embed.norm.weight"),
        ("OUT_FEATURES", ["res3", "res4"], "norm0.weight"),
    ],
)
def test_keys_that_shape_the_weights(key: str, value: Any, changed: str) -> None:
    plain = from_config(**SMALL_KEYS).state_dict()
    backbone = from_config(**{**SMALL_KEYS, key: value})
    state = backbone.state_dict()
    assert getattr(state.get(changed), "shape", None) != getattr(plain.get(changed), "shape", None)
    assert all(output.isfinite().all() for output in backbone(picture(50, 41)).values())


@pytest.mark.parametrize("key", ["DROP_RATE", "ATTN_DROP_RATE", "DROP_PATH_RATE", "QK_SCALE"])
def test_keys_that_change_what_is_computed(key: str) -> None:
    x = picture(40, 40)
    no_chance = {"DROP_PATH_RATE": 0.0}
    plain, changed = (from_config(**{**SMALL_KEYS, **no_chance, **keys}) for keys in ({}, {key: 0.7}))
    changed.load_state_dict(plain.state_dict())
    assert not torch.equal(changed.train()(x)["res5"], plain.train()(x)["res5"])
    assert torch.equal(changed.eval()(x)["res5"], plain.eval()(x)["res5"]) == (key != "QK_SCALE")
    dropouts = [module for module in changed.modules() if isinstance(module, nn.Dropout)]
    assert {module.p for module in dropouts} == {0.7 if key == "DROP_RATE" else 0.0}
    used = set()
    for module in dropouts:
        module.register_forward_hook(lambda module, *_: used.add(module))
    changed(x)
    assert used == set(dropouts)


def test_key_that_turns_checkpointing_on() -> None:
    assert all(layer.checkpointing for layer in from_config(**SMALL_KEYS, USE_CHECKPOINT=True).layers)
    assert not any(layer.checkpointing for layer in from_config(**SMALL_KEYS).layers)


def test_number_types_and_copies() -> None:
    x = picture(45, 38)
    backbone = small(ape=True).eval()
    expected = backbone(x)
    assert_equal(copy.deepcopy(backbone)(x), expected, rtol=0, atol=0)
    doubles = copy.deepcopy(backbone).double()(x.double())
    assert_equal({name: value.float() for name, value in doubles.items()}, expected, rtol=0, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = backbone(x)
    assert all((halves[name] - value).abs().mean() < 0.05 for name, value in expected.items())
    with torch.inference_mode():
        backbone(x)
    backbone(x)["res4"].sum().backward()  # nothing of inference mode is left over


def test_compiles_as_one_graph() -> None:
    backbone = small(depths=(2, 1), num_heads=(2, 2), out_features=["res2", "res3"]).eval()
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert_equal(compiled(picture(45, 38)), backbone(picture(45, 38)), rtol=0, atol=1e-5)


def test_trains_the_same_with_and_without_checkpointing() -> None:
    """The Swin-T recipe in small: its depths, window, optimizer and stochastic depth."""
    x, target = picture(64, 80), picture(4, 4).view(2, 4, 12)

    def losses(use_checkpoint: bool) -> list[float]:
        torch.manual_seed(0)
        backbone = D2SwinTransformer(embed_dim=12, num_heads=(1, 2, 4, 8), use_checkpoint=use_checkpoint)
        optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3, weight_decay=0.05)
        history = []
        for _ in range(5):
            means = torch.stack([value.mean((2, 3))[:, :12] for value in backbone(x).values()], dim=1)
            loss = F.mse_loss(means, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        return history

    plain = losses(False)
    assert plain[-1] < plain[0]
    assert losses(True) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 10, "num_heads": (2, 4, 3)}, "stage 2 has 40 channels .*3 heads"),
        ({"num_heads": (2, 4)}, "one value for each stage"),
        ({"depths": (), "num_heads": ()}, "one value for each stage"),
        ({"depths": (2, 0, 2)}, "at least 1"),
        ({"num_heads": (2, -4, 4)}, "at least 1"),
        ({"embed_dim": 0}, "EMBED_DIM must be greater than 0, but is 0"),
        ({"patch_size": -4}, "PATCH_SIZE"),
        ({"window_size": 0}, "WINDOW_SIZE"),
        ({"mlp_ratio": 0.0}, "MLP_RATIO"),
        ({"qk_scale": 0.0}, "QK_SCALE"),
        ({"drop_rate": 1.5}, "DROP_RATE is a probability"),
        ({"attn_drop_rate": -0.1}, "ATTN_DROP_RATE is a probability"),
        ({"drop_path_rate": 1.0}, "DROP_PATH_RATE is a probability"),
        ({"ape": True, "pretrain_img_size": 3}, "PRETRAIN_IMG_SIZE is 3, but must be at least"),
        ({"out_features": ["res2", "res5"]}, "OUT_FEATURES must be some of .*'res4'.*'res5'"),
        ({"out_features": []}, "OUT_FEATURES"),
        ({"frozen_stages": 5}, "from -1 to 4, but is 5"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        D2SwinTransformer(**{**SMALL, **options})


def test_a_picture_without_batch_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(B, C, height, width\).*\(3, 32, 32\)"):
        small()(torch.zeros(3, 32, 32))
