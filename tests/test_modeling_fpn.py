"""MaskFormer's pixel decoders: against Hugging Face's, and within the model."""

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from huggingface_detr import in_detr_names
from published_keys import built_keys, published_keys
from test_modeling_criterion import sample
from tiny_nuclei_model import tiny_config
from torch import Tensor, nn

from mask2former.errors import UserError
from mask2former.modeling import BasePixelDecoder, TransformerEncoderPixelDecoder

CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 40}
SHAPES = {name: ShapeSpec(channels=width, stride=4 * 2**i) for i, (name, width) in enumerate(CHANNELS.items())}
C = 32
ENCODER = {"transformer_enc_layers": 2, "transformer_dim_feedforward": 48, "transformer_nheads": 4}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def features(height: int = 16, width: int = 24, batch: int = 2) -> dict[str, Tensor]:
    """Odd sizes among them, as of pictures that are no multiple of 32."""
    maps = {}
    for name, channels in CHANNELS.items():
        maps[name] = torch.randn(batch, channels, height, width)
        height, width = (height + 1) // 2, (width + 1) // 2
    return maps


def in_their_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pyramid's weights; their layers count from coarse to fine."""
    renamed = {}
    for name, value in state.items():
        module, _, leaf = name.partition(".")
        kind, _, index = module.rpartition("_")
        part = "1." if leaf.startswith("norm.") else "0."
        leaf = leaf.removeprefix("norm.")
        if module == "mask_features":
            renamed[f"mask_projection.{leaf}"] = value
        elif module == "layer_4":
            renamed[f"fpn.stem.{part}{leaf}"] = value
        elif kind in ("adapter", "layer"):
            block = "proj" if kind == "adapter" else "block"
            renamed[f"fpn.layers.{3 - int(index)}.{block}.{part}{leaf}"] = value
    return renamed


def randomize(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.02, 0.1)
    return module.eval()


