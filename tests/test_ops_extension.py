"""The compiled kernels' build, their record, and what happens without them."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mask2former.ops import build, extension


@pytest.fixture
def built(tmp_path):
    """A folder with a library that isn't one, and a record that fits it and this torch."""
    folder = tmp_path / "ops"
    shutil.copytree(build.FOLDER / "csrc", folder / "csrc")
    library = folder / "_cpu-0.so"
    library.write_bytes(b"no library")
    write_record(folder, conditions=build.conditions("cpu", folder))
    return folder


def write_record(folder, **changed):
    record = build.read_record("cpu", folder)
    if not record:
        record = {"library": "_cpu-0.so", "sha256": hashlib.sha256(b"no library").hexdigest()}
    build.record_path("cpu", folder).write_text(json.dumps({**record, **changed}))


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.delenv("MASK2FORMER_NO_EXTENSION", raising=False)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=build.FOLDER.parent.parent,
        check=False,
    )


def test_a_record_that_fits_lets_the_library_be_loaded(built):
    assert extension.mismatch("cpu", built) == ""


@pytest.mark.parametrize("name", ["torch", "CUDA", "C++ ABI", "platform"])
def test_a_library_for_something_else_is_not_loaded(built, name):
    write_record(built, conditions={**build.conditions("cpu", built), name: "another"})
    assert f"built for {name} another" in extension.load("cpu", built)


def test_changed_sources_make_a_library_stale_and_added_ones_too(built):
    source = built / "csrc" / "ms_deform_attn.cpp"
    text = source.read_text()
    source.write_text(text + "\n")
    assert "sources have changed" in extension.load("cpu", built)
    source.write_text(text)
    assert extension.mismatch("cpu", built) == ""
    (built / "csrc" / "cpu" / "another.cpp").write_text("")
    assert "sources have changed" in extension.load("cpu", built)


def test_sources_of_one_library_leave_the_other_alone(built):
    before = build.sources_digest("cpu", built)
    next((built / "csrc" / "cuda").glob("*.cu")).write_text("")
    assert build.sources_digest("cpu", built) == before


@pytest.mark.parametrize("contents", [b"", b"no libr", b"something else"])
def test_a_damaged_library_is_not_loaded(built, contents):
    (built / "_cpu-0.so").write_bytes(contents)
    assert "is damaged" in extension.load("cpu", built)


def test_a_library_that_the_system_refuses_is_a_reason(built):
    assert extension.load("cpu", built).startswith("loading them failed: ")


def test_a_missing_library_is_a_reason(built):
    (built / "_cpu-0.so").unlink()
    assert "can't be read" in extension.load("cpu", built)


def test_a_name_that_no_file_can_have_is_a_reason(built):
    write_record(built, library="_cpu\0.so")
    assert "can't be read" in extension.load("cpu", built)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"library": 1, "conditions": {}, "sha256": ""}', "\0"])
def test_a_broken_record_is_a_reason(built, text):
    build.record_path("cpu", built).write_text(text)
    assert "not a record" in extension.load("cpu", built)


def test_without_a_record_the_command_is_named(tmp_path):
    assert extension.BUILD_COMMAND in extension.load("cpu", tmp_path)


def test_the_reason_of_a_failed_build_is_given(built):
    write_record(built, reason="the build failed:\nerror: no")
    assert extension.load("cpu", built) == "the build failed:\nerror: no"


def test_other_devices_have_no_kernels():
    assert "mps" in extension.reason("mps")


def test_the_switch_turns_kernels_off():
    program = "from mask2former.ops import extension as e; print(sorted(e.KERNELS), e.reason('cpu'))"
    outcome = run("-W", "ignore", "-c", program, MASK2FORMER_NO_EXTENSION="1")
    assert outcome.stdout == "[] MASK2FORMER_NO_EXTENSION is set\n", outcome.stderr


def test_the_report_names_torch_and_both_libraries():
    outcome = run("-W", "ignore", "-m", "mask2former.ops", MASK2FORMER_NO_EXTENSION="1")
    assert outcome.returncode == 0
    assert torch.__version__ in outcome.stdout
    assert "CPU kernels: none, MASK2FORMER_NO_EXTENSION is set" in outcome.stdout
    assert "CUDA kernels: none" in outcome.stdout


