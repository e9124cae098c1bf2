"""Ways to damage a file: its bytes, or one value of what it holds. All take their decisions from a random generator."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["BYTE_CHANGES", "Change", "change_array", "change_bytes", "change_value"]

GARBAGE_LENGTH = 300
NOT_FOUND_PAGE = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"

NUMBERS = (-1, 0, 1, 2, -(2**31), 2**31, 2**63, 10**30, 10**18, 0.5, -0.5, 1e38, 1e308, math.inf, -math.inf, math.nan)
TEXTS = ("", " ", "\0", "../../nowhere", "/", "a" * 5000, "\ud7ff\u202e\u00e9", "line\nline", "-1", "nan")
OTHER_TYPES = (None, "text", "", True, -3, 3.5, [], {}, [[1]], [None], {"a": 1}, {"size": [1, 1], "counts": "0"})


@dataclass(frozen=True)
class Change:
    """What was done to a file.

    Attributes:
        text: for the report.
        wrong_type: a value of another type than any valid file has there. Who reads it and goes on with another result
            than that of the good file, without a word, has overlooked it.
    """

    text: str
    wrong_type: bool = False


# ---------------------------------------------------------------------------------------------------- bytes


def change_bytes(content: bytes, rng: random.Random) -> tuple[bytes, Change]:
    """A file's content with damage that knows nothing of its format."""
    name = rng.choice(list(BYTE_CHANGES))
    return BYTE_CHANGES[name](content, rng), Change(name)


def _flip(content: bytes, rng: random.Random, count: int) -> bytes:
    flipped = bytearray(content)
    for _ in range(count if content else 0):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _overwrite(content: bytes, rng: random.Random, byte: int | None) -> bytes:
    start, length = rng.randrange(len(content) + 1), rng.randrange(1, 200)
    block = rng.randbytes(length) if byte is None else bytes([byte]) * length
    return content[:start] + block + content[start + length :]


def _remove_block(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.randrange(1, 200) :]


def _repeat_block(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    end = start + rng.randrange(1, 200)
    return content[:end] + content[start:]


BYTE_CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": lambda content, rng: _flip(content, rng, 1),
    "a bit at the beginning flipped": lambda content, rng: _flip(content[:64], rng, 1) + content[64:],
    "a bit at the end flipped": lambda content, rng: content[:-400] + _flip(content[-400:], rng, 1),
    "many bits flipped": lambda content, rng: _flip(content, rng, rng.randrange(2, 100)),
    "cut": lambda content, rng: content[: rng.randrange(len(content) + 1)],
    "its last bytes cut": lambda content, rng: content[: -rng.randrange(1, 20)],
    "its first bytes cut": lambda content, rng: content[rng.randrange(1, 20) :],
    "empty": lambda content, rng: b"",
    "garbage behind it": lambda content, rng: content + rng.randbytes(rng.randrange(1, GARBAGE_LENGTH)),
    "nothing but garbage": lambda content, rng: rng.randbytes(GARBAGE_LENGTH),
    "a block of zeros": lambda content, rng: _overwrite(content, rng, 0),
    "a block of garbage": lambda content, rng: _overwrite(content, rng, None),
    "a block removed": _remove_block,
    "a block twice": _repeat_block,
    "a page of a web server in its place": lambda content, rng: NOT_FOUND_PAGE,
}


# --------------------------------------------------------------------------------------------------- values


def change_value(content: Any, rng: random.Random) -> tuple[Any, Change]:
    """Dicts, lists, numbers, text and tensors with one value, anywhere in them, changed or removed; a copy."""
    path = _random_path(content, rng)
    if not path:
        return rng.choice(OTHER_TYPES), Change("all of it replaced", wrong_type=True)
    content = _copied_along(content, path)
    parent = _at(content, path[:-1])
    place = "/".join(map(str, path))
    value = parent[path[-1]]
    kind = rng.random()
    if kind < 0.2:
        del parent[path[-1]]
        return content, Change(f"{place} removed")
    if kind < 0.25 and isinstance(parent, list):
        parent.append(copy.deepcopy(value))
        return content, Change(f"{place} twice")
    if kind < 0.55 or value is None:
        parent[path[-1]] = rng.choice([other for other in OTHER_TYPES if not _same_type(other, value)])
        return content, Change(f"{place}: {parent[path[-1]]!r} in place of {_short(value)}", wrong_type=True)
    parent[path[-1]] = _other_value(value, rng)
    return content, Change(f"{place}: {_short(parent[path[-1]])} in place of {_short(value)}")


