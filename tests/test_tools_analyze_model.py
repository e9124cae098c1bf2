"""What models cost, against counts made by hand and by PyTorch's own counter."""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import Program, program
from tiny_dataset import tiny_dataset
from tiny_nuclei_model import build_tiny_model, one_thread, write_tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mask2former.analysis import PARTS, count_activations, count_flops, time_parts


@pytest.fixture(scope="module", autouse=True)
def slow_machine_friendly() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_tiny_model().eval()


class Attention(nn.Module):
    """2 pictures x 4 heads, 5 queries, 7 keys, 8 channels of keys and 16 of values."""

    def forward(self, batch: list[dict[str, Any]]) -> torch.Tensor:
        scale = batch[0]["image"].mean()
        query, key, value = (torch.ones(2, 4, *size) * scale for size in ((5, 8), (7, 8), (7, 16)))
        return F.scaled_dot_product_attention(query, key, value)


def sample(height: int = 64, width: int = 96) -> list[dict[str, Any]]:
    return [{"image": torch.zeros(3, height, width)}]


def test_attention_by_hand() -> None:
    assert count_flops(Attention(), sample()).by_operator() == {"attention": 2 * 4 * (5 * 7 * 8 + 5 * 7 * 16)}
    assert count_activations(Attention(), sample()).by_operator() == {"attention": 2 * 4 * (5 * 7 + 5 * 16)}


def test_products_equal_pytorchs_count(model: nn.Module) -> None:
    """PyTorch counts a multiply-add as two operations, and products alone."""
    counts = count_flops(model, sample()).by_operator()
    frozen = copy.deepcopy(model).requires_grad_(False)  # the counter can't do with trained queries
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frozen(sample())
    products = sum(counts[name] for name in ("conv", "linear", "matmul", "einsum", "attention"))
    # fvcore takes the best order of a product of several factors for the one that is run.
    assert counter.get_total_flops() / 2 == pytest.approx(products, rel=5e-3)


def test_activations_grow_with_the_picture(model: nn.Module) -> None:
    small, large = (count_activations(model, sample(*size)).by_operator()["conv"] for size in ((64, 64), (128, 128)))
    assert large == 4 * small


class Slow(nn.Module):
    """A model whose parts take known times."""

    class Part(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, *_: Any) -> None:
            time.sleep(self.seconds)

        forward_features = forward

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.backbone = self.Part(0.02)
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder = self.Part(0.04)
        self.sem_seg_head.predictor = self.Part(0.06)

    def forward(self, batch: Any) -> None:
        time.sleep(0.08)
        for _ in range(2):
            self.backbone()
            self.sem_seg_head.pixel_decoder.forward_features()
            self.sem_seg_head.predictor()
        time.sleep(0.1)


def test_time_of_parts() -> None:
    model = Slow()
    times = time_parts(model, [])
    assert tuple(times) == PARTS
    expected = dict(zip(PARTS, (0.08, 0.04, 0.08, 0.12, 0.1, 0.42), strict=True))
    for part, seconds in expected.items():
        assert seconds <= times[part] + 1e-3
    assert sum(times[part] for part in PARTS[:-1]) == pytest.approx(times["total"])
    assert times["total"] - sum(expected[part] for part in PARTS[:-1]) < 1
    assert "forward" not in vars(model.backbone) and "forward_features" not in vars(model.sem_seg_head.pixel_decoder)


def test_parts_of_the_model(model: nn.Module) -> None:
    assert tuple(time_parts(model, sample())) == PARTS
    model.sem_seg_head.pixel_decoder.forward_features(model.backbone(sample()[0]["image"][None]))  # as before


@pytest.fixture
def analyze(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Program:
    """The command as a function of its arguments after --config-file: exit code, and what it prints."""
    recipe, _ = write_tiny_model(tmp_path)
    return program(repository / "tools" / "analyze_model.py", monkeypatch, capsys, ["--config-file", str(recipe)])


def row(printed: str, name: str) -> list[str]:
    """The cells of a table's row."""
    return next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in printed.splitlines()
        if line.replace(" ", "").startswith(f"|{name.replace(' ', '')}|")
    )


def test_command_on_a_test_set(analyze: Program, tmp_path: Path, model: nn.Module) -> None:
    with tiny_dataset(tmp_path / "data"):
        code, printed = analyze(
            *("--tasks", "flop", "activation", "time", "parameter", "structure", "--num-inputs", "2", "--repeats", "1"),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "DATASETS.TEST", "('tiny_panoptic',)"),
            *("DATALOADER.NUM_WORKERS", "0", "MODEL.MASK_FORMER.TEST.TILE_SIZE", "48"),
            *("MODEL.MASK_FORMER.TEST.TILE_OVERLAP", "16"),
        )
    assert code == 0, printed
    assert "Mean ± deviation over 2 inputs" in printed
    mean, deviation = map(float, row(printed, "total")[1].split(" ± "))
    assert mean > 0.001 and deviation == 0  # both pictures have 64 x 64 pixels
    assert "these counts are for whole pictures" in printed
    assert row(printed, "pixel decoder")[3].endswith("%")
    assert "2 pictures x 1 runs on cpu, 1 threads" in printed
    assert row(printed, "backbone")[1:]
    assert "(predictor): MultiScaleMaskedTransformerDecoder(" in printed


def test_command_on_pictures_of_different_sizes(analyze: Program, tmp_path: Path) -> None:
    paths = []
    for height, width in ((64, 64), (64, 96)):
        paths.append(str(tmp_path / f"{width}.png"))
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(paths[-1])
    code, printed = analyze("--tasks", "flop", "--input", *paths)
    assert code == 0, printed
    mean, deviation = map(float, row(printed, "conv")[1].split(" ± "))
    assert deviation == pytest.approx(mean / 5, rel=0.1)  # 2 : 3


def test_command_on_a_fixed_size(analyze: Program) -> None:
    by_key = analyze("--tasks", "flop", "--use-fixed-input-size", "INPUT.CROP.SIZE", "(64,64)")
    by_option = analyze("--tasks", "flop", "--input-size", "64")
    assert by_key[0] == by_option[0] == 0
    assert row(by_key[1], "total") == row(by_option[1], "total")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--use-fixed-input-size",), "INPUT.CROP.SIZE is 0.9, expected a number of pixels: give --input-size"),
        (("--input-size", "0"), "--input-size is 0, expected at least 1"),
        (("--input", "nowhere.png"), "picture 'nowhere.png' does not exist"),
        (("--input-size", "64", "MODEL.WEIGHTS", "nowhere.pth"), "nowhere.pth does not exist"),
        (
            ("--num-inputs", "1", "DATASETS.TEST", "()"),
            "the recipe has no test set to take pictures from: give --input or --input-size",
        ),
    ],
)
def test_mistakes(analyze: Program, options: tuple[str, ...], message: str) -> None:
    code, printed = analyze("--tasks", "flop", *options)
    assert code == 1
    assert [line for line in printed.splitlines() if line.startswith("error: ") and message in line], printed
    assert "Traceback" not in printed