def test_without_a_compiler_there_is_a_reason(built, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    record = build.build("cpu", built / "new", built)
    assert "no C++ compiler: /nonexistent" in record["reason"]
    assert build.read_record("cpu", built / "new") == record
    assert "no C++ compiler" in build.describe("cpu", record)


def test_with_an_empty_path_there_is_no_compiler(built, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in build.build("cpu", built / "new", built)["reason"]


def test_without_torch_there_is_a_reason(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "no torch" in build.build("cpu", built / "new", built)["reason"]


def test_a_build_that_is_switched_off_is_recorded(built, monkeypatch):
    monkeypatch.setenv("MASK2FORMER_NO_EXTENSION", "1")
    assert "MASK2FORMER_NO_EXTENSION" in build.build("cpu", built / "new", built)["reason"]


def test_what_fits_is_kept_where_it_cannot_be_built_now(built, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    lines = []
    assert build.build("cpu", built, built, lines.append)["library"] == "_cpu-0.so"
    assert lines == ["CPU kernels: not built again, because there is no C++ compiler: /nonexistent was not found"]
    assert build.build("cpu", built, built, lines.append, again=False)["library"] == "_cpu-0.so"
    assert len(lines) == 1


def test_a_failed_build_keeps_the_compilers_words(built):
    for path in (built / "csrc").rglob("*.cpp"):
        path.unlink()
    (built / "csrc" / "ms_deform_attn.cpp").write_text("#error what is wrong\n")
    record = build.build("cpu", built, built)
    assert record["reason"].startswith("the build failed:\n")
    assert "what is wrong" in record["reason"]
    assert not list(built.glob("*.so")) and not list(built.glob("*.part"))


def test_a_build_replaces_what_was_there_and_can_be_loaded(built):
    for path in (built / "csrc").rglob("*.cpp"):
        path.unlink()
    (built / "csrc" / "ms_deform_attn.cpp").write_text("int mask2former_nothing() { return 0; }\n")
    record = build.build("cpu", built, built)
    assert record.get("library"), record
    assert record["warnings"] == []
    assert [path.name for path in Path(built).glob("*.so")] == [record["library"]]
    assert extension.load("cpu", built) == ""


def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(built, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied", str(built / "a temporary file"))

    monkeypatch.setattr(build.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=f"^{re.escape(str(built))} can't be written to \\(Permission denied\\)$"):
        build.build("cpu", built, built)


# build.py by its path, without the package, which takes long to import; pytest may have been told to ignore Ctrl-C.
BUILD_PROGRAM = """
import importlib.util, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
specification = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)
folder = pathlib.Path(sys.argv[2])
build.build("cpu", folder, folder)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupted_build_ends_the_compiler_and_leaves_what_was_there(built, tmp_path):
    alive = tmp_path / "alive"  # held open by the compiler and what it starts
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)

    def read_until(wanted):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                if os.read(reader, 1) == wanted:
                    return True
            time.sleep(0.05)
        return False

    compiler = tmp_path / "slow-compiler"  # but quick to answer questions about its version
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *csrc*) exec 9>{alive}; printf x >&9; sleep 600; esac\n')
    compiler.chmod(0o755)
    (tmp_path / "temporary").mkdir()
    before = {path.name: path.read_bytes() for path in built.iterdir() if path.is_file()}
    environment = {**os.environ, "CXX": str(compiler), "TMPDIR": str(tmp_path / "temporary"), "MAX_JOBS": "1"}
    command = [sys.executable, "-c", BUILD_PROGRAM, build.__file__, str(built)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert read_until(b"x")
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    assert words.strip().endswith("KeyboardInterrupt")
    assert read_until(b"")
    assert {path.name: path.read_bytes() for path in built.iterdir() if path.is_file()} == before
    assert not list((tmp_path / "temporary").glob("mask2former-build-*"))


@pytest.mark.parametrize("hidden", ["torch", "MASK2FORMER_NO_EXTENSION"])
def test_the_package_is_built_without_kernels_and_says_why(tmp_path, hidden):
    """setup.py as pip runs it: with build isolation there is no torch."""
    program = f"""
import importlib.util, sys
find = importlib.util.find_spec
if {hidden == "torch"}:
    sys.modules["torch"] = None
    importlib.util.find_spec = lambda name, *package: None if name == "torch" else find(name, *package)
sys.argv = ["setup.py", "-q", "build", "--build-base={tmp_path / "base"}"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {{"__file__": "setup.py", "__name__": "__main__"}})
"""
    outcome = run("-W", "ignore", "-c", program, **({} if hidden == "torch" else {hidden: "1"}))
    assert outcome.returncode == 0, outcome.stderr
    lines = [line for line in outcome.stdout.splitlines() if line.startswith("mask2former: no compiled kernels")]
    assert len(lines) == 1 and hidden in lines[0] and extension.BUILD_COMMAND in lines[0]
    package = tmp_path / "base" / "lib" / "mask2former" / "ops"
    assert (package / "csrc").is_dir() and not list(package.glob("_*.so")) and not list(package.glob("_*.json"))


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        ("8.0 9.0", (8, 0), True),
        ("8.0 9.0", (8, 6), True),  # machine code for a lower minor number
        ("8.6", (8, 0), False),
        ("8.0 9.0", (7, 5), False),
        ("8.0;9.0a", (9, 0), True),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("Hopper", (7, 5), True),
        ("those of the GPUs that were here", (9, 0), True),
    ],
)
def test_which_gpus_a_library_serves(architectures: str, capability: tuple[int, int], served: bool) -> None:
    assert extension.serves(architectures, capability) == served


def test_a_gpu_that_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(build, "read_record", lambda device: {"architectures": "8.0 9.0"})
    extension.gpu_reason.cache_clear()
    try:
        assert extension.gpu_reason(1).startswith("they were built for architectures 8.0 9.0, and GPU 1 is 7.5 (python")
    finally:
        extension.gpu_reason.cache_clear()
