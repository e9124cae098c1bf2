"""Hugging Face's Mask2Former with a ResNet or a Swin Transformer, in both directions.

The names on their side are those in their files. ``save_pretrained`` writes them whatever the modules are called
in memory.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from .format import Format, Names, Weights

__all__ = ["HUGGING_FACE", "HUGGING_FACE_BACKBONE", "to_hugging_face"]

PIXELS = "sem_seg_head.pixel_decoder."
QUERIES = "sem_seg_head.predictor."
THEIR_BACKBONE = "model.pixel_level_module.encoder."
THEIR_PIXELS = "model.pixel_level_module.decoder."
THEIR_QUERIES = "model.transformer_module."
THEIR_LAYER = f"{THEIR_QUERIES}decoder.layers.{{}}."
BLOCK = "backbone.layers.{}.blocks.{}."
THEIR_BLOCK = f"{THEIR_BACKBONE}encoder.layers.{{}}.blocks.{{}}."

# Ours and theirs. `{}` is a word without dots, the same on both sides; what ends in "." or "_" goes on with one.
NAMES = (
    (f"{PIXELS}transformer.level_embed", f"{THEIR_PIXELS}level_embed"),
    (f"{PIXELS}transformer.encoder.layers.{{}}.self_attn.{{}}.", f"{THEIR_PIXELS}encoder.layers.{{}}.self_attn.{{}}."),
    (f"{PIXELS}transformer.encoder.layers.{{}}.norm1.", f"{THEIR_PIXELS}encoder.layers.{{}}.self_attn_layer_norm."),
    (f"{PIXELS}transformer.encoder.layers.{{}}.norm2.", f"{THEIR_PIXELS}encoder.layers.{{}}.final_layer_norm."),
    (f"{PIXELS}transformer.encoder.layers.{{}}.linear1.", f"{THEIR_PIXELS}encoder.layers.{{}}.fc1."),
    (f"{PIXELS}transformer.encoder.layers.{{}}.linear2.", f"{THEIR_PIXELS}encoder.layers.{{}}.fc2."),
    (f"{PIXELS}input_proj.{{}}.{{}}.", f"{THEIR_PIXELS}input_projections.{{}}.{{}}."),
    (f"{PIXELS}mask_features.", f"{THEIR_PIXELS}mask_projection."),
    (f"{PIXELS}adapter_{{}}.norm.", f"{THEIR_PIXELS}adapter_{{}}.1."),
    (f"{PIXELS}adapter_{{}}.", f"{THEIR_PIXELS}adapter_{{}}.0."),
    (f"{PIXELS}layer_{{}}.norm.", f"{THEIR_PIXELS}layer_{{}}.1."),
    (f"{PIXELS}layer_{{}}.", f"{THEIR_PIXELS}layer_{{}}.0."),
    (f"{QUERIES}query_feat.", f"{THEIR_QUERIES}queries_features."),
    (f"{QUERIES}query_embed.", f"{THEIR_QUERIES}queries_embedder."),
    (f"{QUERIES}level_embed.", f"{THEIR_QUERIES}level_embed."),
    (f"{QUERIES}decoder_norm.", f"{THEIR_QUERIES}decoder.layernorm."),
    (f"{QUERIES}class_embed.", "class_predictor."),
    (f"{QUERIES}mask_embed.layers.{{}}.", f"{THEIR_QUERIES}decoder.mask_predictor.mask_embedder.{{}}.0."),
    (f"{QUERIES}transformer_self_attention_layers.{{}}.norm.", f"{THEIR_LAYER}self_attn_layer_norm."),
    (f"{QUERIES}transformer_self_attention_layers.{{}}.self_attn.out_proj.", f"{THEIR_LAYER}self_attn.out_proj."),
    (f"{QUERIES}transformer_cross_attention_layers.{{}}.norm.", f"{THEIR_LAYER}cross_attn_layer_norm."),
    (f"{QUERIES}transformer_cross_attention_layers.{{}}.multihead_attn.", f"{THEIR_LAYER}cross_attn."),
    (
        f"{QUERIES}transformer_cross_attention_layers.{{}}.multihead_attn.out_proj.",
        f"{THEIR_LAYER}cross_attn.out_proj.",
    ),
    (f"{QUERIES}transformer_ffn_layers.{{}}.norm.", f"{THEIR_LAYER}final_layer_norm."),
    (f"{QUERIES}transformer_ffn_layers.{{}}.linear1.", f"{THEIR_LAYER}fc1."),
    (f"{QUERIES}transformer_ffn_layers.{{}}.linear2.", f"{THEIR_LAYER}fc2."),
    ("criterion.empty_weight", "criterion.empty_weight"),
    # ResNet
    ("backbone.stem.conv1.", f"{THEIR_BACKBONE}embedder.embedder.convolution."),
    ("backbone.stem.conv1.norm.", f"{THEIR_BACKBONE}embedder.embedder.normalization."),
    *(
        (
            f"backbone.res{stage + 2}.{{}}.{ours}.{norm}",
            f"{THEIR_BACKBONE}encoder.stages.{stage}.layers.{{}}.{theirs}.{kind}.",
        )
        for stage in range(4)
        for ours, theirs in (("conv1", "layer.0"), ("conv2", "layer.1"), ("conv3", "layer.2"), ("shortcut", "shortcut"))
        for norm, kind in (("", "convolution"), ("norm.", "normalization"))
    ),
    # Swin Transformer
    ("backbone.patch_embed.proj.", f"{THEIR_BACKBONE}embeddings.patch_embeddings.projection."),
    ("backbone.patch_embed.norm.", f"{THEIR_BACKBONE}embeddings.norm."),
    (f"{BLOCK}norm1.", f"{THEIR_BLOCK}layernorm_before."),
    (f"{BLOCK}norm2.", f"{THEIR_BLOCK}layernorm_after."),
    (f"{BLOCK}attn.proj.", f"{THEIR_BLOCK}attention.output.dense."),
    (f"{BLOCK}attn.relative_position_bias_table", f"{THEIR_BLOCK}attention.self.relative_position_bias_table"),
    (f"{BLOCK}mlp.fc1.", f"{THEIR_BLOCK}intermediate.dense."),
    (f"{BLOCK}mlp.fc2.", f"{THEIR_BLOCK}output.dense."),
    ("backbone.layers.{}.downsample.{}.", f"{THEIR_BACKBONE}encoder.layers.{{}}.downsample.{{}}."),
    *((f"backbone.norm{stage}.", f"{THEIR_BACKBONE}hidden_states_norms.stage{stage + 1}.") for stage in range(4)),
)
# One matrix of ours, for queries, keys and values, is three of theirs.
SPLIT_NAMES = (
    (
        f"{QUERIES}transformer_self_attention_layers.{{}}.self_attn.in_proj_",
        tuple(f"{THEIR_LAYER}self_attn.{part}_proj." for part in "qkv"),
    ),
    (f"{BLOCK}attn.qkv.", tuple(f"{THEIR_BLOCK}attention.self.{part}." for part in ("query", "key", "value"))),
)
TABLE = (*((ours, (theirs,)) for ours, theirs in NAMES), *SPLIT_NAMES)

# Names of their Swin in memory since version 5, where they differ from those in files.
IN_MEMORY = (
    (r"\.encoder\.swin\.(embeddings|encoder)\.", r".encoder.\1."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)

# The prefixes of their Swin and ResNet alone, trained as classifiers, and a weight that each has.
THEIR_BACKBONES = {
    "swin.": "embeddings.patch_embeddings.projection.weight",
    "resnet.": "embedder.embedder.convolution.weight",
}
PREFIX = r"^(swin|resnet)\."

# Buffers that each side makes by itself.
COMPUTED = ("relative_position_index", "num_batches_tracked")


class _Template:
    """A name with gaps: the words in them are found in one template and put into another."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.ends_in_word = text.endswith((".", "_"))
        self.pattern = re.compile(re.escape(text).replace(r"\{\}", r"(\w+)") + r"(\w+)" * self.ends_in_word)

    def words(self, name: str) -> tuple[str, ...] | None:
        match = self.pattern.fullmatch(name)
        return match and match.groups()

    def fill(self, words: tuple[str, ...]) -> str:
        return self.text.format(*words) + (words[-1] if self.ends_in_word else "")


