"""Every key of heads, losses and inference does what it does in the published code."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from config_keys import SWIN, H, M, build, effect_of, losses, names, picture, predict, train_sample
from torch import Tensor, nn

from mask2former.errors import UserError
from mask2former.modeling import criterion as criterion_module
from mask2former.modeling import precision

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

# --------------------------------------------------------------------------------------------- losses


@effect_of(f"{M}DEEP_SUPERVISION")
def test_deep_supervision() -> None:
    last = {"loss_ce", "loss_mask", "loss_dice"}
    assert losses(build()).keys() == last | {f"{name}_{layer}" for name in last for layer in range(2)}
    assert losses(build({f"{M}DEEP_SUPERVISION": False})).keys() == last


@effect_of(f"{M}NO_OBJECT_WEIGHT")
def test_no_object_weight() -> None:
    model = build({f"{M}NO_OBJECT_WEIGHT": 0.4})
    assert model.criterion.empty_weight.tolist() == pytest.approx([1, 1, 0.4])
    assert losses(model)["loss_ce"] != losses(build())["loss_ce"]


@effect_of(f"{M}CLASS_WEIGHT", f"{M}MASK_WEIGHT", f"{M}DICE_WEIGHT")
@pytest.mark.parametrize(("key", "loss"), [("CLASS", "ce"), ("MASK", "mask"), ("DICE", "dice")])
def test_weights_of_losses_and_of_matching_costs(key: str, loss: str) -> None:
    # With one query there is one way to match, and nothing but the weight can differ.
    values = {f"{M}NUM_OBJECT_QUERIES": 1, f"{M}CLASS_WEIGHT": 1.0, f"{M}MASK_WEIGHT": 1.0, f"{M}DICE_WEIGHT": 1.0}
    before = losses(build(values))
    model = build({**values, f"{M}{key}_WEIGHT": 3.0})
    after = losses(model)
    for name, value in before.items():
        assert after[name] == pytest.approx(value * (3 if name.startswith(f"loss_{loss}") else 1), rel=1e-5)
    costs = {name: getattr(model.criterion.matcher, f"cost_{name}") for name in ("class", "mask", "dice")}
    assert costs == {"class": 1, "mask": 1, "dice": 1, key.lower(): 3}


@effect_of(f"{M}TRAIN_NUM_POINTS", f"{M}OVERSAMPLE_RATIO", f"{M}IMPORTANCE_SAMPLE_RATIO")
def test_points_of_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def certainty_of(values: dict[str, Any]) -> float:
        drawn.clear()
        losses(build({f"{M}TRAIN_NUM_POINTS": 50, **values}))
        return float(np.mean([logits.abs().mean().item() for logits in drawn]))

    def record(mask_logits: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        points, logits = choose(mask_logits, *settings)
        drawn.append(logits)
        return points, logits

    choose = criterion_module.uncertain_points
    monkeypatch.setattr(criterion_module, "uncertain_points", record)
    usual = certainty_of({})
    assert {logits.shape for logits in drawn} == {(6, 50)}
    assert certainty_of({f"{M}OVERSAMPLE_RATIO": 20.0}) < 0.9 * usual
    assert certainty_of({f"{M}IMPORTANCE_SAMPLE_RATIO": 0.0}) > 1.1 * usual


@effect_of(f"{M}ACTIVATION_CHECKPOINTING")
def test_layers_that_are_computed_twice() -> None:
    """test_modeling_checkpointing.py compares results and memory."""

    def calls(parts: list[str]) -> list[str]:
        model = build({f"{M}ACTIVATION_CHECKPOINTING": parts}).train()
        head, called = model.sem_seg_head, []
        layers = {
            "backbone": model.backbone.res4[1],
            "pixel_decoder": head.pixel_decoder.transformer.encoder.layers[0],
            "transformer_decoder": head.predictor.transformer_ffn_layers[0],
        }
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        sum(model([train_sample()]).values()).backward()
        return sorted(called)

    once = ["backbone", "pixel_decoder", "transformer_decoder"]
    assert calls([]) == once
    for part in once:
        assert calls([part]) == sorted([*once, part])


# ---------------------------------------------------------------------------------- transformer decoder


@effect_of(f"{M}TRANSFORMER_DECODER_NAME", f"{H}NAME", f"{H}PIXEL_DECODER_NAME")
def test_parts_by_name() -> None:
    head = build().sem_seg_head
    kinds = [type(head).__name__, type(head.pixel_decoder).__name__, type(head.predictor).__name__]
    assert kinds == ["MaskFormerHead", "MSDeformAttnPixelDecoder", "MultiScaleMaskedTransformerDecoder"]
    head = build(
        {
            f"{M}TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
            f"{M}TRANSFORMER_IN_FEATURE": "res5",
            f"{H}PIXEL_DECODER_NAME": "BasePixelDecoder",
        }
    ).sem_seg_head
    kinds = [type(head.pixel_decoder).__name__, type(head.predictor).__name__]
    assert kinds == ["BasePixelDecoder", "StandardTransformerDecoder"]
    head = build({f"{H}NAME": "PerPixelBaselineHead", "MODEL.META_ARCHITECTURE": "SemanticSegmentor"}).sem_seg_head
    assert type(head).__name__ == "PerPixelBaselineHead"


@effect_of(f"{M}NUM_OBJECT_QUERIES", f"{H}NUM_CLASSES", f"{M}DEC_LAYERS")
def test_numbers_of_queries_classes_and_layers() -> None:
    model = build({f"{M}NUM_OBJECT_QUERIES": 7, f"{H}NUM_CLASSES": 5, f"{M}DEC_LAYERS": 5})
    predictions = predict(model)
    assert predictions["pred_logits"].shape == (1, 7, 6)
    assert predictions["pred_masks"].shape == (1, 7, 16, 24)
    assert len(predictions["aux_outputs"]) == 4
    assert len(model.sem_seg_head.predictor.transformer_ffn_layers) == 4


@effect_of(f"{M}HIDDEN_DIM", f"{M}DIM_FEEDFORWARD")
def test_widths_of_the_transformer_decoder() -> None:
    shapes = names(build({f"{M}HIDDEN_DIM": 64, f"{M}DIM_FEEDFORWARD": 48}), "predictor.")
    prefix = "sem_seg_head.predictor."
    assert shapes[f"{prefix}query_feat.weight"] == [10, 64]
    assert shapes[f"{prefix}transformer_ffn_layers.0.linear1.weight"] == [48, 64]
    assert shapes[f"{prefix}input_proj.0.weight"] == [64, 32, 1, 1]


@effect_of(f"{M}NHEADS")
def test_heads_of_both_decoders() -> None:
    """The pixel decoder's encoder takes the same number, as in the published code."""
    model = build({f"{M}NHEADS": 4})
    layer = "pixel_decoder.transformer.encoder.layers.0.self_attn.sampling_offsets.weight"
    assert names(model)[f"sem_seg_head.{layer}"] == [4 * 3 * 4 * 2, 32]  # heads x levels x points x (x, y)
    # The decoder's weights don't show the heads; its results do.
    other = build({f"{M}NHEADS": 2}).sem_seg_head.predictor
    four = model.sem_seg_head.predictor
    other.load_state_dict(four.state_dict())
    maps, mask_features = [torch.randn(1, 32, size, size) for size in (2, 4, 8)], torch.randn(1, 32, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(four(maps, mask_features)["pred_logits"], other(maps, mask_features)["pred_logits"])


@effect_of(f"{M}PRE_NORM")
def test_pre_norm() -> None:
    before, after = (build({f"{M}PRE_NORM": value}).sem_seg_head.predictor for value in (True, False))
    x, zero = torch.randn(1, 10, 32) * 5, torch.zeros(1, 10, 32)
    layers = [decoder.transformer_ffn_layers[0] for decoder in (before, after)]
    for layer in layers:  # with nothing to add, the sum is the input: normed afterwards, or not at all
        nn.init.zeros_(layer.linear2.weight)
        nn.init.zeros_(layer.linear2.bias)
    torch.testing.assert_close(layers[0](x), x)
    torch.testing.assert_close(layers[1](x), F.layer_norm(x, (32,)))
    attention = [decoder.transformer_self_attention_layers[0] for decoder in (before, after)]
    attention[1].load_state_dict(attention[0].state_dict())
    normed = F.layer_norm(x, (32,))
    added = attention[0](x, zero) - x
    torch.testing.assert_close(attention[1](normed, zero), F.layer_norm(normed + added, (32,)), atol=1e-5, rtol=1e-5)


STANDARD = {f"{M}TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder", f"{M}TRANSFORMER_IN_FEATURE": "res5"}


@effect_of(f"{M}ENC_LAYERS")
def test_encoder_layers_of_the_standard_decoder() -> None:
    part = "predictor.transformer.encoder.layers"
    assert not names(build(STANDARD), part)
    encoder = names(build({**STANDARD, f"{M}ENC_LAYERS": 2}), part)
    assert {name.split(".layers.")[1][0] for name in encoder} == {"0", "1"}


@effect_of(f"{M}DROPOUT")
@pytest.mark.parametrize("part", ["pixel_decoder", "predictor"])
def test_dropout_in_encoder_and_standard_decoder(part: str) -> None:
    def rates(dropout: float) -> set[float]:
        module = getattr(build({**STANDARD, f"{M}DROPOUT": dropout}).sem_seg_head, part)
        return {getattr(m, "p", getattr(m, "dropout", None)) for m in module.modules() if dropout_of(m) is not None}

    def dropout_of(module: nn.Module) -> float | None:
        return module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout_p", None)

    assert rates(0.3) == {0.3}
    values = {**STANDARD, f"{M}DROPOUT": 0.5}
    model = build(values).train()
    images = model.preprocess([picture()]).tensor
    with torch.no_grad():
        features = model.backbone(images)
        first, second = (model.sem_seg_head(features)["pred_logits"] for _ in range(2))
    assert not torch.allclose(first, second)


@effect_of(f"{M}TRANSFORMER_IN_FEATURE")
@pytest.mark.parametrize(
    ("feature", "channels"),
    [("res5", 128), ("res4", 64), ("transformer_encoder", 32), ("pixel_embedding", 48)],
)
def test_what_the_standard_decoder_attends_to(feature: str, channels: int) -> None:
    model = build({**STANDARD, f"{M}TRANSFORMER_IN_FEATURE": feature, f"{H}MASK_DIM": 48})
    seen = []
    model.sem_seg_head.predictor.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    predict(model)
    assert seen[0].shape[1] == channels


@effect_of(f"{M}ENFORCE_INPUT_PROJ")
def test_enforced_input_projection() -> None:
    assert not names(build(), "predictor.input_proj")
    assert len(names(build({f"{M}ENFORCE_INPUT_PROJ": True}), "predictor.input_proj")) == 3 * 2
    assert not names(build({**STANDARD, f"{M}TRANSFORMER_IN_FEATURE": "transformer_encoder"}), "predictor.input_proj")
    values = {**STANDARD, f"{M}TRANSFORMER_IN_FEATURE": "transformer_encoder", f"{M}ENFORCE_INPUT_PROJ": True}
    assert len(names(build(values), "predictor.input_proj")) == 2


# ---------------------------------------------------------------------------------------- pixel decoder


@effect_of(f"{H}MASK_DIM", f"{H}CONVS_DIM", f"{H}NORM")
def test_widths_and_norm_of_the_pixel_decoder() -> None:
    shapes = names(build({f"{H}MASK_DIM": 48, f"{H}CONVS_DIM": 64, f"{H}NORM": ""}))
    prefix = "sem_seg_head.pixel_decoder."
    assert shapes[f"{prefix}mask_features.weight"] == [48, 64, 1, 1]
    assert shapes[f"{prefix}layer_1.weight"] == [64, 64, 3, 3]
    assert shapes["sem_seg_head.predictor.mask_embed.layers.2.weight"] == [48, 32]
    assert f"{prefix}layer_1.norm.weight" not in shapes
    assert f"{prefix}layer_1.norm.weight" in names(build())


@effect_of(
    f"{H}TRANSFORMER_ENC_LAYERS",
    f"{H}DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS",
    f"{H}DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD",
)
def test_layers_points_and_width_of_the_encoder() -> None:
    values = {
        f"{H}TRANSFORMER_ENC_LAYERS": 3,
        f"{H}DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 2,
        f"{H}DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD": 40,
    }
    shapes = names(build(values), "encoder.layers")
    layer = "sem_seg_head.pixel_decoder.transformer.encoder.layers.2."
    assert shapes[f"{layer}self_attn.attention_weights.weight"] == [8 * 3 * 2, 32]  # heads x levels x points
    assert shapes[f"{layer}linear1.weight"] == [40, 32]
    assert not any(".layers.3." in name for name in shapes)


@effect_of(f"{H}DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", f"{H}IN_FEATURES")
def test_features_of_the_encoder() -> None:
    """What the encoder does not see, an FPN adds, as far as IN_FEATURES goes."""
    key = f"{H}DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    expected = {("res2", "res3", "res4", "res5"): (4, 0), ("res3", "res4", "res5"): (3, 1), ("res4", "res5"): (2, 2)}
    for features, (levels, fpn_levels) in expected.items():
        model = build({key: features})
        assert len(names(model, "pixel_decoder.transformer.level_embed")) == 1
        assert names(model, "level_embed")["sem_seg_head.pixel_decoder.transformer.level_embed"] == [levels, 32]
        assert len(names(model, "pixel_decoder.adapter_")) == 3 * fpn_levels
        assert predict(model)["pred_masks"].shape[-2:] == (16, 24)
    with pytest.raises(UserError, match=r"must be some of IN_FEATURES, \['res2', 'res3', 'res4'\]"):
        build({f"{H}IN_FEATURES": ["res2", "res3", "res4"]})


@effect_of(f"{H}COMMON_STRIDE")
def test_stride_of_the_mask_features() -> None:
    assert predict(build({f"{H}COMMON_STRIDE": 8}))["pred_masks"].shape[-2:] == (8, 12)


PER_PIXEL = {
    f"{H}NAME": "PerPixelBaselineHead",
    f"{H}PIXEL_DECODER_NAME": "BasePixelDecoder",
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
}


@effect_of(f"{H}LOSS_WEIGHT", f"{H}IGNORE_VALUE")
def test_loss_of_the_per_pixel_heads() -> None:
    def loss(values: dict[str, Any]) -> float:
        model = build({**PER_PIXEL, **values}).train()
        labels = torch.zeros(64, 96, dtype=torch.long)
        labels[:, 48:] = 1
        labels[:20] = 7
        return model([{**picture(), "sem_seg": labels}])["loss_sem_seg"].item()

    usual = loss({f"{H}IGNORE_VALUE": 7})
    assert loss({f"{H}IGNORE_VALUE": 7, f"{H}LOSS_WEIGHT": 2.5}) == pytest.approx(2.5 * usual, rel=1e-5)
    with pytest.raises((IndexError, RuntimeError)):  # torch's: 7 is no class
        loss({f"{H}IGNORE_VALUE": 255})


# ------------------------------------------------------------------------------------------- inference


@effect_of(f"{M}SIZE_DIVISIBILITY")
def test_padding_of_batches() -> None:
    sizes = {64: (128, 128), 16: (80, 112), -1: (70, 100)}  # negative: the backbone's, and a ResNet asks for none
    for divisibility, expected in sizes.items():
        model = build({f"{M}SIZE_DIVISIBILITY": divisibility})
        assert model.preprocess([picture(70, 100)]).tensor.shape[-2:] == expected
    swin_padded = build({**SWIN, f"{M}SIZE_DIVISIBILITY": -1}).preprocess([picture(70, 100)])
    assert swin_padded.tensor.shape[-2:] == (96, 128)


@effect_of(f"{M}TEST.SEMANTIC_ON", f"{M}TEST.INSTANCE_ON", f"{M}TEST.PANOPTIC_ON")
@pytest.mark.parametrize(
    ("key", "output"), [("SEMANTIC_ON", "sem_seg"), ("INSTANCE_ON", "instances"), ("PANOPTIC_ON", "panoptic_seg")]
)
def test_switches_of_outputs(key: str, output: str) -> None:
    switches = {f"{M}TEST.{name}": name == key for name in ("SEMANTIC_ON", "INSTANCE_ON", "PANOPTIC_ON")}
    with torch.no_grad():
        (result,) = build(switches).eval()([picture()])
    assert result.keys() == {output}


@effect_of(f"{M}TEST.OBJECT_MASK_THRESHOLD", f"{M}TEST.OVERLAP_THRESHOLD")
def test_panoptic_thresholds() -> None:
    def scores(values: dict[str, Any]) -> list[float]:
        model = build({f"{M}NUM_OBJECT_QUERIES": 30, **values}).eval()
        weight = model.sem_seg_head.predictor.class_embed.weight
        nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            (result,) = model([picture()])
        return [segment["score"] for segment in result["panoptic_seg"][1]]

    # One segment of many queries that overlap: none of them has 90 % of its mask to itself.
    (score,) = scores({})
    assert scores({f"{M}TEST.OBJECT_MASK_THRESHOLD": score - 0.01}) == [score]
    assert scores({f"{M}TEST.OBJECT_MASK_THRESHOLD": score + 0.01}) == []
    assert scores({f"{M}TEST.OVERLAP_THRESHOLD": 0.01}) == [score]
    assert scores({f"{M}TEST.OVERLAP_THRESHOLD": 0.9}) == []


@effect_of(f"{M}TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE")
def test_resizing_before_semantic_inference() -> None:
    """Sums of resized probabilities, or resized sums: between cells they differ, and both are of the size asked for."""

    def scores(before: bool) -> Tensor:
        switches = {f"{M}TEST.{name}": False for name in ("INSTANCE_ON", "PANOPTIC_ON")}
        model = build({**switches, f"{M}TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": before}).eval()
        with torch.no_grad():
            return model([{**picture(), "height": 150, "width": 200}])[0]["sem_seg"]

    predictions = predict(build())
    classes = predictions["pred_logits"][0].softmax(-1)[:, :-1]
    masks = F.interpolate(predictions["pred_masks"], (64, 96), mode="bilinear", align_corners=False)
    resized = F.interpolate(masks, (150, 200), mode="bilinear", align_corners=False)[0].sigmoid()
    torch.testing.assert_close(scores(True), torch.einsum("qk,qhw->khw", classes, resized))
    sums = torch.einsum("qk,qhw->khw", classes, masks[0].sigmoid())
    expected = F.interpolate(sums[None], (150, 200), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(scores(False), expected)
    assert not torch.allclose(scores(True), scores(False), atol=1e-6)


@effect_of(f"{M}TEST.SEMANTIC_LABELS")
@pytest.mark.parametrize("tile_size", [0, 64])
def test_semantic_labels(tile_size: int) -> None:
    def semantic(labels: bool) -> Tensor:
        model = build(
            {f"{M}TEST.SEMANTIC_LABELS": labels, f"{M}TEST.TILE_SIZE": tile_size, f"{M}TEST.TILE_OVERLAP": 16}
        )
        with torch.no_grad():
            return model.eval()([{**picture(), "height": 70, "width": 100}])[0]["sem_seg"]

    scores, labels = semantic(False), semantic(True)
    assert scores.shape == (2, 70, 100) and scores.is_floating_point()
    assert labels.dtype == torch.int32 and torch.equal(labels.long(), scores.argmax(0))


@effect_of(f"{M}TEST.BFLOAT16")
def test_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def dtype_of_features(bfloat16: bool) -> torch.dtype:
        model = build({f"{M}TEST.BFLOAT16": bfloat16}).eval()
        seen = []
        model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output["res5"].dtype))
        with torch.no_grad():
            model([picture()])
        return seen[0]

    monkeypatch.setattr(precision, "_cpu_has_units", lambda: True)
    assert dtype_of_features(False) == torch.float32
    assert dtype_of_features(True) == torch.bfloat16
    monkeypatch.setattr(precision, "_cpu_has_units", lambda: False)
    with pytest.raises(UserError, match=r"MODEL.MASK_FORMER.TEST.BFLOAT16 needs .*: set it to False"):
        dtype_of_features(True)


@effect_of("TEST.DETECTIONS_PER_IMAGE")
def test_number_of_instances() -> None:
    with torch.no_grad():
        # Without panoptic results, which would leave out instances of stuff classes.
        values = {f"{M}TEST.PANOPTIC_ON": False}
        (few,) = build({**values, "TEST.DETECTIONS_PER_IMAGE": 3}).eval()([picture()])
        (many,) = build(values).eval()([picture()])
    assert len(few["instances"]) == 3
    assert len(many["instances"]) == 10 * 2  # queries x classes, fewer than the default of 100


@effect_of("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
def test_normalisation() -> None:
    model = build({"MODEL.PIXEL_MEAN": [1.0, 2.0, 3.0], "MODEL.PIXEL_STD": [4.0, 5.0, 6.0]})
    image = picture()["image"]
    expected = (image - torch.tensor([1.0, 2.0, 3.0])[:, None, None]) / torch.tensor([4.0, 5.0, 6.0])[:, None, None]
    torch.testing.assert_close(model.preprocess([{"image": image}]).tensor[0], expected)
