"""A folder that Hugging Face's ``Mask2FormerForUniversalSegmentation.from_pretrained`` reads."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .files import HUGGING_FACE_FILES, replace_file, write_safetensors
from .names import Weights, to_hugging_face

__all__ = ["write_hugging_face"]

PIXELS = "sem_seg_head.pixel_decoder."
QUERIES = "sem_seg_head.predictor."
NEEDED = (
    f"{PIXELS}transformer.encoder.layers.0.linear1.weight",
    f"{QUERIES}transformer_ffn_layers.0.linear1.weight",
    f"{QUERIES}class_embed.weight",
    f"{QUERIES}query_feat.weight",
)
STAGES = range(4)
POINTS = 4  # sampled for each head and level by their pixel decoder, which has no setting for it


def write_hugging_face(
    weights: Weights,
    folder: str,
    *,
    class_names: Sequence[str] | None = None,
    stride_in_1x1: bool = False,
    shortest_edge: int = 800,
    longest_edge: int = 1333,
    pixel_mean: Sequence[float] = (123.675, 116.280, 103.530),
    pixel_std: Sequence[float] = (58.395, 57.120, 57.375),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Write ``config.json``, ``preprocessor_config.json`` and ``model.safetensors`` into ``folder``.

    Args:
        weights: of a Mask2Former with Detectron2's ResNet or ``D2SwinTransformer``, in our names.
        class_names: one for each class; None: their default, "LABEL_0" and so on.
        stride_in_1x1: as in ``MODEL.RESNETS.STRIDE_IN_1X1``; the one thing that weights don't show.
        shortest_edge, longest_edge: pictures are resized to the first, but to no more than the second (pixels).
        pixel_mean, pixel_std: of RGB values from 0 to 255.
        dtype: of the weights.

    Returns:
        The weights as they were written, in their names.

    Raises:
        UserError: if these are weights of a model that Hugging Face's can't be.
    """
    config = _config({name: torch.as_tensor(value) for name, value in weights.items()}, stride_in_1x1)
    renamed, left_out = to_hugging_face(weights)
    if left_out:
        raise UserError(f"Hugging Face's Mask2Former has no place for {', '.join(sorted(left_out))}")
    names = class_names or [f"LABEL_{index}" for index in range(_classes(weights))]
    if len(names) != _classes(weights):
        raise UserError(f"the weights are for {_classes(weights)} classes, but there are {len(names)} class names")
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: index for index, name in enumerate(names)}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    os.makedirs(folder, exist_ok=True)
    _write_json(config, os.path.join(folder, "config.json"))
    processor = {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": shortest_edge, "longest_edge": longest_edge},
        "size_divisor": 32,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in pixel_mean],
        "image_std": [value / 255 for value in pixel_std],
        "ignore_index": 255,
        "do_reduce_labels": False,
    }
    _write_json(processor, os.path.join(folder, "preprocessor_config.json"))
    write_safetensors(renamed, os.path.join(folder, HUGGING_FACE_FILES[0]), dtype, {"format": "pt"})
    return renamed


def _classes(weights: Weights) -> int:
    return len(weights[f"{QUERIES}class_embed.weight"]) - 1  # the last one is "no object"


def _write_json(content: dict[str, Any], path: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)

    replace_file(path, write)


def _config(weights: Mapping[str, Tensor], stride_in_1x1: bool) -> dict[str, Any]:
    """The settings that the weights' names and shapes imply."""
    missing = [name for name in NEEDED if name not in weights]
    if missing:
        raise UserError(f"the weights are no Mask2Former's: {missing[0]} is missing")
    encoder = f"{PIXELS}transformer.encoder.layers."
    levels = len(weights[f"{PIXELS}transformer.level_embed"])
    queries, hidden_dim = weights[f"{QUERIES}query_feat.weight"].shape
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": _backbone_config(weights, stride_in_1x1),
        "feature_size": len(weights[f"{PIXELS}input_proj.0.0.weight"]),
        "mask_feature_size": len(weights[f"{PIXELS}mask_features.weight"]),
        "hidden_dim": hidden_dim,
        "num_queries": queries,
        "num_attention_heads": len(weights[f"{encoder}0.self_attn.attention_weights.weight"]) // (levels * POINTS),
        "encoder_layers": _count(weights, encoder),
        "encoder_feedforward_dim": len(weights[f"{encoder}0.linear1.weight"]),
        "decoder_layers": _count(weights, f"{QUERIES}transformer_ffn_layers.") + 1,  # they count predictions
        "dim_feedforward": len(weights[f"{QUERIES}transformer_ffn_layers.0.linear1.weight"]),
    }


def _backbone_config(weights: Mapping[str, Tensor], stride_in_1x1: bool) -> dict[str, Any]:
    out_features = [f"stage{stage + 1}" for stage in STAGES]
    if "backbone.stem.conv1.weight" in weights:
        return {"out_features": out_features} | _resnet_config(weights, stride_in_1x1)
    if "backbone.patch_embed.proj.weight" in weights:
        return {"out_features": out_features} | _swin_config(weights)
    raise UserError("Hugging Face's Mask2Former takes a ResNet or a Swin Transformer, and the backbone is neither")


def _resnet_config(weights: Mapping[str, Tensor], stride_in_1x1: bool) -> dict[str, Any]:
    last = "conv3" if "backbone.res2.0.conv3.weight" in weights else "conv2"
    return {
        "model_type": "resnet",
        "embedding_size": len(weights["backbone.stem.conv1.weight"]),
        "hidden_sizes": [len(weights[f"backbone.res{stage + 2}.0.{last}.weight"]) for stage in STAGES],
        "depths": [_count(weights, f"backbone.res{stage + 2}.") for stage in STAGES],
        "layer_type": "bottleneck" if last == "conv3" else "basic",
        "downsample_in_bottleneck": stride_in_1x1,
    }


def _swin_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch_size, _ = weights["backbone.patch_embed.proj.weight"].shape
    block = "backbone.layers.{}.blocks.0."
    tables = [weights[f"{block.format(stage)}attn.relative_position_bias_table"] for stage in STAGES]
    return {
        "model_type": "swin",
        "patch_size": patch_size,
        "embed_dim": width,
        "depths": [_count(weights, f"backbone.layers.{stage}.blocks.") for stage in STAGES],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (round(len(tables[0]) ** 0.5) + 1) // 2,  # a table has (2 W - 1)^2 rows
        "mlp_ratio": len(weights[f"{block.format(0)}mlp.fc1.weight"]) / width,
        "qkv_bias": f"{block.format(0)}attn.qkv.bias" in weights,
    }


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many parts are numbered behind a prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, weights) if match})