def change_array(values: np.ndarray, rng: random.Random) -> tuple[np.ndarray, Change]:
    """A picture's values (H, W) or (H, W, 3) uint8 with other values, sizes, types or channels."""
    name = rng.choice(list(ARRAY_CHANGES))
    return np.ascontiguousarray(ARRAY_CHANGES[name](values, rng)), Change(name)


def _random_path(content: Any, rng: random.Random) -> list[Any]:
    """Keys from the outermost container to a value: rarely the whole, mostly far inside."""
    path: list[Any] = []
    while isinstance(content, dict | list | tuple) and content and rng.random() < 0.93:
        path.append(rng.choice(list(content) if isinstance(content, dict) else range(len(content))))
        content = content[path[-1]]
    return path


def _copied_along(content: Any, path: Sequence[Any]) -> Any:
    """A copy whose containers along the path may be changed: those on it are copied, and tuples become lists."""
    copied = list(content) if isinstance(content, tuple) else copy.copy(content)
    if len(path) > 1:
        copied[path[0]] = _copied_along(content[path[0]], path[1:])
    return copied


def _at(content: Any, path: Sequence[Any]) -> Any:
    for key in path:
        content = content[key]
    return content


def _same_type(first: Any, second: Any) -> bool:
    kinds = ((bool,), (int, float), (str,), (list, tuple), (dict,), (torch.Tensor, np.ndarray), (type(None),))
    return next(isinstance(second, kind) for kind in kinds if isinstance(first, kind))


def _other_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(TEXTS)
    if isinstance(value, torch.Tensor):
        return rng.choice(TENSOR_CHANGES)(value)
    if isinstance(value, np.ndarray):
        return rng.choice(TENSOR_CHANGES)(torch.from_numpy(value)).numpy()
    if isinstance(value, dict):
        return {f"{key}_": item for key, item in value.items()}
    return [*value, *value] if len(value) < 1000 and rng.random() < 0.5 else value[: len(value) // 2]


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)[:60]


TENSOR_CHANGES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda value: value.flatten(),
    lambda value: value[None],
    lambda value: torch.cat([value.flatten(), value.flatten()]),
    lambda value: value.flatten()[:1].clone(),
    lambda value: torch.zeros(()),
    lambda value: torch.zeros(0),
    lambda value: torch.zeros(0, 3, 0),
    lambda value: value.double(),
    lambda value: value.half(),
    lambda value: value.to(torch.int64),
    lambda value: value.bool(),
    lambda value: value.to(torch.complex64),
    lambda value: torch.full_like(value, 1),
    lambda value: value * 2,
)
ARRAY_CHANGES: dict[str, Callable[[np.ndarray, random.Random], np.ndarray]] = {
    "one pixel of another value": lambda values, rng: _painted(values, rng, 1, 1),
    "a region of another value": lambda values, rng: _painted(values, rng, 9, 14),
    "all pixels of one value": lambda values, rng: np.full_like(values, rng.randrange(256)),
    "noise": lambda values, rng: np.frombuffer(rng.randbytes(values.size), np.uint8).reshape(values.shape),
    "height and width exchanged": lambda values, rng: values.swapaxes(0, 1),
    "one row fewer": lambda values, rng: values[1:],
    "a single pixel": lambda values, rng: values[:1, :1],
    "twice as large": lambda values, rng: values.repeat(2, axis=0).repeat(2, axis=1),
    "one channel": lambda values, rng: values.reshape(*values.shape[:2], -1)[..., 0],
    "three channels": lambda values, rng: values.reshape(*values.shape[:2], -1)[..., [0, 0, 0]],
    "four channels": lambda values, rng: values.reshape(*values.shape[:2], -1)[..., [0, 0, 0, 0]],
    "16 bits": lambda values, rng: values.reshape(*values.shape[:2], -1)[..., 0].astype(np.uint16) * 257,
    "one bit": lambda values, rng: values.reshape(*values.shape[:2], -1)[..., 0] > 0,
}


def _painted(values: np.ndarray, rng: random.Random, height: int, width: int) -> np.ndarray:
    painted = values.copy()
    top, left = rng.randrange(values.shape[0]), rng.randrange(values.shape[1])
    painted[top : top + height, left : left + width] = rng.randrange(256)
    return painted