def test_feature_pyramid_equals_hugging_faces(hugging_face: ModuleType) -> None:
    from transformers.models.maskformer import modeling_maskformer as maskformer

    ours = randomize(BasePixelDecoder(SHAPES, conv_dim=C, mask_dim=20))
    theirs = maskformer.MaskFormerPixelDecoder(
        in_features=40, feature_size=C, mask_feature_size=20, lateral_widths=[8, 16, 24]
    )
    theirs.load_state_dict(in_their_names(ours.state_dict()))
    maps = features(17, 27)
    mask_features, encoded, decoded = ours.forward_features(maps)
    expected = theirs(list(maps.values()), output_hidden_states=True)
    torch.testing.assert_close(mask_features, expected.last_hidden_state, atol=1e-5, rtol=1e-4)
    assert encoded is None
    assert [x.shape[-2:] for x in decoded] == [(3, 4), (5, 7), (9, 14)]
    torch.testing.assert_close(decoded[1:], list(expected.hidden_states[:2]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoded[0], theirs.fpn.stem(maps["res5"]), atol=1e-5, rtol=1e-4)


def test_encoder_of_the_coarsest_feature_equals_hugging_faces(hugging_face: ModuleType) -> None:
    from transformers import DetrConfig
    from transformers.models.detr.modeling_detr import DetrEncoder
    from transformers.models.maskformer import modeling_maskformer as maskformer

    ours = randomize(TransformerEncoderPixelDecoder(SHAPES, conv_dim=C, mask_dim=20, **ENCODER))
    their_encoder = DetrEncoder(DetrConfig(d_model=C, encoder_layers=2, encoder_ffn_dim=48, encoder_attention_heads=4))
    their_encoder.eval().load_state_dict(in_detr_names(ours.transformer.encoder.state_dict()))
    position = maskformer.MaskFormerSinePositionEmbedding(num_position_features=C // 2, normalize=True)
    theirs = maskformer.MaskFormerPixelDecoder(
        in_features=C, feature_size=C, mask_feature_size=20, lateral_widths=[8, 16, 24]
    )
    theirs.load_state_dict(in_their_names(ours.state_dict()))
    maps = features(17, 27)
    x = F.conv2d(maps["res5"], ours.input_proj.weight, ours.input_proj.bias)
    placed = position(x.shape, x.device, x.dtype).reshape(x.shape).flatten(2).mT
    expected = their_encoder(x.flatten(2).mT, spatial_position_embeddings=placed)[0].mT.reshape(x.shape)
    mask_features, encoded, decoded = ours.forward_features(maps)
    torch.testing.assert_close(encoded, expected, atol=1e-5, rtol=1e-4)
    expected_maps = theirs([maps["res2"], maps["res3"], maps["res4"], expected], output_hidden_states=True)
    torch.testing.assert_close(mask_features, expected_maps.last_hidden_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decoded[1:], list(expected_maps.hidden_states[:2]), atol=1e-5, rtol=1e-4)


def test_pyramid_of_fewer_features() -> None:
    shapes = {name: SHAPES[name] for name in ("res5", "res3")}
    decoder = BasePixelDecoder(shapes, conv_dim=C, mask_dim=8)
    mask_features, _, decoded = decoder.forward_features(features())
    assert mask_features.shape == (2, 8, 8, 12)
    assert [x.shape[-2:] for x in decoded] == [(2, 3), (8, 12)]


def test_without_norm_convolutions_have_biases() -> None:
    plain = BasePixelDecoder(SHAPES, conv_dim=C, mask_dim=8, norm="")
    normed = BasePixelDecoder(SHAPES, conv_dim=C, mask_dim=8, norm="GN")
    assert "adapter_1.bias" in plain.state_dict() and "adapter_1.bias" not in normed.state_dict()
    assert "layer_4.norm.weight" in normed.state_dict() and "layer_4.norm.weight" not in plain.state_dict()


@pytest.mark.parametrize(
    ("option", "value", "shows_in"),
    [
        ("conv_dim", 64, "shapes"),
        ("mask_dim", 24, "shapes"),
        ("norm", "", "names"),
        ("transformer_enc_layers", 1, "names"),
        ("transformer_dim_feedforward", 24, "shapes"),
        ("transformer_pre_norm", True, "names"),
        ("transformer_nheads", 2, "outputs"),
        ("transformer_dropout", 0.5, "training"),
    ],
)
def test_every_argument_has_its_effect(option: str, value: Any, shows_in: str) -> None:
    options = {"conv_dim": C, "mask_dim": 16, "transformer_dropout": 0.0, **ENCODER}
    base, changed = (
        TransformerEncoderPixelDecoder(SHAPES, **values) for values in (options, {**options, option: value})
    )
    names = [set(decoder.state_dict()) for decoder in (base, changed)]
    assert (names[0] != names[1]) == (shows_in == "names")
    if shows_in == "shapes":
        assert any(x.shape != y.shape for x, y in zip(base.parameters(), changed.parameters(), strict=True))
    if shows_in in ("outputs", "training"):
        changed.load_state_dict(base.state_dict())
        maps = features()
        for training in (False, True):
            results = [decoder.train(training).forward_features(maps)[0] for decoder in (base, changed)]
            assert torch.allclose(*results) == (shows_in == "training" and not training)


@pytest.mark.parametrize("kind", [BasePixelDecoder, TransformerEncoderPixelDecoder])
def test_runs_under_autocast(kind: type[BasePixelDecoder]) -> None:
    decoder = randomize(kind(SHAPES, conv_dim=C, mask_dim=8))
    maps = features()
    expected = decoder.forward_features(maps)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask_features, _, decoded = decoder.forward_features(maps)
    assert mask_features.dtype == torch.bfloat16  # nothing here asks for full precision
    assert (mask_features.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    assert len(decoded) == 3


def test_base_pixel_decoder_with_masked_attention_has_the_published_weights() -> None:
    recipe = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
    options = ["MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"]
    assert built_keys(recipe, options) == published_keys("r50_coco_panoptic_base_pixel_decoder")


PIXEL_DECODERS = ["BasePixelDecoder", "TransformerEncoderPixelDecoder", "MSDeformAttnPixelDecoder"]
SOURCES = {
    "StandardTransformerDecoder": ["res5", "pixel_embedding", "transformer_encoder"],
    "MultiScaleMaskedTransformerDecoder": ["multi_scale_pixel_decoder"],
}
COMBINATIONS = [
    (pixel_decoder, decoder, source)
    for pixel_decoder in PIXEL_DECODERS
    for decoder, sources in SOURCES.items()
    for source in sources
    if (pixel_decoder, source) != ("BasePixelDecoder", "transformer_encoder")
]


def config_of(pixel_decoder: str, decoder: str, source: str) -> Any:
    cfg = tiny_config()
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = pixel_decoder
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 24  # unlike all other widths
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = decoder
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = source
    return cfg


@pytest.mark.parametrize(("pixel_decoder", "decoder", "source"), COMBINATIONS)
def test_all_parts_train_together(pixel_decoder: str, decoder: str, source: str) -> None:
    """A picture with an object and one without: every weight that a result depends on has a finite gradient."""
    cfg = config_of(pixel_decoder, decoder, source)
    cfg.MODEL.MASK_FORMER.PRE_NORM = True  # post-norm, the first layer's self-attention of zeros has no gradient
    model = build_model(cfg).train()
    losses = model([sample((4, 4, 40, 40)), sample()])
    layers = 2  # predictions before the last; DEC_LAYERS counts all
    names = {"loss_ce", "loss_mask", "loss_dice"}
    assert set(losses) == names | {f"{name}_{layer}" for name in names for layer in range(layers)}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    with torch.inference_mode():
        [result] = model.eval()([{"image": sample()["image"], "height": 50, "width": 70}])
    assert result["sem_seg"].shape == (2, 50, 70)


def test_encoder_that_the_pixel_decoder_lacks_is_named() -> None:
    model = build_model(config_of("BasePixelDecoder", "StandardTransformerDecoder", "transformer_encoder"))
    with pytest.raises(UserError, match="TransformerEncoderPixelDecoder"):
        model.train()([sample()])


def test_unknown_feature_is_named() -> None:
    with pytest.raises(UserError, match="TRANSFORMER_IN_FEATURE is 'res9', expected one of .*res5"):
        build_model(config_of("BasePixelDecoder", "StandardTransformerDecoder", "res9"))
