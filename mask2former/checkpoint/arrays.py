"""What pickled NumPy arrays and torch tensors are made of: a part of ours for every name that such a pickle has.

Nothing of NumPy or torch sees a file's arguments before they are checked: types of numbers alone, sizes that
agree with the bytes that are there. Nor is an unchecked argument hashed or written into a message: tuples in
tuples can overflow the stack, or take forever to write out.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pickles import Unfinished, as_key
from .torch_files import load_torch

__all__ = ["ARRAY_PARTS"]

# NumPy's inner package under versions 1 and 2; a pickle names that of the version that wrote it.
NUMPY_CORES = ("numpy.core", "numpy._core")
# A type of numbers that torch has too, as NumPy writes it. Objects ("O8"), text and records are none.
NUMBERS = re.compile(r"[<>=|]?(b1|u1|i[1248]|f[248])")

MAX_DIMENSIONS = 64


def _data_type(name: str, *_: Any) -> Unfinished:
    if not NUMBERS.fullmatch(name):
        raise UnpicklingError(f"it has an array of {name!r}, which are no numbers of torch")
    dtype = np.dtype(name)
    return Unfinished(lambda state: _with_byte_order(dtype, *state))


def _with_byte_order(dtype: np.dtype[Any], version: Any, order: str, *layout: Any) -> np.dtype[Any]:
    if any(part is not None for part in layout[:3]):
        raise UnpicklingError("it has an array of records")
    if order == "<":
        return dtype.newbyteorder("<")
    return dtype.newbyteorder(">") if order == ">" else dtype


def _array(*_: Any) -> Unfinished:
    return Unfinished(lambda state: _array_of_state(*state))


def _array_of_state(version: Any, shape: Any, dtype: Any, columns_first: Any, content: Any) -> np.ndarray[Any, Any]:
    return _array_of_buffer(content, dtype, shape, "F" if columns_first else "C")


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, np.dtype) or order not in ("C", "F"):
        raise UnpicklingError("it has an array without a type")
    if not isinstance(shape, tuple) or not _are_sizes(shape):
        raise UnpicklingError("it has an array without a valid shape")
    flat = np.frombuffer(bytearray(_as_bytes(content)), dtype)  # of our own memory, so that it can be written to
    flat = flat.astype(dtype.newbyteorder("="), copy=False)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _number(dtype: Any, content: Any) -> Any:
    return _array_of_buffer(content, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UnpicklingError("it has bytes in an encoding that no array needs")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


def _not_called(*_: Any) -> None:
    raise UnpicklingError("it makes an array without its content")


def _storage(content: Any) -> torch.storage.TypedStorage:
    """What a pickled tensor's values are: a whole file of torch.save within the pickle."""
    storage = load_torch(_as_bytes(content))
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnpicklingError(f"it has a {type(storage).__name__} where a tensor's values belong")
    return storage


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """A tensor; whether it wants a gradient, and its hooks, don't matter here."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise UnpicklingError(f"it has a tensor of a {type(storage).__name__}")
    values = torch.empty(0, dtype=storage.dtype).set_(storage)  # (elements of the storage)
    if not _are_sizes((offset, *shape, *strides)) or not len(shape) == len(strides) <= MAX_DIMENSIONS:
        raise UnpicklingError("it has a tensor without a valid shape and strides")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and max(last, math.prod(shape) - 1) >= values.numel():
        raise UnpicklingError(f"it has a tensor of shape {shape} with only {values.numel()} values")
    return values.as_strided(shape, strides, offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    """With its items where Python 2 wrote it; they follow otherwise."""
    return OrderedDict((as_key(key), value) for key, value in items)


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _as_bytes(content: Any) -> bytes | bytearray:
    if isinstance(content, str):  # bytes of a pickle that Python 2 wrote
        return content.encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise UnpicklingError(f"it has a {type(content).__name__} where bytes belong")
    return content


ARRAY_PARTS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _encode,
    "builtins.bytes": _empty_bytes,
    "__builtin__.bytes": _empty_bytes,
    "numpy.dtype": _data_type,
    "numpy.ndarray": _not_called,
    **{f"{core}.multiarray._reconstruct": _array for core in NUMPY_CORES},
    **{f"{core}.multiarray.scalar": _number for core in NUMPY_CORES},
    **{f"{core}.numeric._frombuffer": _array_of_buffer for core in NUMPY_CORES},
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}
