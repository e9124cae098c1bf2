"""EfficientNets of the efficientnet_pytorch family of packages, as a timm backbone of this package."""

import re

from ...errors import UserError
from .format import Format, Names, Weights

__all__ = ["EFFICIENTNET"]

PREFIX = "backbone.body."
STAGES = (1, 2, 2, 3, 3, 4, 1)  # blocks in each stage of EfficientNet-B0 and Lite0
PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(.+)")
STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}


def _fits(names: Names) -> bool:
    return "_conv_stem.weight" in names and "_blocks.0._depthwise_conv.weight" in names


def _convert(weights: Weights) -> tuple[Weights, list[str]]:
    """To names of timm's EfficientNet-B0 and Lite0, without the classifier."""
    stage_of = [(stage, index) for stage, depth in enumerate(STAGES) for index in range(depth)]
    last = max(int(match[1]) for match in map(BLOCK.match, weights) if match)
    if last + 1 != len(stage_of):
        raise UserError(f"weights of an EfficientNet with {last + 1} blocks: only those with {len(stage_of)} are known")
    renamed, left_out = {}, []
    for name, value in weights.items():
        module, _, rest = name.partition(".")
        match = BLOCK.match(name)
        expanded = match and f"_blocks.{match[1]}._expand_conv.weight" in weights
        layers = EXPANDED_BLOCK if expanded else PLAIN_BLOCK
        if module in STEM:
            renamed[f"{PREFIX}{STEM[module]}.{rest}"] = value
        elif match and match[2] in layers:
            stage, index = stage_of[int(match[1])]
            renamed[f"{PREFIX}blocks.{stage}.{index}.{layers[match[2]]}.{match[3]}"] = value
        else:
            left_out.append(name)
    return renamed, left_out


EFFICIENTNET = Format("efficientnet_pytorch's EfficientNet", _fits, _convert)
