"""Builds the compiled kernels, and keeps a record of what they were built from and for.

There are two libraries: ``cpu`` and ``cuda``. Beside each lies a record, ``_cpu.json`` or ``_cuda.json``, that names
the library's file or the reason why there is none. :mod:`mask2former.ops.extension` loads only what its record fits.

``setup.py`` loads this file by its path, where torch may be missing: only the standard library is imported at the top.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "DEVICES",
    "FOLDER",
    "build",
    "build_what_is_missing",
    "conditions",
    "describe",
    "read_record",
    "record_path",
    "switched_off",
]

FOLDER = Path(__file__).resolve().parent
DEVICES = ("cpu", "cuda")

# What each library is made of, relative to csrc.
SOURCES = {"cpu": ("*.cpp", "cpu/*.cpp"), "cuda": ("cuda/*.cu",)}
HEADERS = {"cpu": ("*.h", "cpu/*.h"), "cuda": ("*.h", "cuda/*.cuh", "cuda/*.h")}

# The C++ standard is left to torch. at::parallel_for is an OpenMP loop in torch's headers; its run-time library is not
# linked, because torch brings its own, and a second one would start threads of its own.
CXX_FLAGS = ("-O3", "-g0", "-Wall", "-Wextra", *(("-fopenmp",) if sys.platform == "linux" else ()))
NVCC_FLAGS = ("-O3", "--threads=4", "-Xcompiler=-Wall,-Wextra")

LINES_KEPT = 12  # of a failed build

SayLine = Callable[[str], None]


def switched_off() -> bool:
    """Whether MASK2FORMER_NO_EXTENSION is set to anything but 0."""
    return os.environ.get("MASK2FORMER_NO_EXTENSION", "0") not in ("", "0")


def forced_cuda() -> bool:
    """Whether FORCE_CUDA asks for CUDA kernels on a machine without a GPU."""
    return os.environ.get("FORCE_CUDA", "0") not in ("", "0")


def record_path(device: str, folder: Path = FOLDER) -> Path:
    """File of the record of a device type's library."""
    return folder / f"_{device}.json"


