"""Reading and writing checkpoint files. Reading builds tensors and plain containers, and runs no code of a file."""

import mmap
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .arrays import ARRAY_PARTS
from .pickles import read_pickle
from .torch_files import load_torch

__all__ = [
    "HUGGING_FACE_FILES",
    "UNFINISHED",
    "BrokenCheckpoint",
    "checkpoint_file",
    "read_checkpoint",
    "replace_file",
    "write_safetensors",
]

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
# Ending of a file that is being written.
UNFINISHED = ".part"


class BrokenCheckpoint(UserError):
    """The file is missing, cut short or altered."""


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read ``.safetensors``, ``.pkl`` (NumPy arrays or torch tensors) or a file of ``torch.save`` (any other name).

    Args:
        path: the file, or a folder of Hugging Face's.

    Returns:
        What the file holds; a ``.safetensors`` file as ``{"model": {name: tensor}}`` with floating-point
        tensors in float32.

    Raises:
        BrokenCheckpoint: if the file is missing, cut short or altered: files of ``torch.save`` have checksums.
        UserError: if it holds more than tensors, arrays and plain containers.
    """
    path = checkpoint_file(path)
    try:
        content = _read(path)
    except BROKEN as error:
        reason = _reason(error)
        if reason.startswith("it names "):
            raise UserError(f"checkpoint {path} is refused: {reason}. Nothing of it was run") from error
        raise BrokenCheckpoint(
            f"checkpoint {path} ({os.path.getsize(path):,} bytes) can't be read: it is cut short, "
            f"altered, or no checkpoint ({reason}). Get it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} must hold a dict of tensors, but holds a {type(content).__name__}")
    return content


def checkpoint_file(path: str) -> str:
    """The file that a path names: itself, or the weights in a folder of Hugging Face's.

    Raises:
        BrokenCheckpoint: if there is none.
        UserError: if it is another folder.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise BrokenCheckpoint(f"checkpoint {path} does not exist: check MODEL.WEIGHTS")
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


def replace_file(path: str, write: Callable[[str], object]) -> None:
    """Call ``write(temporary path)`` and give the result the name ``path``, so that no half file ever has it.

    The content is on the disk before the name is, so that this holds when the machine fails too.
    """
    temporary = f"{path}{UNFINISHED}"
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # safetensors lets nobody else read its files
        _sync(temporary)
        os.replace(temporary, path)
        _sync(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _sync(path: str) -> None:
    """Wait until what a file or folder holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
