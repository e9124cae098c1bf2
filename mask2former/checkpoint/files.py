"""Reading and writing checkpoint files. Reading builds tensors and plain containers, and runs no code of a file."""

import mmap
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .arrays import ARRAY_PARTS
from .pickles import read_pickle
from .torch_files import load_torch

__all__ = ["HUGGING_FACE_FILES", "checkpoint_file", "read_checkpoint", "replace_file", "write_safetensors"]

# What reading a broken file raises. A file that was cut or altered reaches nearly any line of pickle's, zipfile's,
# torch's and NumPy's readers with nearly any value.
BROKEN = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
# The files of a folder that Hugging Face's `save_pretrained` writes.
HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
LONGEST_REASON = 200


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read ``.safetensors``, ``.pkl`` (NumPy arrays or torch tensors) or a file of ``torch.save`` (any other name).

    Args:
        path: the file, or a folder of Hugging Face's.

    Returns:
        What the file holds; a ``.safetensors`` file as ``{"model": {name: tensor}}`` with floating-point
        tensors in float32.

    Raises:
        UserError: if the file is missing, is broken or cut short, or holds more than tensors, arrays and
            plain containers.
    """
    path = checkpoint_file(path)
    try:
        content = _read(path)
    except BROKEN as error:
        reason = _reason(error)
        if reason.startswith("it names "):
            raise UserError(f"checkpoint {path} is refused: {reason}. Nothing of it was run") from error
        raise UserError(
            f"checkpoint {path} ({os.path.getsize(path):,} bytes) can't be read: it is cut short, "
            f"or no checkpoint ({reason}). Get it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} must hold a dict of tensors, but holds a {type(content).__name__}")
    return content


def checkpoint_file(path: str) -> str:
    """The file that a path names: itself, or the weights in a folder of Hugging Face's.

    Raises:
        UserError: if there is none.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise UserError(f"checkpoint {path} does not exist: check MODEL.WEIGHTS")
    for name in HUGGING_FACE_FILES:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise UserError(f"checkpoint {path} is a folder without {' or '.join(HUGGING_FACE_FILES)}: name a file")


def _read(path: str) -> Any:
    if path.endswith(".safetensors"):
        tensors = load_file(path).items()
        return {"model": {name: value.float() if value.is_floating_point() else value for name, value in tensors}}
    if path.endswith(".pkl"):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return read_pickle(cast(BinaryIO, content), ARRAY_PARTS)
    return load_torch(path)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it names {refused[1]}, which is no part of a tensor"
    if "weights_only" in text:  # torch goes on with advice to run the file's code
        return "it is no file of torch.save"
    if not text:
        return type(error).__name__
    line = text.splitlines()[0].split(". ")[0][:LONGEST_REASON]
    return "".join(letter if letter.isprintable() else "?" for letter in line)  # a file's names may be in it


def write_safetensors(
    state: Mapping[str, Tensor],
    path: str,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors, floating-point ones as ``dtype``; the file appears when it is whole."""
    tensors = OrderedDict(
        (name, (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous())
        for name, tensor in state.items()
    )
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


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
