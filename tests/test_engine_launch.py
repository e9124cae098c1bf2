"""Processes of a run: how many are started, and what is left of a run when one of them fails."""

import argparse
import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import default_argument_parser
from torch import nn
from torch.multiprocessing import ProcessExitedException

from mask2former.engine import add_launch_options, launch
from mask2former.engine.parallel import for_all_ranks
from mask2former.errors import UserError

# A training loop in which process 1 ends at step 3 as the first argument says, or which "waits" for a signal then.
PROGRAM = """\
import logging, os, signal, sys, time
import torch
from detectron2.engine import TrainerBase, default_argument_parser
from detectron2.utils import comm
from mask2former.engine import add_launch_options, launch
from mask2former.engine.hooks import SaveOnInterrupt
from mask2former.errors import UserError, command

class Checkpointer:
    def save(self, name, **_):
        if comm.get_rank() == 0:
            time.sleep(1)
            open("saved", "w").close()

class Loop(TrainerBase):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def run_step(self):
        if comm.get_rank() == 1 and self.iter == 3:
            open("failed", "w").close()
            if self.end == "mistake":
                raise UserError("picture 7.png can't be read")
            if self.end == "defect":
                raise ZeroDivisionError("of process 1")
            if self.end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        if self.end == "waits" and self.iter >= 3:
            open(f"waiting{comm.get_rank()}", "w").close()
            time.sleep(0.1)
        comm.all_gather(self.iter)

def run(args):
    logging.basicConfig(handlers=[logging.NullHandler() if comm.get_rank() else logging.StreamHandler(sys.stdout)])
    loop, save_on_interrupt = Loop(args.opts[0]), SaveOnInterrupt(Checkpointer())
    loop.register_hooks([save_on_interrupt])
    with save_on_interrupt:
        loop.train(0, 500 if loop.end == "waits" else 5)
    print(f"process {comm.get_rank()} of {comm.get_world_size()}, threads: {torch.get_num_threads()}", flush=True)

def main():
    parser = default_argument_parser()
    add_launch_options(parser)
    launch(run, parser.parse_args())

if __name__ == "__main__":
    command(main)
"""


Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(repository: Path, tmp_path: Path) -> Start:
    """Run the program with what starts it and options: exit code, and all that is printed.

    A failure ends it within a minute.
    """
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)

    def run(launcher: list[str], *arguments: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        environment.pop("OMP_NUM_THREADS", None)
        outcome = subprocess.run(
            [sys.executable, *launcher, str(path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=300,
            check=False,
        )
        if (tmp_path / "failed").exists():
            assert time.time() - (tmp_path / "failed").stat().st_mtime < 60, outcome.stdout
        return outcome.returncode, outcome.stdout

    return run


def test_processes_on_cpus(start: Start) -> None:
    code, printed = start([], "--num-processes", "2", "whole")
    assert code == 0, printed
    threads = max(torch.get_num_threads() // 2, 1)
    for rank in range(2):
        assert f"process {rank} of 2, threads: {threads}" in printed


@pytest.mark.parametrize(
    ("end", "first", "last"),
    [
        ("mistake", "error: picture 7.png can't be read", "error: picture 7.png can't be read"),
        ("defect", "process 1 failed:", "ZeroDivisionError: of process 1"),
    ],
)
def test_the_first_error_is_all_that_is_printed(start: Start, end: str, first: str, last: str) -> None:
    code, printed = start([], "--num-processes", "2", end)
    lines = printed.splitlines()
    assert code == 1
    assert first in lines and lines[-1] == last, printed
    assert "Connection closed" not in printed and "Terminating process" not in printed


def test_a_killed_process_ends_the_others(start: Start) -> None:
    code, printed = start([], "--num-processes", "2", "killed")
    assert code == 1
    assert printed.splitlines()[-1] == "error: process 1 was ended by SIGKILL"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("send", "number", "expected"),
    [(os.kill, signal.SIGTERM, 75), (os.killpg, signal.SIGINT, 130)],
    ids=["SIGTERM to the parent alone", "Ctrl-C"],
)
def test_a_signal_saves_and_leaves_no_process(
    repository: Path, tmp_path: Path, send: Callable[[int, int], None], number: int, expected: int
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    parent = subprocess.Popen(
        [sys.executable, "program.py", "--num-processes", "2", "waits"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(list(tmp_path.glob("waiting*"))) == 2)
        send(parent.pid, number)
        assert parent.wait(60) == expected
        assert (tmp_path / "saved").exists()
        wait_until(lambda: not has_processes(parent.pid))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_the_first_error_comes_first_under_torchrun(start: Start) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, printed = start(torchrun, "mistake")
    assert code == 1
    error = "error: picture 7.png can't be read"
    assert printed.index(error) < printed.find("Traceback")
    assert "UserError: picture 7.png can't be read" in printed.partition("Root Cause")[2]  # torchrun's summary


def options(*arguments: str) -> argparse.Namespace:
    parser = default_argument_parser()
    add_launch_options(parser)
    return parser.parse_args(arguments)


def test_a_process_leaves_with_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a signal to save and stop."""

    def leave(*_: Any, **__: Any) -> None:
        raise ProcessExitedException("process 0 terminated with exit code 75", 0, 1, 75)

    monkeypatch.setitem(launch.__globals__, "start_processes", leave)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as caught:
        launch(lambda _: None, options("--num-processes", "2"))
    assert caught.value.code == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-gpus", "2", "--num-processes", "2"), "give one of them"),
        (("--num-processes", "-1"), "--num-processes is -1, expected 1 or more"),
        (("--num-gpus", "99"), "--num-gpus is 99, but this machine has"),
        (("--num-machines", "2"), "--num-machines is 2, which needs --dist-url"),
    ],
)
def test_options_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    with pytest.raises(UserError, match=message):
        launch(lambda _: None, options(*arguments))


def test_more_processes_of_torchrun_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="torchrun started 2 processes, but this machine has 1 GPUs"):
        launch(lambda _: None, options())


def test_synchronised_batch_norm_is_a_plain_one_on_cpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in Cityscapes' recipes, whose names of weights stay."""
    monkeypatch.setattr("mask2former.engine.parallel.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("mask2former.engine.parallel.DistributedDataParallel", lambda model, **_: model)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=0.1, momentum=0.3), nn.ReLU()))
    nn.init.uniform_(plain[1][0].weight)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    parameters = list(model.parameters())
    model = for_all_ranks(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    pictures = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(pictures), plain(pictures))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    assert [record.levelname for record in caplog.records if "SyncBN" in record.message] == ["WARNING"]