def read_record(device: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The record of a device type's library, empty where there is none that can be read."""
    try:
        record = json.loads(record_path(device, folder).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def files(device: str, patterns: dict[str, tuple[str, ...]], folder: Path) -> list[Path]:
    csrc = folder / "csrc"
    return sorted(path for pattern in patterns[device] for path in csrc.glob(pattern))


def sources_digest(device: str, folder: Path = FOLDER) -> str:
    """Changes with the sources and flags that a library is built from."""
    digest = hashlib.sha256(repr((CXX_FLAGS, NVCC_FLAGS)).encode())
    for path in files(device, SOURCES, folder) + files(device, HEADERS, folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def conditions(device: str, folder: Path = FOLDER) -> dict[str, str]:
    """What a library has to have been built from and for to be loaded here, by a name for messages."""
    import torch

    found = {
        "torch": str(torch.__version__),
        "CUDA": str(torch.version.cuda or "none"),
        "C++ ABI": str(int(torch.compiled_with_cxx11_abi())),
        "platform": f"{sys.platform} {platform.machine()}",
    }
    if (folder / "csrc").is_dir():
        found["sources"] = sources_digest(device, folder)
    return found


def torch_problem() -> str:
    """Why torch can't be imported, empty where it can."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:  # OSError: a library that torch needs is missing
        return f"there was no torch to build with ({error})"
    return ""


def obstacle(device: str, folder: Path) -> str:
    """Why a library can't be built or isn't to be, empty where it can."""
    if switched_off():
        return "MASK2FORMER_NO_EXTENSION was set when they were to be built"
    without_torch = torch_problem()
    if without_torch:
        return without_torch
    import torch

    if not files(device, SOURCES, folder):
        return f"there are no sources in {folder / 'csrc'}"
    compiler = (os.environ.get("CXX") or "c++").split()
    if not compiler or shutil.which(compiler[-1]) is None:
        return f"there is no C++ compiler: {' '.join(compiler) or 'CXX'} was not found"
    if device == "cpu":
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not (forced_cuda() or torch.cuda.is_available()):
        return "there is no GPU here (FORCE_CUDA=1 builds all the same)"
    from torch.utils import cpp_extension  # not at the top, because without a GPU it logs that there is none

    nvcc = Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc"
    if not nvcc.is_file():
        return f"there is no CUDA toolkit: torch needs one of CUDA {torch.version.cuda} (CUDA_HOME)"
    words = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", words)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = ".".join(release.groups()) if release else "of no known version"
        return f"the CUDA toolkit is {found}, and torch needs CUDA {torch.version.cuda}"
    return ""


def arch_list() -> str:
    """GPU architectures to build for, as TORCH_CUDA_ARCH_LIST; empty leaves it to torch: those of the visible GPUs."""
    import torch

    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted or torch.cuda.is_available():
        return wanted
    numbers = sorted({int(number) for number in re.findall(r"sm_(\d+)\b", torch._C._cuda_getArchFlags() or "")})
    archs = [f"{number // 10}.{number % 10}" for number in numbers if number >= 70]
    return " ".join(archs) + "+PTX"


def compile_library(device: str, folder: Path, workplace: Path) -> None:
    """Compile with torch's BuildExtension, in a process of its own (this file as a program)."""
    import torch
    from setuptools import setup
    from torch.utils import cpp_extension

    sources = [str(path) for path in files(device, SOURCES, folder)]
    # Of a folder that is given both ways, -isystem alone counts, and its headers give no warnings.
    torch_headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    if device == "cuda":
        kind = cpp_extension.CUDAExtension
        compile_args = {"cxx": ["-O3", "-g0", *torch_headers], "nvcc": [*NVCC_FLAGS, *torch_headers]}
    else:
        kind = cpp_extension.CppExtension
        compile_args = {"cxx": [*CXX_FLAGS, *torch_headers]}
    library = kind(f"_{device}", sources, extra_compile_args=compile_args)
    # Nothing of Python or its bindings is used. torch brings CUDA's run-time library, and the toolkit's is not always
    # where it is looked for: beside an nvcc that is a script, for one.
    library.libraries = [name for name in library.libraries if name not in ("torch_python", "cudart")]
    command = cpp_extension.BuildExtension.with_options(
        no_python_abi_suffix=True, use_ninja=cpp_extension.is_ninja_available()
    )
    setup(
        name=f"mask2former-{device}-kernels",
        version=str(torch.__version__),
        ext_modules=[library],
        py_modules=[],
        cmdclass={"build_ext": command},
        script_args=[
            "build_ext",
            f"--build-lib={workplace / 'library'}",
            f"--build-temp={workplace / 'objects'}",
        ],
    )


def end(process: subprocess.Popen[str]) -> None:
    """End a process that leads a session, with all that it started."""
    if os.name != "posix":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        # ninja passes this on to its compilers, each of which has a group of its own, and then closes the pipe.
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_compiler(device: str, folder: Path, workplace: Path) -> tuple[Path | None, str]:
    """-> the compiled library, or None and the compiler's last words."""
    environment = {**os.environ}
    if device == "cuda":
        environment["TORCH_CUDA_ARCH_LIST"] = arch_list()
        if not environment["TORCH_CUDA_ARCH_LIST"]:
            del environment["TORCH_CUDA_ARCH_LIST"]
    # In a session of its own, so that it can be ended with the compilers that it starts.
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), device, str(folder), str(workplace)],
        cwd=workplace,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            words, _ = process.communicate()
        except BaseException:  # KeyboardInterrupt, for one
            end(process)
            raise
    found = list((workplace / "library").glob(f"_{device}*"))
    if process.returncode == 0 and len(found) == 1:
        return found[0], words
    lines = words.splitlines()
    errors = [line for line in lines if "error" in line.lower()][:LINES_KEPT]
    return None, "\n".join(errors or lines[-LINES_KEPT:])


def write_whole(path: Path, contents: bytes) -> None:
    """Write a file that nobody sees before it is whole."""
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.write_bytes(contents)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def put_in_place(device: str, target: Path, record: dict[str, Any], library: Path | None) -> None:
    """Write library and record so that an interruption leaves the old pair whole."""
    if library is not None:
        contents = library.read_bytes()
        digest = hashlib.sha256(contents).hexdigest()
        record = {**record, "library": f"_{device}-{digest[:12]}.so", "sha256": digest}
        write_whole(target / record["library"], contents)
    write_whole(record_path(device, target), f"{json.dumps(record, indent=2)}\n".encode())
    for old in target.glob(f"_{device}-*.so"):
        if old.name != record.get("library"):
            with contextlib.suppress(OSError):
                old.unlink()


def build(
    device: str, target: Path = FOLDER, folder: Path = FOLDER, say: SayLine | None = None, again: bool = True
) -> dict[str, Any]:
    """Build a device type's library and put it with its record into ``target``.

    Args:
        device: "cpu" or "cuda".
        target: folder that gets library and record.
        folder: folder that has ``csrc``.
        say: is called with a line before something that takes long.
        again: build even where the library is there and fits.

    Returns:
        The record: "library" where there is one, otherwise "reason".

    Raises:
        OSError: where ``target`` or the folder for temporary files can't be written to.
    """
    old = read_record(device, target)
    why_not = obstacle(device, folder)
    wanted = {} if torch_problem() else conditions(device, folder)
    fits = bool(old.get("library")) and old.get("conditions") == wanted and (target / str(old["library"])).is_file()
    if fits and not again:
        return old
    try:  # now, not after the work
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise OSError(f"{target} can't be written to ({error.strerror})") from error
    record: dict[str, Any] = {"conditions": wanted}
    if why_not:
        if fits:  # worth more than the news that it can't be built now
            if say is not None:
                say(f"{device.upper()} kernels: not built again, because {why_not}")
            return old
        record["reason"] = why_not
        put_in_place(device, target, record, None)
        return record
    with tempfile.TemporaryDirectory(prefix="mask2former-build-", ignore_cleanup_errors=True) as workplace:
        if say is not None:
            say(f"building the {device.upper()} kernels for torch {wanted['torch']} (a minute or more)")
        library, words = run_compiler(device, folder, Path(workplace))
        if device == "cuda":
            record["architectures"] = arch_list() or "those of the GPUs that were here"
        if library is None:
            record["reason"] = f"the build failed:\n{words}"
        else:
            record["warnings"] = [line for line in words.splitlines() if re.search(r"csrc.*: warning\b", line)]
        put_in_place(device, target, record, library)
    return read_record(device, target)


def describe(device: str, record: dict[str, Any]) -> str:
    """One line on the outcome of a build."""
    if record.get("library"):
        built_for = record.get("conditions", {}).get("torch", "?")
        return f"{device.upper()} kernels: built for torch {built_for}"
    reason = str(record.get("reason", "not built")).splitlines()
    details = next((line.strip() for line in reason[1:] if line.strip()), "")
    return f"{device.upper()} kernels: none, {reason[0]}{' ' + details if details else ''}"


def build_what_is_missing(say: SayLine, target: Path = FOLDER) -> None:
    """Build each library that isn't there or doesn't fit, and say what came of it."""
    for device in DEVICES:
        say(describe(device, build(device, target, say=say, again=False)))


def main(arguments: list[str]) -> None:
    """As a program, which needs no installed package: without arguments, build what is missing.

    With three, a device type, the folder of the sources and a folder for the result, compile one library.
    """
    sys.path.pop(0)  # this folder, whose modules are not meant to be found by their bare names
    if arguments:
        device, folder, workplace = arguments
        compile_library(device, Path(folder), Path(workplace))
    else:
        build_what_is_missing(lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
