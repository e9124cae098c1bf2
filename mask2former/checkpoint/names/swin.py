"""Swin Transformer's own weights, as ``D2SwinTransformer``'s: Microsoft's files and the published conversions."""

import re

from .format import Format, Names, Weights

__all__ = ["SWIN"]

# The classifier and the norm before it; masks of shifted windows, which here are made for the picture's size.
LEFT_OUT = re.compile(r"head\..*|norm\..*|.*\.attn_mask")


def _fits(names: Names) -> bool:
    return {"patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"}.issubset(names)


def _convert(weights: Weights) -> tuple[Weights, list[str]]:
    left_out = [name for name in weights if LEFT_OUT.fullmatch(name)]
    return {name: value for name, value in weights.items() if name not in left_out}, left_out


SWIN = Format("Swin Transformer's", _fits, _convert, backbone_only=True)
