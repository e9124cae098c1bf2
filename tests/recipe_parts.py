"""What a recipe builds, without memory for its weights and without its data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from torch import nn

from mask2former.data.resized_crop import ResizeAndCrop
from mask2former.engine import Recipe, load_recipe

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MODULE_ATTRIBUTES = vars(nn.Module()).keys()  # its own bookkeeping


def load(path: str, *options: str) -> Recipe:
    """A recipe under ``configs/``, on the CPU."""
    device = "train.device" if path.endswith(".py") else "MODEL.DEVICE"
    return load_recipe(str(CONFIGS / path), [device, "cpu", *options])


def build_without_memory(recipe: Recipe) -> nn.Module:
    """The recipe's model with shapes and no values."""
    with torch.device("meta"):
        if not isinstance(recipe.config, CfgNode):
            return instantiate(recipe.config.model)
        cfg = recipe.config.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "meta"
        return build_model(cfg)


def plain(value: Any) -> Any:
    """Sequences of all kinds as lists, other objects by what they say of themselves: comparable with ``==``."""
    if isinstance(value, str | int | float | type(None)):
        return value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return repr(value)


def describe_modules(model: nn.Module) -> dict[str, Any]:
    """Class and plain attributes of every module."""
    kinds = (bool, int, float, str, Sequence, Mapping, type(None))
    return {
        name: (
            type(module).__name__,
            {
                key: plain(value)
                for key, value in vars(module).items()
                if isinstance(value, kinds) and key not in MODULE_ATTRIBUTES
            },
        )
        for name, module in model.named_modules()
    }


def describe_augmentations(augmentations: Sequence[Any]) -> list[Any]:
    """Type and arguments of each, and of those that it is made of."""
    parts = [part for item in augmentations for part in parts_of(item)]
    unwrapped = [getattr(item, "tfm", item) for item in parts]  # Detectron2 wraps transforms
    return [(type(item).__name__, plain(vars(item))) for item in unwrapped]


def parts_of(augmentation: Any) -> tuple[Any, ...]:
    return (augmentation.resize, augmentation.crop) if isinstance(augmentation, ResizeAndCrop) else (augmentation,)


def groups_of_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The options (learning rate, weight decay and so on) of every optimized parameter, by its name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def schedule(recipe: Recipe, steps: Sequence[int]) -> list[float]:
    """The learning rate at each step, for a base rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = recipe.build_scheduler(optimizer)
    optimizer.step()
    rates = []
    for step in steps:
        scheduler.last_epoch = step - 1  # so that nothing has to go through the steps between
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates
