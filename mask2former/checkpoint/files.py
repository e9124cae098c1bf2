"""Reading and writing checkpoint files. Reading builds tensors and plain containers, and runs no code of a file."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError

__all__ = ["read_checkpoint", "replace_file", "write_safetensors"]

# NumPy's inner package, under version 1 and 2; a pickle names that of the version that wrote it.
NUMPY_CORES = ("numpy.core.", "numpy._core.")
NUMPY_CORE = NUMPY_CORES[int(np.__version__.partition(".")[0]) >= 2]
# What a pickle of NumPy arrays names.
PICKLE_GLOBALS = {
    (f"{NUMPY_CORE}multiarray", "_reconstruct"),
    (f"{NUMPY_CORE}multiarray", "scalar"),
    (f"{NUMPY_CORE}numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(NUMPY_CORES):
            module = NUMPY_CORE + module.rpartition(".")[2]
        if (module, name) not in PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")
        return super().find_class(module, name)


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read ``.safetensors``, ``.pkl`` (NumPy arrays) or a file of ``torch.save`` (any other name).

    Returns:
        What the file holds; a ``.safetensors`` file as ``{"model": {name: tensor}}`` in float32.

    Raises:
        UserError: if the file is missing, is broken or cut short, or holds more than tensors, arrays and
            plain containers.
    """
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist")
    try:
        if path.endswith(".safetensors"):
            return {"model": {name: tensor.float() for name, tensor in load_file(path).items()}}
        if path.endswith(".pkl"):
            with open(path, "rb") as file:
                content = _ArrayUnpickler(file, encoding="latin1").load()
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        EOFError,
        KeyError,
        OSError,
        RuntimeError,
        SafetensorError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"checkpoint {path} ({os.path.getsize(path):,} bytes) can't be read: it is cut short, "
            f"or no checkpoint ({_reason(error)}). Get it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} must hold a dict of tensors, but holds a {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    text = str(error).strip()
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it names {refused[1]}, which is no part of a tensor"
    if "weights_only" in text:  # torch goes on with advice to run the file's code
        return "it is no file of torch.save"
    return text.splitlines()[0].split(". ")[0] if text else type(error).__name__


def write_safetensors(state: Mapping[str, Tensor], path: str, dtype: torch.dtype = torch.float32) -> None:
    """Write tensors, floating-point ones as ``dtype``; the file appears when it is whole."""
    tensors = OrderedDict(
        (name, (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous())
        for name, tensor in state.items()
    )
    replace_file(path, lambda temporary: save_file(tensors, temporary))


def replace_file(path: str, write: Any) -> None:
    """Call ``write(temporary path)`` and give the result the name ``path``, so that no half file has it."""
    temporary = f"{path}.part"
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors lets nobody else read its files
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
