"""Swin Transformer's weights, as ``D2SwinTransformer``'s: Microsoft's files, the published conversions, and timm's."""

import re

from .format import Format, Names, Weights

__all__ = ["SWIN"]

# The classifier and the norm before it; masks of shifted windows, which here are made for the picture's size.
LEFT_OUT = re.compile(r"head\..*|norm\..*|.*\.attn_mask")


def _fits(names: Names) -> bool:
    return {"patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"}.issubset(names)


def _convert(weights: Weights) -> tuple[Weights, list[str]]:
    left_out = [name for name in weights if LEFT_OUT.fullmatch(name)]
    # timm has the merging of patches at the beginning of a stage, Microsoft at the end of the one before.
    shift = 0 if any(name.startswith("layers.0.downsample.") for name in weights) else 1
    return {_rename(name, shift): value for name, value in weights.items() if name not in left_out}, left_out


def _rename(name: str, shift: int) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - shift}.downsample.", name)


SWIN = Format("Swin Transformer's", _fits, _convert, backbone_only=True)
