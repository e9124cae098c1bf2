"""Names of other projects' state dicts, turned into those of this model."""

import re
from collections.abc import Mapping
from typing import TypeVar

from ..errors import UserError

__all__ = ["from_efficientnet_pytorch", "is_efficientnet_pytorch"]

Value = TypeVar("Value")

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
STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}


def is_efficientnet_pytorch(state: Mapping[str, object]) -> bool:
    """Whether a state dict has the names of the efficientnet_pytorch family of packages."""
    return "_conv_stem.weight" in state and "_blocks.0._depthwise_conv.weight" in state


def from_efficientnet_pytorch(state: Mapping[str, Value], prefix: str = "") -> dict[str, Value]:
    """Names of timm's EfficientNet-B0 and Lite0 behind ``prefix``; the classifier's weights are left out.

    Raises:
        UserError: if it is another size of EfficientNet.
    """
    stage_of = [(stage, index) for stage, depth in enumerate(STAGES) for index in range(depth)]
    last = max(int(name.split(".")[1]) for name in state if name.startswith("_blocks."))
    if last + 1 != len(stage_of):
        raise UserError(f"weights of an EfficientNet with {last + 1} blocks: only those with {len(stage_of)} are known")
    renamed = {}
    for name, value in state.items():
        module, _, rest = name.partition(".")
        if module in STEM:
            renamed[f"{prefix}{STEM[module]}.{rest}"] = value
        elif match := re.match(r"(\d+)\.(\w+)\.(.+)", rest):
            block, layer, leaf = int(match[1]), match[2], match[3]
            stage, index = stage_of[block]
            layers = EXPANDED_BLOCK if f"_blocks.{block}._expand_conv.weight" in state else PLAIN_BLOCK
            renamed[f"{prefix}blocks.{stage}.{index}.{layers[layer]}.{leaf}"] = value
    return renamed
