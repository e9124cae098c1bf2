"""tools/memory_over_time.py tells programs whose memory or handles grow from others."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scripts import load_script

from mask2former.errors import UserError

# A program that writes a file for each of 120 pictures, and keeps some MiB and opens some files at each.
PROGRAM = """\
import sys, time
kept, (output, mib, files) = [], sys.argv[1:]
for number in range(120):
    kept.append(bytearray(int(float(mib) * 2**20)))
    kept[-1][::4096] = b"x" * len(kept[-1][::4096])
    kept.append([open(__file__) for _ in range(int(files))])
    open(f"{output}/{number}.json", "w").close()
    time.sleep(0.02)
"""


@pytest.fixture
def tool(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script(repository / "tools" / "memory_over_time.py")
    if not (module.PROC / "self" / "statm").is_file():
        pytest.skip("needs Linux, whose /proc tells the memory of processes")
    monkeypatch.setattr(module, "INTERVAL", 0.005)
    return module


def series(tool: ModuleType, memory: np.ndarray) -> Any:
    """A sample a picture, ten pictures a group."""
    samples = [tool.Sample(done, value, 5) for done, value in enumerate(memory.tolist())]
    return tool.Series("demo.py", "pictures", 1000, 10, samples)


NOISE = np.random.default_rng(0).normal(0, 5, 400)
WARMING = 100 * (1 - np.exp(-np.arange(400) / 20))


@pytest.mark.parametrize(
    ("memory", "grows"),
    [
        (1000 + NOISE, False),
        (1000 + NOISE + WARMING, False),
        (1000 + NOISE - 0.05 * np.arange(400), False),
        (1000 + NOISE + 0.05 * np.arange(400), True),
        (500 + 0.01 * np.arange(400), True),
        (500 + 0.001 * np.arange(400), False),  # 0.3 MiB
        (500 + 1.3 * (np.arange(400) > 150), False),  # once, and then never again
        (1000 + 50 * (np.arange(400) % 10 == 3), False),  # a large picture in each round
    ],
)
def test_growth(tool: ModuleType, memory: np.ndarray, grows: bool) -> None:
    assert tool.trend(series(tool, memory), "memory").grows == grows
    assert not tool.trend(series(tool, memory), "handles").grows


def test_slope(tool: ModuleType) -> None:
    trend = tool.trend(series(tool, 1000 + NOISE + 0.05 * np.arange(400)), "memory")
    assert trend.slope == pytest.approx(0.05, rel=0.2)
    assert trend.low < 0.05 < trend.high
    assert trend.at[0] == 100 and trend.growth == pytest.approx(290 * trend.slope)


def test_a_pause_counts_once(tool: ModuleType) -> None:
    """Of a picture that took long there are many samples."""
    run = series(tool, 1000 + NOISE)
    run.samples[300:300] = [tool.Sample(300, 2000.0, 50)] * 1 + [run.samples[300]] * 500
    assert not tool.trend(run, "memory").grows and not tool.trend(run, "handles").grows


@pytest.mark.parametrize(
    ("mib", "files", "verdict", "code"),
    [
        ("0", "0", "memory flat, handles flat", 0),
        ("0.5", "0", "memory GROW, handles flat", 1),
        ("0", "2", "handles GROW", 1),
    ],
)
def test_a_program(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mib: str,
    files: str,
    verdict: str,
    code: int,
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    output = tmp_path / "output"
    output.mkdir()
    words = [str(script), str(output), mib, files]
    samples, of_children = tool._watch(words, lambda: len(list(output.iterdir())), 120)
    assert {(sample.memory, sample.handles) for sample in of_children} == {(0, 0)}
    run = tool.Series("program.py", "pictures", 1000, 10, samples)
    assert tool.report([run], tmp_path / "plot.png") == code
    assert verdict in capsys.readouterr().out
    assert Image.open(tmp_path / "plot.png").size == (500, 600)


def test_the_demo(tool: ModuleType, tmp_path: Path) -> None:
    (run,) = tool.watch_demo(tmp_path, 3)
    assert {sample.done for sample in run.samples} <= {1, 2} and run.samples
    assert all(50 < sample.memory < 10000 and sample.handles > 2 for sample in run.samples)
    assert len(list((tmp_path / "output").glob("*_instances.png"))) == 3


def test_training(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(f"_BASE_: {tool.RECIPE}\nSOLVER: {{IMS_PER_BATCH: 1}}\nINPUT: {{IMAGE_SIZE: 64}}\n")
    monkeypatch.setattr(tool, "RECIPE", small)
    run, of_loader = tool.watch_training(tmp_path / "run", tool.LOGGED + 2)
    assert {sample.done for sample in run.samples} == {tool.LOGGED} == {sample.done for sample in of_loader.samples}
    assert max(sample.memory for sample in of_loader.samples) > 50


def test_all_in_one(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "watch_demo", lambda folder, count: [series(tool, 1000 + NOISE[:count])])
    monkeypatch.setattr(tool, "watch_training", lambda folder, steps: [series(tool, 1000.0 + np.arange(steps))])
    assert tool.main(["--steps", "0", "--pictures", "300"]) == 0
    assert tool.main(["--pictures", "0", "--steps", "280", "--json", str(tmp_path / "samples.json")]) == 1
    (run,) = json.loads((tmp_path / "samples.json").read_text())
    assert run["samples"][5] == {"done": 5, "memory": 1005.0, "handles": 5}
    assert "+1000.00 (+1000.00 to +1000.00) per 1,000" in capsys.readouterr().out


def test_mistakes(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--steps is 100: expected 0, or 266 or more"):
        tool.main(["--steps", "100"])
    (tmp_path / "broken.py").write_text("print('first'); raise SystemExit('no disk')")
    with pytest.raises(UserError, match=r"broken.py ended with exit code 1: no disk$"):
        tool._watch([str(tmp_path / "broken.py")], lambda: 0, 10)
    monkeypatch.setattr(tool, "PROC", tmp_path)
    with pytest.raises(UserError, match="doesn't tell the memory of processes: run this on Linux"):
        tool.main([])
