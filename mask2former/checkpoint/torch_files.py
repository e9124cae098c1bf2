"""Files of ``torch.save``, read by torch's restricted unpickler."""

import io
import mmap
import os
import zipfile
from pickle import UnpicklingError
from typing import Any

import torch

__all__ = ["load_torch"]

ZIP_START = b"PK\x03\x04"
# The file that makes torch take a zip file for a TorchScript program, which torch before 2.6 would run.
PROGRAM = b"constants.pkl"


def load_torch(source: str | bytes | bytearray) -> Any:
    """Read a file of ``torch.save`` to the CPU.

    Args:
        source: its path; or the bytes that a pickled tensor has for its values, a file of the form before zip files.

    Raises:
        UnpicklingError: if it names anything but tensors and plain containers, or a checksum is wrong. What a broken
            file raises besides is torch's matter: nearly anything.
    """
    if isinstance(source, str):
        with open(source, "rb") as file:
            if file.read(len(ZIP_START)) == ZIP_START:
                _refuse_program(file.fileno())
                _check_sums(source)
                return torch.load(source, map_location="cpu", weights_only=True)
            file.seek(0)
            source = file.read()
    elif source.startswith(ZIP_START):
        raise UnpicklingError("it has a zip file where a tensor's values belong")
    # From memory, because torch before 2.6 reads archives of `tar` without its restrictions,
    # and looks for them in files alone.
    return torch.load(io.BytesIO(source), map_location="cpu", weights_only=True)


def _refuse_program(descriptor: int) -> None:
    """Names in a zip file are never compressed, so that a program can't hide from a search."""
    with mmap.mmap(descriptor, os.fstat(descriptor).st_size, access=mmap.ACCESS_READ) as content:
        if content.find(PROGRAM) >= 0:
            raise UnpicklingError("it is a TorchScript program")


def _check_sums(path: str) -> None:
    """The zip file's own sums of its members, which torch writes and doesn't look at."""
    with zipfile.ZipFile(path) as members:
        altered = members.testzip()
    if altered is not None:
        raise UnpicklingError(f"the checksum of its part {altered} is wrong")
