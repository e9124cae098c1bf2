"""torchvision's ResNets, as Detectron2's.

Detectron2's recipes for them have ``RESNETS.STRIDE_IN_1X1: False`` and pictures in RGB.
"""

import re

from .format import Format, Names, Weights

__all__ = ["TORCHVISION_RESNET"]

NAMES = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer1\.", "res2."),
    (r"^layer2\.", "res3."),
    (r"^layer3\.", "res4."),
    (r"^layer4\.", "res5."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def _fits(names: Names) -> bool:
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.bn2.weight"}.issubset(names)


def _convert(weights: Weights) -> tuple[Weights, list[str]]:
    left_out = [name for name in weights if name.startswith("fc.")]  # the classifier
    counters = [name for name in weights if name.endswith("num_batches_tracked")]  # which no norm here reads
    return {_rename(name): value for name, value in weights.items() if name not in left_out + counters}, left_out


def _rename(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


TORCHVISION_RESNET = Format("torchvision's ResNet", _fits, _convert, backbone_only=True)
