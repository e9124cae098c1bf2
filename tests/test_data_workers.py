"""Loaders' worker processes."""

import multiprocessing
import os
import sys
from collections.abc import Callable

import pytest

from mask2former.data.workers import leaves_with_parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def exit_code(function: Callable[[], None]) -> int | None:
    """Of a process that does nothing else."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def test_a_worker_of_another_process_leaves() -> None:
    """As one whose own was killed before it began."""
    start = leaves_with_parent()

    def start_in_grandchild() -> None:
        child = os.fork()
        if child == 0:
            start(0)
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    assert exit_code(start_in_grandchild) == 1


def test_a_worker_stays_and_goes_on_with_what_follows() -> None:
    start, start_and_go_on = leaves_with_parent(), leaves_with_parent(lambda worker_id: os._exit(10 + worker_id))
    assert exit_code(lambda: start(3)) == 0
    assert exit_code(lambda: start_and_go_on(3)) == 13