TEMPLATES = [(_Template(ours), [_Template(name) for name in theirs]) for ours, theirs in TABLE]


def _fits(names: Names) -> bool:
    return {"class_predictor.weight", f"{THEIR_QUERIES}queries_features.weight"}.issubset(names)


def _convert(weights: Weights) -> tuple[Weights, list[str]]:
    parts: dict[str, list[Any]] = {}  # by our name, in the order of their templates
    left_out = []
    for name, value in weights.items():
        found = None if name.endswith(COMPUTED) else _our_name(name)
        if found is not None:
            ours, index, count = found
            parts.setdefault(ours, [None] * count)[index] = value
        elif not name.endswith(COMPUTED):
            left_out.append(name)
    whole = {name: values for name, values in parts.items() if all(value is not None for value in values)}
    return {name: _join(name, values) for name, values in whole.items()}, left_out


def _join(name: str, values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) > 1 or shapes[0] == ():
        raise UserError(f"the parts of {name} must have one shape, but have {shapes}")
    return torch.cat([torch.as_tensor(value) for value in values])


def _fits_backbone(names: Names) -> bool:
    return any(f"{prefix}{first}" in names for prefix, first in THEIR_BACKBONES.items())


def _convert_backbone(weights: Weights) -> tuple[Weights, list[str]]:
    inside = {name: re.sub(PREFIX, THEIR_BACKBONE, name) for name in weights}
    renamed, _ = _convert({inside[name]: value for name, value in weights.items()})
    return renamed, [name for name in weights if not name.endswith(COMPUTED) and _our_name(inside[name]) is None]


def _our_name(name: str) -> tuple[str, int, int] | None:
    """Our name of one of their weights, which of how many parts of ours it is; None if we have no such weight."""
    for pattern, replacement in IN_MEMORY:
        name = re.sub(pattern, replacement, name)
    for ours, theirs in TEMPLATES:
        for index, template in enumerate(theirs):
            words = template.words(name)
            if words is not None:
                return ours.fill(words), index, len(theirs)
    return None


def to_hugging_face(weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """From our names to theirs.

    Returns:
        Their weights; and our names that have no place there.
    """
    renamed: dict[str, Tensor] = {}
    left_out = []
    for name, value in weights.items():
        names = _their_names(name)
        renamed.update(zip(names, torch.as_tensor(value).chunk(len(names) or 1), strict=False))
        if not names and not name.endswith(COMPUTED):
            left_out.append(name)
    counters = [name.replace("running_var", "num_batches_tracked") for name in renamed if name.endswith("running_var")]
    return renamed | {name: torch.tensor(0) for name in counters}, left_out


def _their_names(name: str) -> list[str]:
    for ours, theirs in TEMPLATES:
        words = ours.words(name)
        if words is not None:
            return [template.fill(words) for template in theirs]
    return []


HUGGING_FACE_BACKBONE = Format("Hugging Face's backbone", _fits_backbone, _convert_backbone)
HUGGING_FACE = Format("Hugging Face's Mask2Former", _fits, _convert)
