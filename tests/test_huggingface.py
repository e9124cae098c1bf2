"""Hugging Face's Mask2Former: the same weights give the same logits, and their files and ours become one another.

It is a second opinion on the whole network too.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from reference_weights import load_reference_weights, reference_image
from torch import Tensor, nn

from mask2former.checkpoint import load_weights, read_model, write_hugging_face
from mask2former.engine import load_config
from mask2former.errors import UserError

SMALL_HEAD = [
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "2", "MODEL.MASK_FORMER.DEC_LAYERS", "5"),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "20", "MODEL.DEVICE", "cpu"),
]
SMALL_RESNET = [
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "16"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
]
SMALL_SWIN = [
    *("MODEL.SWIN.EMBED_DIM", "48", "MODEL.SWIN.DEPTHS", "[1, 1, 3, 1]", "MODEL.SWIN.NUM_HEADS", "[2, 4, 8, 16]"),
    *("MODEL.SWIN.WINDOW_SIZE", "4", "MODEL.SWIN.MLP_RATIO", "3.0"),
]
SWIN_RECIPE = "configs/coco/instance-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml"
RECIPES = {
    "resnet": ("configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml", SMALL_RESNET),
    "swin": (SWIN_RECIPE, []),
    "small swin": (SWIN_RECIPE, SMALL_SWIN),
}
CLASSES = {"resnet": 133, "swin": 80, "small swin": 80}
BACKBONES = pytest.mark.parametrize("backbone", ["resnet", "swin"])


def our_model(repository: Path, backbone: str) -> nn.Module:
    path, options = RECIPES[backbone]
    return build_model(load_config(str(repository / path), [*SMALL_HEAD, *options])).eval()


def their_model(hugging_face: ModuleType, backbone: str) -> nn.Module:
    import transformers

    out_features = ["stage1", "stage2", "stage3", "stage4"]
    if backbone == "swin":
        settings: Any = transformers.SwinConfig(depths=[2, 2, 6, 2], out_features=out_features)
    else:
        settings = transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[64, 128, 256, 512],
            depths=[3, 4, 6, 3],
            layer_type="bottleneck",
            out_features=out_features,
        )
    config = transformers.Mask2FormerConfig(
        backbone_config=settings,
        num_labels=CLASSES[backbone],
        encoder_layers=2,
        decoder_layers=5,
        num_queries=20,
    )
    return hugging_face.Mask2FormerForUniversalSegmentation(config).eval()


def assert_same_logits(ours: Any, theirs: nn.Module) -> None:
    # Larger than seven windows of 32 pixels: in a map of one window theirs leaves out the shift.
    image = torch.from_numpy(reference_image(256, 288, seed=3))
    with torch.inference_mode():
        batch = ours.preprocess([{"image": image}])
        predictions = ours.sem_seg_head(ours.backbone(batch.tensor))
        reference = theirs(pixel_values=batch.tensor)
    for mine, other in [
        (predictions["pred_logits"], reference.class_queries_logits),
        (predictions["pred_masks"], reference.masks_queries_logits),
    ]:
        assert mine.shape == other.shape
        assert other.std() > 0.1
        assert ((mine - other).abs() <= 1e-3).float().mean() >= 0.99


@BACKBONES
def test_their_folder_is_loaded(repository: Path, hugging_face: ModuleType, tmp_path: Path, backbone: str) -> None:
    theirs = their_model(hugging_face, backbone)
    load_reference_weights(theirs)
    theirs.save_pretrained(tmp_path)
    ours = our_model(repository, backbone)
    load_weights(ours, str(tmp_path))
    assert_same_logits(ours, theirs)


@BACKBONES
def test_their_backbone_alone_is_loaded(
    repository: Path, hugging_face: ModuleType, tmp_path: Path, backbone: str
) -> None:
    """A classifier of theirs starts the backbone: the same maps, but for the norms that a Swin has for each map."""
    import transformers

    settings = their_model(hugging_face, backbone).config.backbone_config
    kind = transformers.SwinForImageClassification if backbone == "swin" else transformers.ResNetForImageClassification
    classifier = kind(settings).eval()
    load_reference_weights(classifier)
    classifier.save_pretrained(tmp_path)
    ours = our_model(repository, backbone)
    load_weights(ours, str(tmp_path))
    image = torch.from_numpy(reference_image(256, 288, seed=3)).float()[None] / 64 - 2
    with torch.inference_mode():
        reference = classifier.base_model(image).last_hidden_state  # (B, H*W, C) of a Swin, (B, C, H, W) of a ResNet
        if backbone == "swin":
            ours.backbone.norm3.load_state_dict(classifier.base_model.layernorm.state_dict())
            reference = reference.transpose(1, 2).unflatten(2, (8, 9))
        mine = ours.backbone(image)["res5"]
    assert reference.std() > 0.1
    assert ((mine - reference).abs() <= 1e-3).float().mean() >= 0.99


def test_their_weights_for_other_classes_and_queries(
    repository: Path, hugging_face: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    their_model(hugging_face, "resnet").save_pretrained(tmp_path)
    path, options = RECIPES["resnet"]
    other = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "9"]
    ours = build_model(load_config(str(repository / path), [*SMALL_HEAD, *options, *other]))
    with caplog.at_level(logging.WARNING):
        load_weights(ours, str(tmp_path))
    for name, theirs, own in [
        ("class_embed.weight", "(134, 256)", "(4, 256)"),
        ("query_feat.weight", "(20, 256)", "(9, 256)"),
    ]:
        (line,) = [record.message for record in caplog.records if f"predictor.{name}'" in record.message]
        assert theirs in line and own in line
    assert (ours.backbone.stem.conv1.norm.running_var == 1).all()


@BACKBONES
def test_their_weights_cover_ours(repository: Path, hugging_face: ModuleType, tmp_path: Path, backbone: str) -> None:
    """Nothing of ours is left as it was initialised, and only a norm that their Swin doesn't use has no place."""
    theirs = their_model(hugging_face, backbone)
    torch.save(theirs.state_dict(), tmp_path / "in_memory.bin")  # whose names differ from those in their files
    theirs.save_pretrained(tmp_path)
    expected = {name for name in our_model(repository, backbone).state_dict() if "relative_position_index" not in name}
    for path in (tmp_path, tmp_path / "in_memory.bin"):
        content = read_model(str(path))
        assert content["model"].keys() == expected
        unused = {"layernorm.weight", "layernorm.bias"} if backbone == "swin" else set()
        assert {name.rpartition("swin.")[2] for name in content["left_out"]} <= unused


