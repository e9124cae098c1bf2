"""The same weights in Hugging Face's Mask2Former give the same logits: a second opinion on the whole network."""

import re
from pathlib import Path
from types import ModuleType

import torch
from reference_weights import load_reference_weights, reference_image
from torch import Tensor

from mask2former.engine import load_config

OPTIONS = [
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "16"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "2"),
    *("MODEL.MASK_FORMER.DEC_LAYERS", "5", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "20"),
]

HEAD_NAMES = [
    (r"pixel_decoder\.transformer\.level_embed", "pixel_level_module.decoder.level_embed"),
    (r"pixel_decoder\.transformer\.encoder\.", "pixel_level_module.decoder.encoder."),
    (r"pixel_decoder\.input_proj\.", "pixel_level_module.decoder.input_projections."),
    (r"pixel_decoder\.mask_features\.", "pixel_level_module.decoder.mask_projection."),
    (r"pixel_decoder\.(adapter|layer)_1\.norm\.", r"pixel_level_module.decoder.\1_1.1."),
    (r"pixel_decoder\.(adapter|layer)_1\.", r"pixel_level_module.decoder.\1_1.0."),
    (r"predictor\.query_feat\.", "transformer_module.queries_features."),
    (r"predictor\.query_embed\.", "transformer_module.queries_embedder."),
    (r"predictor\.level_embed\.", "transformer_module.level_embed."),
    (r"predictor\.decoder_norm\.", "transformer_module.decoder.layernorm."),
    (r"predictor\.mask_embed\.layers\.(\d)\.", r"transformer_module.decoder.mask_predictor.mask_embedder.\1.0."),
    (r"predictor\.transformer_self_attention_layers\.(\d)\.norm\.", r"T.\1.self_attn_layer_norm."),
    (r"predictor\.transformer_self_attention_layers\.(\d)\.", r"T.\1."),
    (r"predictor\.transformer_cross_attention_layers\.(\d)\.norm\.", r"T.\1.cross_attn_layer_norm."),
    (r"predictor\.transformer_cross_attention_layers\.(\d)\.multihead_attn\.", r"T.\1.cross_attn."),
    (r"predictor\.transformer_ffn_layers\.(\d)\.norm\.", r"T.\1.final_layer_norm."),
    (r"predictor\.transformer_ffn_layers\.(\d)\.", r"T.\1."),
    (r"^T\.", "transformer_module.decoder.layers."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
    (r"\.linear(\d)\.", r".fc\1."),
]
BLOCK_LAYERS = {"conv1": "layer.0", "conv2": "layer.1", "conv3": "layer.2", "shortcut": "shortcut"}


def in_their_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name.startswith("backbone."):
            renamed[f"model.pixel_level_module.encoder.{backbone_name(name)}"] = value
        elif "predictor.class_embed" in name:
            renamed[f"class_predictor.{name.rpartition('.')[2]}"] = value
        elif name.startswith("criterion."):
            renamed[name] = value
        else:
            new = name.removeprefix("sem_seg_head.")
            for pattern, replacement in HEAD_NAMES:
                new = re.sub(pattern, replacement, new)
            renamed.update(split_projection(f"model.{new}", value))
    return renamed


def backbone_name(name: str) -> str:
    leaf = name.rpartition(".")[2]
    kind = "normalization" if ".norm." in name else "convolution"
    block = re.match(r"backbone\.res(\d)\.(\d+)\.(\w+)\.", name)
    if block is None:
        return f"embedder.embedder.{kind}.{leaf}"
    stage, layer, conv = int(block[1]) - 2, block[2], BLOCK_LAYERS[block[3]]
    return f"encoder.stages.{stage}.layers.{layer}.{conv}.{kind}.{leaf}"


def split_projection(name: str, value: Tensor) -> dict[str, Tensor]:
    """Their self-attention has three projections where ours has one."""
    if ".self_attn.in_proj_" not in name:
        return {name: value}
    stem, _, leaf = name.rpartition("in_proj_")
    return {f"{stem}{part}_proj.{leaf}": chunk for part, chunk in zip("qkv", value.chunk(3), strict=True)}


def test_same_weights_give_the_same_logits(repository: Path, hugging_face: ModuleType) -> None:
    import transformers
    from detectron2.modeling import build_model

    cfg = load_config(
        str(repository / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"),
        [*OPTIONS, "MODEL.DEVICE", "cpu"],
    )
    ours = build_model(cfg).eval()
    load_reference_weights(ours)
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[64, 128, 256, 512],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=133, encoder_layers=2, decoder_layers=5, num_queries=20
    )
    theirs = hugging_face.Mask2FormerForUniversalSegmentation(config).eval()
    missing, unexpected = theirs.load_state_dict(in_their_names(ours.state_dict()), strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)

    image = torch.from_numpy(reference_image(128, 160, seed=3))
    with torch.inference_mode():
        batch = ours.preprocess([{"image": image}])
        predictions = ours.sem_seg_head(ours.backbone(batch.tensor))
        reference = theirs(pixel_values=batch.tensor)
    for mine, other in [
        (predictions["pred_logits"], reference.class_queries_logits),
        (predictions["pred_masks"], reference.masks_queries_logits),
    ]:
        assert mine.shape == other.shape
        assert ((mine - other).abs() <= 1e-3).float().mean() >= 0.99
