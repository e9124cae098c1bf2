"""What a benchmark asks of the machine that it runs on."""

import ctypes
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "peak_memory", "processors"]


def describe(threads: Sequence[int], **versions: str) -> dict[str, Any]:
    """Processor, GPU, versions and load; call it before the measuring, which is load, too.

    Args:
        threads: numbers of threads that are measured with.
        versions: of libraries that matter besides torch.
    """
    about = {
        "processor": _processor(),
        "cores": processors(),
        "threads": list(threads),
        "threads that wait": os.environ.get("OMP_WAIT_POLICY", "OpenMP's default"),
        "load before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        about["GPU"] = torch.cuda.get_device_name()
    return {**about, **versions}


def processors() -> int:
    """Processors that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory(device: str, reset: bool = False) -> int:
    """Bytes that this process has used at most; after a reset, those in use.

    On a CPU it needs Linux.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        if platform.libc_ver()[0] == "glibc":  # which keeps what small tensors have left
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if "model name" in line] if cpu.exists() else []
    return models[0].partition(": ")[2] if models else platform.processor()