@pytest.mark.parametrize("backbone", ["resnet", "small swin"])
def test_our_checkpoint_becomes_their_folder(
    repository: Path,
    hugging_face: ModuleType,
    tmp_path: Path,
    convert_checkpoint: Callable[..., None],
    backbone: str,
) -> None:
    ours = our_model(repository, backbone)
    load_reference_weights(ours)
    checkpoint, folder = tmp_path / "model_final.pth", tmp_path / "folder"
    torch.save({"model": ours.state_dict()}, checkpoint)
    convert_checkpoint(
        checkpoint,
        folder,
        "--to",
        "huggingface",
        "--config-file",
        repository / RECIPES[backbone][0],
    )
    theirs, info = hugging_face.Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert {name.rpartition("layernorm.")[0].rpartition(".encoder.")[2] for name in info["missing_keys"]} <= {"swin."}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(theirs.config.id2label) == CLASSES[backbone] and theirs.config.id2label[0] == "person"
    assert_same_logits(ours, theirs.eval())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 800, "longest_edge": 1333}
    assert processor["image_mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_there_and_back(hugging_face: ModuleType, tmp_path: Path, convert_checkpoint: Callable[..., None]) -> None:
    """Their folder, our file, their folder: the same weights bit by bit, in either of our formats."""
    theirs = their_model(hugging_face, "resnet")
    load_reference_weights(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    for ending in (".pth", ".safetensors"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / f"ours{ending}")
        convert_checkpoint(tmp_path / f"ours{ending}", tmp_path / "again", "--to", "huggingface")
        again = hugging_face.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "again").state_dict()
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(again[name], value, atol=0, rtol=0)
    assert json.loads((tmp_path / "again/config.json").read_text())["id2label"]["1"] == "LABEL_1"


def test_what_hugging_face_has_no_place_for(repository: Path, tmp_path: Path) -> None:
    def refused(weights: dict[str, Tensor], **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            write_hugging_face(weights, str(tmp_path / "folder"), **settings)
        assert not (tmp_path / "folder").exists()
        return str(caught.value)

    weights = our_model(repository, "small swin").state_dict()
    assert "no Mask2Former's" in refused({"sem_seg_head.predictor.weight": torch.ones(1)})
    assert "no place for backbone.adapter.weight" in refused(weights | {"backbone.adapter.weight": torch.ones(1)})
    assert "80 classes, but there are 2 class names" in refused(weights, class_names=["cell", "nucleus"])
    head = {name: value for name, value in weights.items() if not name.startswith("backbone.")}
    assert "backbone is neither" in refused(head | {"backbone.stem.0.weight": torch.ones(1)})
