"""Weights with other projects' names, loaded by MODEL.WEIGHTS and converted by tools/convert_checkpoint.py."""

import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone, build_model
from safetensors.torch import save_file
from torch import Tensor, nn

from mask2former.checkpoint import load_weights, read_model
from mask2former.engine import load_config
from mask2former.errors import UserError

RESNET = "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
SWIN = "configs/coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"
SMALL_SWIN = [
    *("MODEL.SWIN.EMBED_DIM", "8", "MODEL.SWIN.NUM_HEADS", "[1, 2, 4, 8]", "MODEL.SWIN.DEPTHS", "[1, 1, 2, 1]"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1", "MODEL.MASK_FORMER.DEC_LAYERS", "2"),
]


def config(repository: Path, path: str, *options: str) -> Any:
    return load_config(str(repository / path), [*options, "MODEL.DEVICE", "cpu"])


def with_backbone(cfg: Any) -> nn.Module:
    return nn.ModuleDict({"backbone": build_backbone(cfg)}).eval()


def randomised(module: nn.Module) -> nn.Module:
    """The module with values in its batch norms too that are not those it began with."""
    generator = torch.Generator().manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.1 + (0.5 if value.dim() == 1 else -0.05))
    return module.eval()


def swin_weights(repository: Path) -> "OrderedDict[str, Tensor]":
    """As Swin Transformer's own files name them: a backbone's, a norm and a classifier at the end, and masks."""
    backbone = randomised(build_backbone(config(repository, SWIN, *SMALL_SWIN)))
    weights = OrderedDict((name, value) for name, value in backbone.state_dict().items() if not name.startswith("norm"))
    weights["layers.0.blocks.0.attn_mask"] = torch.zeros(64, 49, 49)
    weights |= {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64)}
    return weights | {"head.weight": torch.ones(1000, 64), "head.bias": torch.ones(1000)}


def torchvision_model() -> nn.Module:
    return randomised(torchvision.models.resnet50())


