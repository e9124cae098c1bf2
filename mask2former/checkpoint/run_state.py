"""What a run's checkpoint holds besides weights, checked before a part of the run takes it.

Such a part has numbers and tensors alone. Whole files can have wrong ones all the same: other programs write them, and
hands change them.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import UserError

__all__ = ["WrongState", "check_module", "check_optimizer", "check_state"]

# What torch's AdamW and SGD keep for each parameter that has its shape.
SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


class WrongState(UserError):
    """A part of a run can't have saved this. The message says of which value; who reads the file adds its name."""


def check_state(found: Any, like: Any, name: str) -> None:
    """Raise ``WrongState`` unless ``found`` is of the kind of ``like``.

    Args:
        found: from a file.
        like: a dict, whose keys ``found`` must have too, with values of their kinds; a list or tuple, of as many; a
            tensor, of the same shape; text; True or False; an integer, then of at least 0; or another number, then a
            finite one. None: anything but containers.
        name: of ``found`` in the file, for the message.
    """
    if isinstance(like, Mapping):
        _check_dict(found, like, name)
    elif isinstance(like, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(like):
            _refuse(name, found, f"a list of {len(like)}")
        for index, (item, item_like) in enumerate(zip(found, like, strict=True)):
            check_state(item, item_like, f"{name}[{index}]")
    elif isinstance(like, Tensor):
        _check_tensor(found, like.shape, name)
    elif isinstance(like, bool | str):
        if type(found) is not type(like):
            _refuse(name, found, "text" if isinstance(like, str) else "True or False")
    elif isinstance(like, int):
        if type(found) is not int or found < 0:
            _refuse(name, found, "an integer of at least 0")
    elif isinstance(like, float):
        if type(found) not in (int, float) or not math.isfinite(found):
            _refuse(name, found, "a number")
    elif isinstance(found, str | list | tuple | Mapping):
        _refuse(name, found, "a number, or nothing")


def _check_dict(found: Any, like: Mapping[Any, Any], name: str) -> None:
    if not isinstance(found, Mapping):
        _refuse(name, found, "a dict")
    missing = [key for key in like if key not in found]
    if missing:
        raise WrongState(f"{name} lacks {missing[0]!r}, and has {len(found)} entries")
    for key, value in like.items():
        check_state(found[key], value, f"{name}.{key}")


def _check_tensor(found: Any, shape: torch.Size, name: str) -> None:
    if not isinstance(found, Tensor) or found.is_complex() or found.layout != torch.strided or found.shape != shape:
        _refuse(name, found, f"a tensor of shape {list(shape)}")


def check_module(state: Any, own: Mapping[str, Tensor], name: str) -> None:
    """Raise ``WrongState`` unless a module's state dict has the names and shapes of the module's ``own``."""
    check_state(state, own, name)
    unknown = [key for key in state if key not in own]
    if unknown:
        raise WrongState(f"{name} has {str(unknown[0])[:60]!r}, which this run's has not")


def check_optimizer(state: Any, optimizer: Optimizer, name: str) -> None:
    """Raise ``WrongState`` unless an optimizer's state fits ``optimizer``.

    What a parameter group lacks, as one of an older torch may, it gets from the optimizer.
    """
    groups = optimizer.param_groups
    check_state(
        state, {"param_groups": [{"params": [0] * len(group["params"])} for group in groups], "state": {}}, name
    )
    for index, (group, own) in enumerate(zip(state["param_groups"], groups, strict=True)):
        for key, value in own.items():
            group.setdefault(key, value)
            if key != "params":
                check_state(group[key], _any_number(value), f"{name}.param_groups[{index}].{key}")
        parameters = dict(zip(group["params"], own["params"], strict=True))
        kept = {number: state["state"][number] for number in parameters if number in state["state"]}
        names = next((entry.keys() for entry in kept.values() if isinstance(entry, dict)), ())
        for number, entry in kept.items():
            place = f"{name}.state[{number}]"
            check_state(entry, dict.fromkeys(names), place)
            for key, value in entry.items():
                _check_entry(value, parameters[number], key, f"{place}.{key}")


def _any_number(value: Any) -> Any:
    """What stands for an option of an optimizer: 0 and 0.1, or None and True, can be values of the same one."""
    if isinstance(value, bool):
        return None
    return float(value) if isinstance(value, int) else value


def _check_entry(value: Any, parameter: Tensor, key: str, name: str) -> None:
    if key in SHAPED and not (key == "momentum_buffer" and value is None):
        _check_tensor(value, parameter.shape, name)
    elif key == "step":
        step = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if type(step) not in (int, float) or not 0 <= step < math.inf:
            _refuse(name, value, "a number of at least 0")


def _refuse(name: str, found: Any, expected: str) -> NoReturn:
    raise WrongState(f"{name} is {_describe(found)}, expected {expected}")


def _describe(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {list(found.shape)} ({found.dtype})"
    if isinstance(found, list | tuple | Mapping):
        return f"a {type(found).__name__} of {len(found)}"
    return repr(found)[:60]
