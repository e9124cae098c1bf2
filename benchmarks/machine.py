"""What a benchmark says of the machine that it ran on."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "processors"]


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


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if "model name" in line] if cpu.exists() else []
    return models[0].partition(": ")[2] if models else platform.processor()
