"""MaskFormer's transformer decoder: against Hugging Face's, and every argument."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from huggingface_detr import in_detr_names
from published_keys import built_keys, published_keys
from test_modeling_criterion import make_criterion, sample, targets
from test_modeling_fpn import config_of, in_their_names
from torch import Tensor, nn

from mask2former.errors import UserError
from mask2former.modeling import (
    BasePixelDecoder,
    MaskFormerHead,
    MultiScaleMaskedTransformerDecoder,
    StandardTransformerDecoder,
)

OPTIONS: dict[str, Any] = {
    "num_classes": 3,
    "hidden_dim": 32,
    "num_queries": 6,
    "nheads": 4,
    "dropout": 0.0,
    "dim_feedforward": 48,
    "dec_layers": 3,
    "mask_dim": 8,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 32, 4, 6), torch.randn(2, 8, 16, 24)


ADE20K = "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml"
MASKFORMER = ["MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"]
MASKFORMER += ["MODEL.MASK_FORMER.DEC_LAYERS", "6"]


@pytest.mark.parametrize(
    ("case", "pixel_decoder", "source"),
    [
        ("maskformer_r50_ade20k_fpn", "BasePixelDecoder", "res5"),
        ("maskformer_r50_ade20k_transformer_encoder", "TransformerEncoderPixelDecoder", "transformer_encoder"),
    ],
)
def test_weights_have_the_published_names_and_shapes(case: str, pixel_decoder: str, source: str) -> None:
    options = ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", pixel_decoder, *MASKFORMER]
    options += ["MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", source]
    assert built_keys(ADE20K, options) == published_keys(case)


def build_head() -> MaskFormerHead:
    channels = {"res2": 8, "res3": 16, "res4": 24, "res5": 40}
    shapes = {name: ShapeSpec(channels=width, stride=4 * 2**i) for i, (name, width) in enumerate(channels.items())}
    head = MaskFormerHead(
        pixel_decoder=BasePixelDecoder(shapes, conv_dim=32, mask_dim=8),
        transformer_predictor=StandardTransformerDecoder(40, **OPTIONS),
        transformer_in_feature="res5",
        num_classes=3,
    )
    for name, parameter in head.named_parameters():
        width = parameter[0].numel() if parameter.dim() > 1 and "query_embed" not in name else 1
        nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, width**-0.5)
    return head.eval()


def test_head_equals_hugging_faces_maskformer(hugging_face: ModuleType) -> None:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, ResNetConfig

    head = build_head()
    decoder_config = DetrConfig(
        d_model=32, decoder_layers=3, decoder_ffn_dim=48, decoder_attention_heads=4, num_queries=6
    )
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 40], depths=[1, 1, 1, 1], layer_type="basic")
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    theirs = MaskFormerForInstanceSegmentation(
        MaskFormerConfig(
            fpn_feature_size=32,
            mask_feature_size=8,
            backbone_config=backbone,
            decoder_config=decoder_config,
            num_labels=3,
        )
    ).eval()
    transformer = theirs.model.transformer_module
    theirs.model.pixel_level_module.decoder.load_state_dict(in_their_names(head.pixel_decoder.state_dict()))
    transformer.decoder.load_state_dict(in_detr_names(head.predictor.transformer.decoder.state_dict()))
    transformer.queries_embedder.load_state_dict(head.predictor.query_embed.state_dict())
    transformer.input_projection.load_state_dict(head.predictor.input_proj.state_dict())
    theirs.class_predictor.load_state_dict(head.predictor.class_embed.state_dict())
    layers = head.predictor.mask_embed.layers.state_dict()
    theirs.mask_embedder.load_state_dict({name.replace(".", ".0."): value for name, value in layers.items()})

    with torch.inference_mode():
        outputs = theirs(torch.randn(2, 3, 128, 160), output_hidden_states=True)
        names = ("res2", "res3", "res4", "res5")
        predictions = head(dict(zip(names, outputs.encoder_hidden_states, strict=True)))
    for ours, expected in (
        (predictions["pred_logits"], outputs.class_queries_logits),
        (predictions["pred_masks"], outputs.masks_queries_logits),
    ):
        assert ours.shape == expected.shape
        assert expected.std() > 0.1
        difference = (ours - expected).abs()
        assert (difference < 1e-4).float().mean() >= 0.99
        assert difference.max() < 1e-3


def test_predictions_are_made_after_every_layer() -> None:
    decoder = StandardTransformerDecoder(32, **OPTIONS).eval()
    x, mask_features = inputs()
    predictions = decoder(x, mask_features)
    assert predictions.class_logits.shape == (3, 2, 6, 4)
    assert len(predictions["aux_outputs"]) == 2
    assert predictions["pred_masks"].shape == (2, 6, 16, 24)
    decoder.transformer.decoder.layers = decoder.transformer.decoder.layers[:2]
    earlier = decoder(x, mask_features)
    torch.testing.assert_close(earlier["pred_masks"], predictions["aux_outputs"][1]["pred_masks"])
    torch.testing.assert_close(earlier["pred_logits"], predictions["aux_outputs"][1]["pred_logits"])


def test_without_deep_supervision_the_last_layer_alone_predicts() -> None:
    decoder = StandardTransformerDecoder(32, **OPTIONS).eval()
    x, mask_features = inputs()
    every_layer = decoder(x, mask_features)
    decoder.deep_supervision = False
    last = decoder(x, mask_features)
    assert last["aux_outputs"] == []
    torch.testing.assert_close(last["pred_masks"], every_layer["pred_masks"])
    torch.testing.assert_close(last["pred_logits"], every_layer["pred_logits"])


def test_without_mask_classification_there_is_no_class_head() -> None:
    decoder = StandardTransformerDecoder(32, mask_classification=False, **OPTIONS)
    assert not any("class_embed" in name for name in decoder.state_dict())
    predictions = decoder(*inputs())
    assert predictions.class_logits.shape == (3, 2, 6, 0)
    assert predictions["pred_masks"].shape == (2, 6, 16, 24)


def test_padding_is_left_out_where_a_mask_says_so() -> None:
    """As if the padding had been cut off; the mask may have another size than the feature map."""
    decoder = StandardTransformerDecoder(32, enc_layers=1, **OPTIONS).eval()
    x, mask_features = inputs()
    mask = torch.zeros(2, 32, 48, dtype=torch.bool)
    mask[1, 24:] = mask[1, :, 16:] = True
    padded = decoder(x, mask_features, mask).mask_embeddings
    torch.testing.assert_close(padded[:, :1], decoder(x[:1], mask_features[:1]).mask_embeddings)
    torch.testing.assert_close(padded[:, 1:], decoder(x[1:, :, :3, :2], mask_features[1:]).mask_embeddings)
    assert not torch.allclose(padded, decoder(x, mask_features).mask_embeddings)


@pytest.mark.parametrize(
    ("option", "value", "shows_in"),
    [
        ("num_classes", 7, "shapes"),
        ("hidden_dim", 64, "names"),
        ("num_queries", 4, "shapes"),
        ("dim_feedforward", 24, "shapes"),
        ("mask_dim", 16, "shapes"),
        ("enc_layers", 1, "names"),
        ("dec_layers", 2, "names"),
        ("enforce_input_project", True, "names"),
        ("nheads", 2, "outputs"),
        ("pre_norm", True, "outputs"),
        ("dropout", 0.5, "training"),
    ],
)
def test_every_argument_has_its_effect(option: str, value: Any, shows_in: str) -> None:
    base = StandardTransformerDecoder(32, **OPTIONS)
    changed = StandardTransformerDecoder(32, **{**OPTIONS, option: value})
    if shows_in == "names":
        assert set(base.state_dict()) != set(changed.state_dict())
        return
    if shows_in == "shapes":
        shapes = [{name: x.shape for name, x in decoder.state_dict().items()} for decoder in (base, changed)]
        assert shapes[0] != shapes[1] and shapes[0].keys() == shapes[1].keys()
        return
    missing, unexpected = changed.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"transformer.encoder.norm.weight", "transformer.encoder.norm.bias"}
    x = inputs()
    for training in (False, True):
        results = [decoder.train(training)(*x).mask_embeddings for decoder in (base, changed)]
        assert torch.allclose(*results) == (shows_in == "training" and not training)


def test_losses_of_every_layer() -> None:
    decoder = StandardTransformerDecoder(32, **OPTIONS)
    losses = make_criterion()(decoder(torch.randn(2, 32, 4, 6), torch.randn(2, 8, 8, 10)), targets())
    names = {"loss_ce", "loss_mask", "loss_dice"}
    assert set(losses) == names | {f"{name}_{layer}" for name in names for layer in (0, 1)}
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("DEEP_SUPERVISION", False, lambda decoder: not decoder.deep_supervision),
        ("PRE_NORM", True, lambda decoder: decoder.transformer.decoder.layers[0].pre_norm),
        ("ENFORCE_INPUT_PROJ", True, lambda decoder: "input_proj.weight" in decoder.state_dict()),
        ("ENC_LAYERS", 2, lambda decoder: len(decoder.transformer.encoder.layers) == 2),
        ("DEC_LAYERS", 5, lambda decoder: len(decoder.transformer.decoder.layers) == 5),
        ("DROPOUT", 0.25, lambda decoder: decoder.transformer.decoder.layers[0].dropout.p == 0.25),
        ("NHEADS", 4, lambda decoder: decoder.transformer.decoder.layers[0].self_attn.num_heads == 4),
        ("NUM_OBJECT_QUERIES", 7, lambda decoder: decoder.query_embed.num_embeddings == 7),
        ("DIM_FEEDFORWARD", 40, lambda decoder: decoder.transformer.decoder.layers[0].linear1.out_features == 40),
    ],
)
def test_config_reaches_the_decoder(key: str, value: Any, seen: Callable[[nn.Module], bool]) -> None:
    cfg = config_of("TransformerEncoderPixelDecoder", "StandardTransformerDecoder", "transformer_encoder")
    assert not seen(build_model(cfg).sem_seg_head.predictor)
    cfg.MODEL.MASK_FORMER[key] = value
    assert seen(build_model(cfg).sem_seg_head.predictor)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="DEC_LAYERS.* at least 1"):
        StandardTransformerDecoder(32, **{**OPTIONS, "dec_layers": 0})
    x, mask_features = inputs()
    with pytest.raises(UserError, match="one feature map, but got 3: .*TRANSFORMER_IN_FEATURE"):
        StandardTransformerDecoder(32, **OPTIONS)([x, x, x], mask_features)
    masked = MultiScaleMaskedTransformerDecoder(8, num_classes=2, hidden_dim=8, nheads=2, dec_layers=1, mask_dim=8)
    with pytest.raises(ValueError, match="3 feature maps"):
        masked(torch.zeros(2, 8, 2, 2), mask_features)


def test_trains_under_autocast() -> None:
    model = build_model(config_of("BasePixelDecoder", "StandardTransformerDecoder", "res5")).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([sample((4, 4, 40, 40))])
    sum(losses.values()).backward()
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None)
