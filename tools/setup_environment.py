#!/usr/bin/env python3
"""Install what the make targets need, and say what was done.

Without ``--keep``: make ``.venv`` in the repository and bring it to the versions of ``constraints.txt``. With
``--keep``: use the environment whose Python runs this file, leave everything in it at its version, and add what is
missing. A Detectron2 that is there is kept in both. Where nothing has changed since the last time, nothing is done.

Only the standard library is used, because nothing else is installed yet, and no syntax that Python 3.7 lacks, so that
an old Python gets to say that it is too old.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
VENV = REPOSITORY / ".venv"
CONSTRAINTS = REPOSITORY / "constraints.txt"
DEFINITIONS = (CONSTRAINTS, REPOSITORY / "setup.py", Path(__file__).resolve())
OPS = REPOSITORY / "mask2former" / "ops"

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 4)

# Detectron2 as the package index has it. The file's tag names Python 3.10 for the sake of one compiled module that
# nothing here needs; the Python sources run on every later version, under a file name that says so.
DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
DETECTRON2_WHEEL_NAME = "sal_detectron2-0.7.2-py3-none-any.whl"

# What tests compare with besides, installed without what it asks for: NumPy < 2, a "typing" of Python 3.4.
TESTED_AGAINST = ("panopticapi-lite", "cityscapesscripts", "pyquaternion")

# Enough for a conflict between versions, or the end of a failed build.
PIP_LINES_SHOWN = 30

# Versions as pip can compare them. Others (a vendor's own scheme) can't be named in a constraint.
COMPARABLE_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+[A-Za-z0-9.]+)?")


class SetupError(Exception):
    """What stopped the set-up, and what to do about it."""


def say(step: str) -> None:
    print(f"set-up: {step}", flush=True)


def name_of(path: Path | str) -> str:
    """``path`` relative to the repository where it lies in it."""
    path = Path(path)
    return str(path.relative_to(REPOSITORY)) if REPOSITORY in path.parents else str(path)


def check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(
            f"Python {wanted} or newer is needed, and {sys.executable} is {found}: install a newer one and name it, "
            f"as in 'make VENV_PYTHON=python{wanted} test' (if it is .venv's own, delete .venv first)"
        )


def continue_in_venv() -> None:
    """Make ``.venv`` where it is missing or broken, and start this program again with its Python."""
    python = VENV / "bin" / "python"
    if not runs(python):
        make_venv()
    os.execv(str(python), [str(python), __file__, *sys.argv[1:]])


def runs(python: Path) -> bool:
    try:
        return subprocess.run([str(python), "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} can't make a virtual environment, because a part of it is missing: install it "
            "(Debian and Ubuntu: apt-get install python3-venv), then run the same command again"
        )
    version = ".".join(map(str, sys.version_info[:3]))
    say(f"making {name_of(VENV)} with Python {version}")
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if active:
        say(f"leaving the active environment {active} alone (PYTHON=python would use it instead)")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False).returncode != 0:
        raise SetupError(f"{sys.executable} -m venv {VENV} failed for the reason above")


def installed() -> dict[str, str]:
    """Name to version of every distribution that this Python sees."""
    from importlib import metadata  # Python 3.7 has none: check_python comes first

    importlib.invalidate_caches()
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            # The first on the path is the one that is imported.
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found


def fingerprint() -> str:
    """Changes with the files that define the set-up, with the Python, and with what is installed, and from where.

    Looks at names of folders alone, because reading every distribution's metadata takes most of a second.
    """
    digest = hashlib.sha256(sys.version.encode())
    for folder in filter(os.path.isdir, sys.path):
        distributions = sorted(name for name in os.listdir(folder) if name.endswith((".dist-info", ".egg-info")))
        digest.update("\n".join([folder, *distributions]).encode())
        for source in sorted(Path(folder).glob("mask2former-*.dist-info/direct_url.json")):
            digest.update(source.read_bytes())
    sources = sorted(path for path in (OPS / "csrc").glob("**/*") if path.is_file())
    for path in (*DEFINITIONS, OPS / "build.py", *sources):
        digest.update(str(path).encode() + path.read_bytes())
    # The compiled kernels' records are gone where somebody cleaned the folder, or switched the build off and on.
    digest.update(" ".join(str(path.is_file()) for path in kernel_records()).encode())
    digest.update(os.environ.get("MASK2FORMER_NO_EXTENSION", "").encode())
    return digest.hexdigest()


def kernel_records() -> tuple[Path, ...]:
    """Files that say what was compiled, or why nothing was."""
    return OPS / "_cpu.json", OPS / "_cuda.json"


def stamp_path(dev: bool) -> Path:
    """File that holds the fingerprint of this environment after a set-up that ended well."""
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return REPOSITORY / "build" / "setup" / f"{environment}-{'dev' if dev else 'run'}"


def is_done(dev: bool) -> bool:
    current = fingerprint()
    levels = (True,) if dev else (True, False)
    stamps = [stamp_path(level) for level in levels]
    return any(stamp.is_file() and stamp.read_text() == current for stamp in stamps)


def write_stamp(dev: bool) -> None:
    stamp = stamp_path(dev)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    unfinished = stamp.with_suffix(".part")
    unfinished.write_text(fingerprint())
    unfinished.replace(stamp)


def pip(*arguments: str, on_failure: str) -> None:
    """Run pip in silence; where it fails, show the end of what it said and raise with ``on_failure``."""
    environment = {"PIP_ROOT_USER_ACTION": "ignore", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--progress-bar=off"]
    outcome = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if outcome.returncode != 0:
        lines = [line for line in outcome.stdout.splitlines() if not line.startswith("Requirement already satisfied")]
        print(*lines[-PIP_LINES_SHOWN:], sep="\n", file=sys.stderr)
        raise SetupError(on_failure)


def need_pip() -> None:
    if find_spec("pip") is not None:
        return
    say("adding pip")
    if (
        find_spec("ensurepip") is None
        or subprocess.run([sys.executable, "-m", "ensurepip"], stdout=subprocess.DEVNULL, check=False).returncode != 0
    ):
        raise SetupError(f"{sys.executable} has no pip, and can't add it itself: install pip for it")


class Installer:
    """Installs the parts in order, under one file of constraints."""

    def __init__(self, constraints: Path, keep: bool) -> None:
        self.constraints = constraints
        self.keep = keep

    def install(self, *arguments: str, what: str) -> None:
        advice = f"{what} could not be installed, for the reason that pip gives above"
        if self.keep:
            advice += f" (what {sys.prefix} holds already is never replaced)"
        advice += ": mend it, then run the same command again"
        # Detectron2's wheel asks for versions that it doesn't need; pip would complain of it each time.
        pip("install", "--no-warn-conflicts", "--constraint", str(self.constraints), *arguments, on_failure=advice)

    def build_tools(self) -> None:
        found = installed()
        missing = [part for part in ("setuptools", "wheel") if part not in found or not self.keep]
        if missing:
            pins = [f"{part}{'<81' if part == 'setuptools' else ''}" for part in missing]
            self.install(*pins, what=" and ".join(missing))

    def torch(self) -> None:
        found = installed()
        missing = [part for part in ("torch", "torchvision") if part not in found]
        if missing:
            size = " (a CUDA build takes about 6 GB, and some minutes)" if "torch" in missing else ""
            say(f"installing {' and '.join(missing)}{size}")
        if missing or not self.keep:
            self.install("torch", "torchvision", what="torch and torchvision")
        version = installed()["torch"]
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
            wanted = ".".join(map(str, OLDEST_TORCH))
            raise SetupError(f"torch {wanted} or newer is needed, and {sys.prefix} has {version}: update it")

    def package(self, dev: bool) -> None:
        extras = "timm,dev" if dev else "timm"
        say(f"installing mask2former[{extras}] from this folder, with what it depends on")
        target = f"{REPOSITORY}[{extras}]"
        self.install("--no-build-isolation", "--editable", target, what="mask2former or a part that it depends on")
        missing = [part for part in TESTED_AGAINST if part not in installed()] if dev else []
        if missing:
            self.install("--no-deps", *missing, what=" and ".join(missing))

    def kernels(self) -> None:
        """Build the compiled kernels, with progress: pip, which would build them too, runs in silence."""
        command = [sys.executable, "-W", "ignore", str(OPS / "build.py")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip())
        if process.returncode != 0:
            say("the kernels could not be built: the package works without them")

    def detectron2(self) -> None:
        if find_spec("detectron2") is not None:
            return
        say(f"installing Detectron2 ({DETECTRON2}, without its compiled module)")
        with tempfile.TemporaryDirectory() as folder:
            wheel = download_detectron2(Path(folder))
            self.install("--no-deps", str(wheel), what="Detectron2")


def download_detectron2(folder: Path) -> Path:
    """Fetch the wheel into ``folder``, check its contents, and give it the name that fits any Python."""
    pip(
        *(
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            "3.10",
            "--dest",
            str(folder),
            DETECTRON2,
        ),
        on_failure=(
            "Detectron2 could not be downloaded, for the reason that pip gives above: check the network and pip's "
            f"configuration and run the same command again, or install Detectron2 into {name_of(sys.prefix)} by hand "
            "(README.md)"
        ),
    )
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != DETECTRON2_SHA256:
        raise SetupError(
            f"{wheel.name} has the SHA-256 {digest}, and {DETECTRON2_SHA256} was expected, so it was not installed: "
            "check where pip downloads from, or install Detectron2 by hand (README.md)"
        )
    return Path(shutil.move(str(wheel), str(folder / DETECTRON2_WHEEL_NAME)))


def check_import(module: str, advice: str) -> None:
    """Import ``module`` in a Python of its own; raise with its last words where that fails."""
    command = [sys.executable, "-c", f"import {module}"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), check=False)
    if outcome.returncode != 0:
        words = outcome.stderr.strip().splitlines() or [f"exit code {outcome.returncode}"]
        raise SetupError(
            f"{module} is installed in {name_of(sys.prefix)} but can't be imported ({words[-1]}): {advice}"
        )


def check_imports() -> None:
    uninstall = f"'{sys.executable} -m pip uninstall"
    check_import("torchvision", "install the torch and torchvision that belong together")
    check_import("cv2", "install another OpenCV (opencv-python-headless needs no display libraries)")
    check_import(
        "detectron2.modeling",
        f"install it anew, or remove it with {uninstall} detectron2' and this set-up puts another in its place",
    )


def write_kept_constraints(folder: Path) -> Path:
    """Constraints that hold every installed distribution at its version."""
    path = folder / "kept.txt"
    kept = [
        f"{name}=={version}\n"
        for name, version in installed().items()
        if name != "mask2former" and COMPARABLE_VERSION.fullmatch(version)
    ]
    path.write_text("".join(kept))
    return path


def describe_kept(before: dict[str, str]) -> str:
    parts = ("torch", "torchvision", "detectron2", "sal-detectron2", "opencv-python", "opencv-python-headless", "numpy")
    kept = [f"{part} {before[part]}" for part in parts if part in before]
    return f"keeping what {sys.prefix} has: {len(before)} distributions, with {', '.join(kept) or 'none of torch'}"


def describe_added(before: dict[str, str], after: dict[str, str]) -> str:
    added = sorted(f"{name} {version}" for name, version in after.items() if before.get(name) != version)
    if not added:
        return "nothing was missing"
    return "added " + (", ".join(added) if len(added) <= 30 else f"{len(added)} distributions")


def set_up(keep: bool, dev: bool) -> None:
    for level in (True, False):
        if stamp_path(level).is_file():
            stamp_path(level).unlink()
    before = installed()
    if keep:
        say(describe_kept(before))
    need_pip()
    with tempfile.TemporaryDirectory() as folder:
        installer = Installer(write_kept_constraints(Path(folder)) if keep else CONSTRAINTS, keep)
        installer.build_tools()
        installer.torch()
        installer.kernels()
        installer.package(dev)
        installer.detectron2()
    say(describe_added(before, installed()))
    say("checking that torch, OpenCV and Detectron2 can be imported")
    check_imports()
    write_stamp(dev)
    say("done")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dev", action="store_true", help="with what tests and linters need")
    parser.add_argument("--keep", action="store_true", help="use the running Python's environment as it is")
    arguments = parser.parse_args()
    try:
        check_python()
        if not arguments.keep and Path(sys.prefix).resolve() != VENV.resolve():
            continue_in_venv()
        if is_done(arguments.dev):
            say(f"{name_of(sys.prefix)} is up to date")
        else:
            set_up(arguments.keep, arguments.dev)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
