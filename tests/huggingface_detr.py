"""Our transformer's weights under the names of Hugging Face's DETR and MaskFormer, whose layers are the same."""

import re

from torch import Tensor

__all__ = ["in_detr_names"]

NAMES = [
    (r"\.multihead_attn\.", ".encoder_attn."),
    (r"_attn\.out_proj\.", "_attn.o_proj."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
]
ENCODER_NAMES = [(r"\.norm2\.", ".final_layer_norm.")]
DECODER_NAMES = [
    (r"\.norm2\.", ".encoder_attn_layer_norm."),
    (r"\.norm3\.", ".final_layer_norm."),
    (r"^norm\.", "layernorm."),
]


def in_detr_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a ``TransformerEncoder`` or ``TransformerDecoder``, post-norm."""
    names = NAMES + (DECODER_NAMES if any("multihead_attn" in name for name in state) else ENCODER_NAMES)
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" not in name:
            renamed[name] = value
            continue
        stem, _, leaf = name.rpartition("in_proj_")
        renamed |= {f"{stem}{part}_proj.{leaf}": chunk for part, chunk in zip("qkv", value.chunk(3), strict=True)}
    return renamed
