"""Inference in bfloat16, on devices that have units for it."""

import functools
from pathlib import Path

import torch

from ..errors import UserError

__all__ = ["bfloat16_inference", "is_autocast_to_bfloat16", "require_bfloat16"]

# Of x86 and ARM, as both torch and Linux call them.
CPU_UNITS = ("avx512_bf16", "amx_bf16", "bf16")


def require_bfloat16(device: torch.device) -> None:
    """Refuse a device that has no units for bfloat16.

    Libraries that claim to support it then convert each number there and back: four times as slow as float32.

    Raises:
        UserError: it has none.
    """
    if not _has_units(device):
        raise UserError(
            f"MODEL.MASK_FORMER.TEST.BFLOAT16 needs a device with bfloat16 units, but {_describe(device)} has none and "
            "would be slower than with float32: set it to False"
        )


def bfloat16_inference(device: torch.device) -> torch.autocast:
    """In the block products and convolutions compute in bfloat16, what autocast leaves out in float32."""
    return torch.autocast(device.type, torch.bfloat16)


def is_autocast_to_bfloat16(device_type: str) -> bool:
    """Whether autocast is on, and to bfloat16."""
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.bfloat16


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"


def _has_units(device: torch.device) -> bool:
    if device.type == "cpu":
        return _cpu_has_units()
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.amp.is_autocast_available("mps") and torch.backends.mps.is_macos_or_newer(14, 0)
    return False


@functools.cache
def _cpu_has_units() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(unit) for unit in CPU_UNITS)
    return not set(CPU_UNITS).isdisjoint(_linux_cpu_flags())  # of older versions of torch


def _linux_cpu_flags() -> list[str]:
    """What Linux lists; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return []
