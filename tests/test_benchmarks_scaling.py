"""The formulas and tables of docs/scaling.md, and the measuring of a step's memory."""

import json
from pathlib import Path
from typing import Any

import pytest
from recipe_parts import build_without_memory, load
from scripts import load_script
from tiny_nuclei_model import write_tiny_model


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch, one_thread_and_seed: None) -> Path:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))  # as where a program is run by its path
    return repository / "benchmarks"


@pytest.fixture
def scaling(benchmarks: Path) -> Any:
    return load_script(benchmarks / "scaling.py")


def test_the_page_has_the_tables_of_the_formulas(scaling: Any) -> None:
    page = scaling.PAGE.read_text(encoding="utf-8")
    assert scaling.with_tables(page) == page
    rows = page.splitlines()
    without_a_row = "\n".join(row for row in rows if not row.startswith("| 64, 512 ")) + "\n"
    assert len(without_a_row) < len(page)
    assert scaling.with_tables(without_a_row) == page


def test_the_table_that_is_printed(scaling: Any, capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main([])
    printed = capsys.readouterr().out
    assert scaling.table_of_models() in printed and len(scaling.TABLES) == 6


@pytest.mark.parametrize("name", ["R50", "Swin-L"])
def test_parameters_are_the_models(scaling: Any, name: str) -> None:
    model = scaling.MODELS[name]
    built = build_without_memory(load(f"coco/panoptic-segmentation/{model.recipe}"))
    assert model.parameters == sum(p.numel() for p in built.parameters() if p.requires_grad)
    encoder = built.sem_seg_head.pixel_decoder.transformer.encoder.layers
    assert model.hidden == len(encoder) * scaling.positions(1024) * encoder[0].linear1.out_features * 4
    assert {"nothing", "all"} <= model.activations.keys()


def sent_by_a_ring(chunks: int, processes: int) -> int:
    """Chunks that a process of a ring sends until all have the sum of all chunks, counted step by step."""
    sums = [[{(owner, chunk)} for chunk in range(chunks)] for owner in range(processes)]
    whole = [{(owner, chunk) for owner in range(processes)} for chunk in range(chunks)]
    sent = 0
    for step in range(2 * (processes - 1)):  # reduce-scatter, then all-gather
        before = [[set(values) for values in row] for row in sums]
        for owner in range(processes):
            chunk = (owner - step) % processes
            sums[(owner + 1) % processes][chunk] |= before[owner][chunk]
        sent += 1
    assert all(row == whole for row in sums)
    return sent


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_communication(scaling: Any, processes: int) -> None:
    bytes_of_a_chunk = 4 * 1000 / processes
    expected = sent_by_a_ring(processes, processes) * bytes_of_a_chunk
    assert scaling.sent_bytes(1000, processes, sharded=False) == pytest.approx(expected)
    shares = (processes - 1) * bytes_of_a_chunk  # of its weights, to each of the others
    assert scaling.sent_bytes(1000, processes, sharded=True) == pytest.approx(expected + shares)
    assert scaling.sent_bytes(1000, 1, sharded=True) == 0


def test_memory(scaling: Any) -> None:
    model = scaling.Model("", 1000, {"nothing": 50.0, "all": 20.0}, hidden=5.0)
    assert scaling.memory(model, 4, 2, "nothing", sharded=False) == 16 * 1000 + 2 * 55
    assert scaling.memory(model, 4, 2, "all", sharded=True) == 10 * 1000 + 2 * 20


def test_a_step_is_measured(benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, _ = write_tiny_model(tmp_path)
    options = ["--config-file", str(recipe), "--sizes", "256", "--threads", "1", "--only", "backbone"]
    load_script(benchmarks / "training_memory.py").main(options)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["seconds"] > 0 and 2**20 < figures["added"] < 2**30
