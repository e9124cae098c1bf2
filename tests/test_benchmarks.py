"""The benchmarks on tiny pictures, or few."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import load_script
from tiny_dataset import tiny_dataset

from mask2former.errors import UserError
from mask2former.ops.extension import KERNELS, reason

# Two numbers of threads, so that what is drawn and printed has several of everything.
TINY = ("--quick", "--sizes", "32", "64", "--threads", "1", "2", "--heads", "2", "--channels", "4", "--points", "2")

needs_kernels = pytest.mark.skipif("cpu" not in KERNELS, reason=f"no CPU kernels: {reason('cpu')}")


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))  # as where a program is run by its path
    threads = torch.get_num_threads()
    yield load_script(repository / "benchmarks" / "ms_deform_attn.py")
    torch.set_num_threads(threads)


def change(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., torch.Tensor]) -> None:
    """Put ``spoil`` around what the grid_sample path returns."""
    attend = benchmark.PEERS["grid_sample"].load("cpu")
    peer = benchmark.Peer(lambda device: lambda *args: spoil(attend(*args)), half=False)
    monkeypatch.setitem(benchmark.PEERS, "grid_sample", peer)


@needs_kernels
def test_prints_tables_and_writes_files(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "_memory_in_other_processes", lambda runs, args: iter(()))  # they take seconds
    files = [tmp_path / "times.json", tmp_path / "times.png"]
    benchmark.main([*TINY, "--peers", "grid_sample", "--json", str(files[0]), "--plot", str(files[1])])

    printed = capsys.readouterr()
    headers, _, *rows = printed.out.splitlines()[2:]
    assert "ours float32, ms" in headers and "grid_sample float32" in headers and "ours bfloat16" in headers
    assert rows[0].split()[:5] == ["32", "x", "32", "21", "grid"]
    assert rows[15].split()[:5] == ["64", "x", "64", "84", "random"]
    assert len(printed.err.splitlines()) >= 16
    assert files[1].stat().st_size > 10_000

    written = json.loads(files[0].read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["threads"] == [1, 2]
    assert written["problem"]["heads"] == 2
    assert len(written["times"]) == 16
    for case in written["times"]:
        assert set(case["seconds"]) == {"ours float32", "ours bfloat16", "grid_sample float32"}
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in case["seconds"].values())
    assert written["memory of forward + backward, MiB"] == {}


@needs_kernels
def test_memory_is_measured_in_another_process(benchmark: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    benchmark.main([*TINY, "--peers", "ours", "--dtypes", "float32", "--json", str(path)])
    memory = json.loads(path.read_text())["memory of forward + backward, MiB"]
    if not memory:
        pytest.skip("the system doesn't tell a process's peak")
    queries, numbers = 84, 2 * 4 + 2 * 4 + 2 * 3 * 2 * 3  # of the output, of value, of offsets and logits
    assert memory["ours"]["results"] == pytest.approx(queries * numbers * 4 / 2**20)
    assert memory["ours"]["added"] < 16


@needs_kernels
def test_half_precision_alone(benchmark: ModuleType) -> None:
    """Others compute in float32 still, and differ from ours by what half precision rounds."""
    args = benchmark._parse([*TINY, "--dtypes", "float16", "--peers", "grid_sample"])
    runs, _ = benchmark._runs(args)
    cases = list(benchmark._measure(32, "grid", runs, args))
    assert [list(case.seconds) for case in cases] == [["ours float16", "grid_sample float32"]] * 4


@needs_kernels
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_another_result_is_an_error(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    change(benchmark, monkeypatch, lambda output: output * factor)
    with pytest.raises(RuntimeError, match="grid_sample float32: output differs from ours in .* places"):
        benchmark.main([*TINY, "--peers", "grid_sample"])


@needs_kernels
def test_another_gradient_is_an_error(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    change(benchmark, monkeypatch, lambda output: output.detach() + 1.001 * (output - output.detach()))
    with pytest.raises(RuntimeError, match="gradient of value differs"):
        benchmark.main([*TINY, "--peers", "grid_sample"])


@needs_kernels
def test_an_interrupted_run_keeps_what_it_measured(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(output: torch.Tensor) -> torch.Tensor:
        if output.shape[1] == 84:  # of the second size
            raise KeyboardInterrupt
        return output

    change(benchmark, monkeypatch, interrupt)
    written = tmp_path / "times.json"
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*TINY, "--peers", "grid_sample", "--json", str(written), "--plot", str(tmp_path / "t.svg")])
    assert len(json.loads(written.read_text())["times"]) == 8
    assert "32 x 32" in capsys.readouterr().out
    assert (tmp_path / "t.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--sizes", "64", "-1"], "--sizes is -1, expected at least 1"),
        (["--json", "nowhere/times.json"], "no folder 'nowhere'"),
        (["--json", "."], "'.' is a folder"),
        (["--plot", "times.txt"], "expected a name that ends in .png"),
    ],
)
def test_options_that_do_not_fit_are_named(benchmark: ModuleType, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark.main(arguments)


@needs_kernels
def test_a_peer_that_was_asked_for_must_run(benchmark: ModuleType) -> None:
    with pytest.raises(UserError, match="--peers names deformops, .*CUDA"):
        benchmark.main(["--peers", "deformops"])


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"),
    [(torch.float32, 36e-6, 109e-6), (torch.bfloat16, 18e-6, 109e-6)],
)
def test_limits_of_an_h100(benchmark: ModuleType, dtype: torch.dtype, forward: float, backward: float) -> None:
    """21,504 queries, 8 heads of 32 channels, 3 levels of 4 points: corners from L1, added to at L2's speed."""
    inputs = benchmark._make_inputs(1024, "grid", benchmark._parse([])).in_dtype(dtype)
    least = benchmark._limit(inputs, "forward")
    assert least == pytest.approx(forward, rel=0.02)
    assert benchmark._limit(inputs, "forward + backward") - least == pytest.approx(backward, rel=0.02)


