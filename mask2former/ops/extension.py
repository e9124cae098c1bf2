"""Loads the compiled kernels that fit this torch and these sources, and says why others were not loaded."""

import functools
import hashlib
import re
from pathlib import Path

import torch
from torch import Tensor

from . import build

__all__ = ["KERNELS", "gpu_reason", "is_followed", "kernels_take", "reason"]

BUILD_COMMAND = "python -m mask2former.ops --build"

_REASONS: dict[str, str] = {}


def mismatch(device: str, folder: Path = build.FOLDER) -> str:
    """Why the library of a device type is not to be loaded, empty where it is. Nothing is loaded."""
    if build.switched_off():
        return "MASK2FORMER_NO_EXTENSION is set"
    if not build.record_path(device, folder).is_file():
        return f"they were not built ({BUILD_COMMAND} does it)"
    record = build.read_record(device, folder)
    if record.get("reason"):
        return str(record["reason"])
    built_for, library, digest = record.get("conditions"), record.get("library"), record.get("sha256")
    if not (isinstance(built_for, dict) and isinstance(library, str) and isinstance(digest, str)):
        return f"{build.record_path(device, folder).name} is not a record of a build ({BUILD_COMMAND} mends it)"
    try:
        conditions = build.conditions(device, folder)
    except OSError as error:
        return f"their sources can't be read ({error})"
    for name, here in conditions.items():
        there = built_for.get(name)
        if there != here:
            if name == "sources":
                return f"their sources have changed since they were built ({BUILD_COMMAND})"
            return f"they were built for {name} {there}, and here it is {here} ({BUILD_COMMAND})"
    try:
        contents = (folder / library).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: not the name of a file
        return f"{library!r} can't be read ({error}; {BUILD_COMMAND} mends it)"
    # A library that was cut short can end the whole program when it is loaded.
    if hashlib.sha256(contents).hexdigest() != digest:
        return f"{library} is damaged ({BUILD_COMMAND} mends it)"
    return ""


def load(device: str, folder: Path = build.FOLDER) -> str:
    """Load the library of a device type.

    Returns:
        Why it was not loaded, empty where it was.
    """
    why_not = mismatch(device, folder)
    if why_not:
        return why_not
    library = folder / build.read_record(device, folder)["library"]
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:  # the system's loader; torch, of operators that are there already
        return f"loading them failed: {error}"
    return ""


def load_all() -> frozenset[str]:
    """Load what there is.

    Returns:
        The device types that have kernels.
    """
    _REASONS["cpu"] = load("cpu")
    # The schemas are in the CPU's library.
    _REASONS["cuda"] = load("cuda") if not _REASONS["cpu"] else f"there are no CPU kernels: {_REASONS['cpu']}"
    return frozenset(device for device, why_not in _REASONS.items() if not why_not)


KERNELS: frozenset[str] = load_all()
"""Device types that have kernels, of "cpu" and "cuda"."""


def is_followed() -> bool:
    """Whether a compiler, tracer or transform of torch.func follows what runs: they know torch's operators alone."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def kernels_take(*tensors: Tensor | None) -> bool:
    """Whether the CPU kernels that know float32 alone can be called with these: nothing casts or follows them."""
    return (
        "cpu" in KERNELS
        and all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not is_followed()
    )


def reason(device_type: str) -> str:
    """Why a device type has no kernels, empty where it has."""
    return _REASONS.get(device_type, f"there are none for {device_type}")


@torch.compiler.assume_constant_result  # the compiler is not to look inside
@functools.cache
def gpu_reason(index: int) -> str:
    """Why the CUDA kernels can't run on a GPU, empty where they can."""
    architectures = str(build.read_record("cuda").get("architectures", ""))
    capability = torch.cuda.get_device_capability(index)
    if serves(architectures, capability):
        return ""
    here = ".".join(map(str, capability))
    return f"they were built for architectures {architectures}, and GPU {index} is {here} ({BUILD_COMMAND})"


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, as in TORCH_CUDA_ARCH_LIST, runs on a GPU of a (major, minor) capability.

    Machine code runs on later GPUs of its major number, PTX on all later ones. Words without numbers are trusted.
    """
    numbers = re.findall(r"(\d+)\.(\d)[af]?(\+PTX)?", architectures)
    built = [((int(major), int(minor)), ptx) for major, minor, ptx in numbers]
    return not built or any(arch <= capability and (bool(ptx) or arch[0] == capability[0]) for arch, ptx in built)