def maps_of_torchvision(model: Any, image: Tensor) -> dict[str, Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
    maps = {}
    for name, layer in (("res2", model.layer1), ("res3", model.layer2), ("res4", model.layer3), ("res5", model.layer4)):
        maps[name] = x = layer(x)
    return maps


def in_detectron2_names(weights: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """As Detectron2's tool for torchvision's files makes them, counters and classifier included."""
    arrays = {}
    for name, value in weights.items():
        for old, new in [(f"layer{stage}.", f"res{stage + 1}.") for stage in range(1, 5)]:
            name = name.replace(old, new)
        name = name if name.startswith("res") else f"stem.{name}"
        for index in (1, 2, 3):
            name = name.replace(f"bn{index}.", f"conv{index}.norm.")
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        arrays[name] = value.numpy()
    return arrays


@pytest.mark.parametrize("kind", ["torchvision", "detectron2", "safetensors"])
def test_resnets_compute_what_torchvision_does(repository: Path, tmp_path: Path, kind: str) -> None:
    source = torchvision_model()
    weights = source.state_dict()
    path = tmp_path / {"torchvision": "r50.pth", "detectron2": "R-50.pkl", "safetensors": "r50.safetensors"}[kind]
    if kind == "torchvision":
        torch.save(weights, path)
    elif kind == "safetensors":
        save_file(weights, path)
    else:
        content = {"model": in_detectron2_names(weights), "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    model: Any = with_backbone(config(repository, RESNET))
    load_weights(model, str(path))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours, theirs = model["backbone"](image), maps_of_torchvision(source, image)
    for name, reference in theirs.items():
        torch.testing.assert_close(ours[name], reference, atol=1e-5, rtol=1e-5)
        assert reference.std() > 0.01


@pytest.mark.parametrize("kind", ["swin.pth", "converted.pkl", "bare.pth"])
def test_swin_weights_fill_the_backbone(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    weights, path = swin_weights(repository), tmp_path / kind
    if kind == "converted.pkl":
        content = {"model": weights, "__author__": "third_party", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save({"model": weights} if kind == "swin.pth" else weights, path)
    model = build_model(config(repository, SWIN, *SMALL_SWIN))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_weights(model, str(path))
    for name, value in model.state_dict().items():
        own = name.removeprefix("backbone.")
        expected = weights[own] if own in weights else before[name]
        torch.testing.assert_close(value, expected, atol=0, rtol=0)
    assert sum(name.removeprefix("backbone.") in weights for name in before) == len(weights) - 5
    for name in ("attn_mask", "norm.weight", "norm.bias", "head.weight", "head.bias"):
        assert name in caplog.text
    assert not [record for record in caplog.records if "will not be loaded" in record.message]


def test_swin_computes_what_timm_does(repository: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    source = timm.models.swin_transformer.SwinTransformer(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    torch.manual_seed(0)
    for value in source.parameters():
        torch.nn.init.normal_(value, std=0.1)
    torch.save(source.eval().state_dict(), tmp_path / "swin.pth")
    options = (
        "MODEL.SWIN.EMBED_DIM",
        "16",
        "MODEL.SWIN.NUM_HEADS",
        "[1, 2, 4, 8]",
        "MODEL.SWIN.DEPTHS",
        "[2, 2, 2, 2]",
    )
    model: Any = with_backbone(config(repository, SWIN, *options))
    load_weights(model, str(tmp_path / "swin.pth"))
    image = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        maps = model["backbone"](image)
        x = source.patch_embed(image)  # (B, H, W, C)
        # The last map is one window, which a classifier doesn't shift.
        for name, layer in zip(("res2", "res3", "res4"), source.layers, strict=False):
            x = layer(x)
            normed = torch.nn.functional.layer_norm(x, x.shape[-1:])  # as each map's own norm begins
            torch.testing.assert_close(maps[name], normed.permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)


def test_swin_with_a_width_of_the_head(repository: Path, tmp_path: Path) -> None:
    """The last norm of a Swin of the head's width would fit many norms in the head, if names' ends were all."""
    weights = {"patch_embed.proj.weight": torch.ones(1), "layers.0.blocks.0.attn.qkv.weight": torch.ones(1)}
    torch.save(weights | {"norm.weight": torch.ones(256)}, tmp_path / "swin.pth")
    content = read_model(str(tmp_path / "swin.pth"))
    assert content["model"].keys() == weights.keys() and content["left_out"] == ["norm.weight"]


def test_other_window_size_is_skipped_and_listed(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": swin_weights(repository)}, tmp_path / "swin.pth")
    model: Any = with_backbone(config(repository, SWIN, *SMALL_SWIN, "MODEL.SWIN.WINDOW_SIZE", "12"))
    with caplog.at_level(logging.WARNING):
        load_weights(model, str(tmp_path / "swin.pth"))
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in caplog.text
    assert (model["backbone"].patch_embed.proj.bias >= 0.5).all()


def test_other_classes_and_queries_are_skipped_and_listed(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A published checkpoint starts a model for other classes."""
    source = randomised(build_model(config(repository, SWIN, *SMALL_SWIN)))
    torch.save({"model": source.state_dict()}, tmp_path / "model_final.pth")
    options = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "30")
    model = build_model(config(repository, SWIN, *SMALL_SWIN, *options))
    with caplog.at_level(logging.WARNING):
        load_weights(model, str(tmp_path / "model_final.pth"))
    skipped = {
        "criterion.empty_weight": ("(134,)", "(8,)"),
        "sem_seg_head.predictor.class_embed.weight": ("(134, 256)", "(8, 256)"),
        "sem_seg_head.predictor.class_embed.bias": ("(134,)", "(8,)"),
        "sem_seg_head.predictor.query_feat.weight": ("(100, 256)", "(30, 256)"),
        "sem_seg_head.predictor.query_embed.weight": ("(100, 256)", "(30, 256)"),
    }
    for name, shapes in skipped.items():
        (line,) = [record.message for record in caplog.records if f"'{name}'" in record.message]
        assert all(shape in line for shape in shapes)
    for name, value in model.state_dict().items():
        if name not in skipped:
            torch.testing.assert_close(value, source.state_dict()[name], atol=0, rtol=0)


@pytest.mark.parametrize("suffix", ["", "?matching_heuristics=True"])
def test_matching_by_the_ends_of_names(tmp_path: Path, suffix: str) -> None:
    torch.save({"proj.weight": torch.ones(2, 2), "proj.bias": torch.ones(2)}, tmp_path / "weights.pth")
    model = nn.ModuleDict({"head": nn.ModuleDict({"proj": nn.Linear(2, 2)})})
    if suffix:
        load_weights(model, f"{tmp_path}/weights.pth{suffix}")
        assert (model.state_dict()["head.proj.weight"] == 1).all()
        return
    with pytest.raises(UserError, match="none of the checkpoint's 2 weights fits"):
        load_weights(model, f"{tmp_path}/weights.pth")


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="matching_heuristics=True"):
        load_weights(nn.Linear(2, 2), f"{tmp_path}/weights.pth?map=cpu")


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without model.safetensors or pytorch_model.bin"):
        load_weights(nn.Linear(2, 2), str(tmp_path))


def test_author_that_takes_forever_to_write_out(tmp_path: Path) -> None:
    pairs: Any = ()
    for _ in range(60):
        pairs = (pairs, pairs)
    torch.save({"model": {"weight": torch.ones(2, 2)}, "__author__": pairs}, tmp_path / "weights.pth")
    model = nn.Linear(2, 2)
    load_weights(model, str(tmp_path / "weights.pth"))
    assert torch.equal(model.weight, torch.ones(2, 2))


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_converted_swin_is_loaded_by_names_alone(
    repository: Path,
    tmp_path: Path,
    convert_checkpoint: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    ending: str,
) -> None:
    weights = swin_weights(repository)
    torch.save({"model": weights}, tmp_path / "swin.pth")
    convert_checkpoint(tmp_path / "swin.pth", tmp_path / f"ours{ending}")
    printed = capsys.readouterr().out
    assert "left out" in printed and "head.weight" in printed and f"{len(weights) - 5} tensors" in printed
    content = read_model(str(tmp_path / f"ours{ending}"))
    assert content["model"].keys() <= build_model(config(repository, SWIN, *SMALL_SWIN)).state_dict().keys()
    assert not content.get("matching_heuristics") and len(content["model"]) == len(weights) - 5
    for name, value in content["model"].items():
        torch.testing.assert_close(value, weights[name.removeprefix("backbone.")], atol=0, rtol=0)


def test_detectron2_reads_what_is_converted(
    repository: Path, tmp_path: Path, convert_checkpoint: Callable[..., None]
) -> None:
    """DefaultPredictor's checkpointer is Detectron2's own."""
    from detectron2.checkpoint import DetectionCheckpointer

    source = torchvision_model()
    torch.save(source.state_dict(), tmp_path / "r50.pth")
    convert_checkpoint(tmp_path / "r50.pth", tmp_path / "converted.pth")
    model: Any = with_backbone(config(repository, RESNET))
    DetectionCheckpointer(model).load(str(tmp_path / "converted.pth"))
    torch.testing.assert_close(model["backbone"].stem.conv1.weight, source.state_dict()["conv1.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_halves(tmp_path: Path, convert_checkpoint: Callable[..., None], dtype: str, ending: str) -> None:
    weights = {"weight": torch.rand(64, 64), "index": torch.arange(4)}
    torch.save({"model": weights}, tmp_path / "whole.pth")
    convert_checkpoint(tmp_path / "whole.pth", tmp_path / f"half{ending}", "--dtype", dtype)
    assert (tmp_path / f"half{ending}").stat().st_size < 0.7 * (tmp_path / "whole.pth").stat().st_size
    read = read_model(str(tmp_path / f"half{ending}"))["model"]
    torch.testing.assert_close(read["weight"].float(), weights["weight"], atol=4e-3, rtol=0)
    assert read["index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"weight": torch.ones(1)}, ["out.txt"], "must end in .safetensors or .pth"),
        ({}, ["out.pth"], "holds no weights"),
        ({"weight": torch.ones(1)}, ["folder", "--to", "huggingface"], "no Mask2Former's: .* is missing"),
        ({"weight": torch.ones(1)}, ["folder", "--to", "huggingface", "--config-file", "no.yaml"], "does not exist"),
        ([1], ["out.pth"], "must hold a dict"),
        ({"weight": torch.ones(1)}, ["in.pth/out.pth"], "can't be written"),
    ],
)
def test_what_the_command_refuses(
    tmp_path: Path, convert_checkpoint: Callable[..., None], content: Any, arguments: list[str], message: str
) -> None:
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(UserError, match=message):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / arguments[0], *arguments[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_the_command_refuses_names_that_are_converted_while_loading(
    tmp_path: Path, convert_checkpoint: Callable[..., None]
) -> None:
    (tmp_path / "in.pkl").write_bytes(pickle.dumps({"conv1_w": np.ones((4, 3, 1, 1), np.float32)}))
    with pytest.raises(UserError, match="Detectron's names"):
        convert_checkpoint(tmp_path / "in.pkl", tmp_path / "out.pth")