def test_memory_of_results(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At a size where anything works; a larger one is measured in test_modeling_mask_strips.py."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    results_memory = load_script(repository / "benchmarks" / "results_memory.py")
    small = ["--size", "96", "128", "--input", "64", "64", "--threads", "1"]
    path = tmp_path / "memory.json"
    results_memory.main([*small, "--cases", "labels alone", "--json", str(path)])
    (figures,) = json.loads(path.read_text())["cases"].values()
    assert figures["results"] == 96 * 128 * 4 and figures["added"] > 0
    with pytest.raises(UserError, match="at least 64 pixels"):
        results_memory.main(["--size", "96", "20"])


@pytest.fixture
def panoptic_evaluation(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("panopticapi", reason="needs panopticapi: pip install --no-deps panopticapi-lite")
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    threads = torch.get_num_threads()
    yield load_script(repository / "benchmarks" / "panoptic_evaluation.py")
    torch.set_num_threads(threads)


def test_panoptic_evaluation(
    panoptic_evaluation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "panoptic.json"
    panoptic_evaluation.main(["--pictures", "4", "--rounds", "2", "--threads", "1", "2", "--json", str(path)])
    printed = capsys.readouterr().out
    assert "4 pictures of 480 x 640 pixels; the figures are equal" in printed
    written = json.loads(path.read_text())
    assert written["pictures"] == 4 and [result["threads"] for result in written["results"]] == [1, 2]
    for result in written["results"]:
        assert all(min(seconds) > 0 for side in ("ours", "panopticapi") for seconds in result[side])
        assert len(result["ours"]) == len(result["panopticapi"]) == 2


def test_panoptic_evaluation_of_a_data_set(
    panoptic_evaluation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tiny_dataset(tmp_path / "tiny") as names:
        panoptic_evaluation.main(["--dataset", names.panoptic, "--pictures", "3", "--rounds", "1", "--threads", "1"])
    assert "3 pictures of tiny_panoptic; the figures are equal" in capsys.readouterr().out
    for arguments, message in (
        (["--dataset", "coco_2017_val"], "'coco_2017_val' is no registered panoptic data set"),
        (["--dataset", "nowhere"], "'nowhere' is no registered panoptic data set"),
        (["--threads", "2", "0"], "--threads is 0, expected at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            panoptic_evaluation.main(arguments)


@pytest.mark.parametrize(
    ("part", "key", "message"), [("groups", "PQ_st", "PQ_st is 12.5"), ("categories", (7, 1), r"number \[7\] differ")]
)
def test_another_panoptic_quality_is_an_error(
    panoptic_evaluation: ModuleType, monkeypatch: pytest.MonkeyPatch, part: str, key: Any, message: str
) -> None:
    ours = panoptic_evaluation._ours

    def spoilt(*given: Any) -> Any:
        figures, seconds = ours(*given)
        getattr(figures, part)[key] = 12.5
        return figures, seconds

    monkeypatch.setattr(panoptic_evaluation, "_ours", spoilt)
    with pytest.raises(RuntimeError, match=message):
        panoptic_evaluation.main(["--pictures", "3", "--rounds", "1", "--threads", "1"])
