#!/usr/bin/env python
"""What a training step takes on many GPUs: memory and communication by formula, and the tables of docs/scaling.md.

The formulas are explained on that page. What they start from, weights and activations of a picture, is counted and
measured: see ``MODELS``. Processes are GPUs; bytes are decimal, and values are float32 unless said otherwise.

examples:
  python benchmarks/scaling.py            # print the tables
  python benchmarks/scaling.py --write    # put them into docs/scaling.md
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from mask2former.errors import command

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
VALUE = 4  # bytes of a float32
MOMENTS = 2  # values that AdamW keeps for each parameter
GPUS_OF_A_NODE = 8
NODES = (1, 2, 4, 8, 16, 32, 64)
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
GIGABYTE = 1e9
ROWS = r"\A(\|.*\n)*\n*"  # of a Markdown table at the start, and the empty line behind it
# Bytes a second of a ring: between the GPUs of a node, and out of a node through all its adapters. Assumed.
LINKS = {"NVLink": 300e9, "8 x 400 Gb/s": 400e9, "2 x 100 Gb/s": 25e9, "1 x 25 Gb/s": 3.1e9}


@dataclass(frozen=True)
class Model:
    """A published recipe for COCO panoptic.

    Attributes:
        recipe: under ``configs/coco/panoptic-segmentation``.
        parameters: trained ones, counted.
        activations: bytes that a picture of 1024 x 1024 adds at its peak, by what is computed twice; by
            ``training_memory.py``, measured for R50 and counted for Swin-L.
        hidden: bytes of the hidden layers in the pixel decoder's encoder, which a GPU keeps besides: on a CPU these
            are always computed twice. Counted.
    """

    recipe: str
    parameters: int
    activations: Mapping[str, float]
    hidden: float

    def on_gpu(self, case: str) -> float:
        """Bytes of activations a picture."""
        kept = 0 if case in ("pixel_decoder", "all") else self.hidden
        return self.activations[case] + kept


def positions(side: int) -> int:
    """Cells of the three maps that the pixel decoder's encoder sees, strides 8, 16 and 32."""
    return sum((side // stride) ** 2 for stride in (8, 16, 32))


HIDDEN = 6 * positions(1024) * 1024 * VALUE  # layers, cells, width
MODELS = {
    "R50": Model(
        "maskformer2_R50_bs16_50ep.yaml", 43_983_878, {"nothing": 2.73e9, "backbone": 2.45e9, "all": 1.25e9}, HIDDEN
    ),
    "Swin-L": Model(
        "swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml",
        215_535_610,
        {"nothing": 11.65e9, "backbone": 3.71e9, "all": 2.33e9},
        HIDDEN,
    ),
}


# -------------------------------------------------------------------------------------------- formulas


def state_bytes(parameters: int, processes: int, sharded: bool) -> dict[str, float]:
    """What a process holds whatever the pictures are: weights, gradients, and AdamW's moments or its share of them."""
    return {
        "weights": VALUE * parameters,
        "gradients": VALUE * parameters,
        "optimizer": MOMENTS * VALUE * parameters / (processes if sharded else 1),
    }


def memory(model: Model, processes: int, pictures: int, case: str, sharded: bool) -> float:
    """Bytes on a GPU at the peak of a step, without what CUDA and its libraries take for themselves."""
    return sum(state_bytes(model.parameters, processes, sharded).values()) + pictures * model.on_gpu(case)


def sent_bytes(parameters: int, processes: int, sharded: bool) -> float:
    """Bytes that a process sends in a step, in the mean, which it receives as well.

    A ring all-reduce of gradients sends each byte 2 (N - 1) / N times. A sharded optimizer then sends each process's
    share of the weights to the N - 1 others.
    """
    rounds = 3 if sharded else 2
    return rounds * (processes - 1) / processes * VALUE * parameters


def seconds(parameters: int, nodes: int, between_nodes: str, sharded: bool) -> float:
    """Least time of a step's communication: a ring is as fast as its slowest link."""
    rates = [LINKS["NVLink"]] + ([LINKS[between_nodes]] if nodes > 1 else [])
    return sent_bytes(parameters, nodes * GPUS_OF_A_NODE, sharded) / min(rates)


# -------------------------------------------------------------------------------------------- tables


def table_of_models() -> str:
    """What a model brings along, and what a picture adds."""
    rows = []
    for name, model in MODELS.items():
        parts = state_bytes(model.parameters, 1, sharded=False)
        activations = [model.on_gpu(case) for case in ("nothing", "backbone", "all")]
        rows.append([name, f"{model.parameters / 1e6:.1f} M", *map(_gigabytes, [*parts.values(), *activations])])
    headers = ["", "parameters", "weights", "gradients", "AdamW"]
    headers += ["a picture", "a picture, backbone computed twice", "a picture, all computed twice"]
    return _table(rows, headers)


def table_of_memory(name: str) -> str:
    """Memory of a GPU by total batch and nodes."""
    rows = []
    for nodes in NODES:
        gpus = nodes * GPUS_OF_A_NODE
        rows.append([f"{nodes}, {gpus}", *(_memory_cell(MODELS[name], gpus, batch) for batch in BATCHES)])
    return _table(rows, ["nodes, GPUs", *(f"batch {batch}" for batch in BATCHES)])


def _memory_cell(model: Model, gpus: int, batch: int) -> str:
    if batch % gpus:
        return ""
    plain = memory(model, gpus, batch // gpus, "nothing", sharded=False)
    least = memory(model, gpus, batch // gpus, "all", sharded=True)
    return f"{_gigabytes(plain)} / {_gigabytes(least)}"


def table_of_communication(name: str) -> str:
    """Bytes and seconds of a step's communication by nodes."""
    rows = []
    parameters = MODELS[name].parameters
    for nodes in NODES:
        sent = [_gigabytes(sent_bytes(parameters, nodes * GPUS_OF_A_NODE, sharded)) for sharded in (False, True)]
        times = [f"{1e3 * seconds(parameters, nodes, link, sharded=False):.1f}" for link in list(LINKS)[1:]]
        rows.append([f"{nodes}, {nodes * GPUS_OF_A_NODE}", *sent, *times])
    headers = ["nodes, GPUs", "sent", "sent, sharded", *(f"ms with {link}" for link in list(LINKS)[1:])]
    return _table(rows, headers)


def table_of_schedule() -> str:
    """Learning rate and steps of 50 epochs of COCO by total batch, from 1e-4 and 368,750 steps for 16."""
    rows = [
        [
            batch,
            f"{1e-4 * batch / 16:.1e}",
            f"{1e-4 * (batch / 16) ** 0.5:.1e}",
            f"{round(368750 * 16 / batch):,}",
        ]
        for batch in BATCHES
    ]
    return _table(rows, ["batch", "learning rate, linear", "learning rate, square root", "steps"])


TABLES: dict[str, Callable[[], str]] = {
    "models": table_of_models,
    "memory R50": lambda: table_of_memory("R50"),
    "memory Swin-L": lambda: table_of_memory("Swin-L"),
    "communication R50": lambda: table_of_communication("R50"),
    "communication Swin-L": lambda: table_of_communication("Swin-L"),
    "schedule": table_of_schedule,
}


def _gigabytes(value: float) -> str:
    return f"{value / GIGABYTE:.2f}" if value < 10 * GIGABYTE else f"{value / GIGABYTE:.1f}"


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def with_tables(page: str) -> str:
    """The page with each table behind its comment ``<!-- table: NAME -->`` made anew."""
    for name, table in TABLES.items():
        start = f"<!-- table: {name} -->\n\n"
        before, found, behind = page.partition(start)
        assert found, f"the page has no table {name}"
        page = f"{before}{start}{table()}\n\n{re.sub(ROWS, '', behind)}"
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.parent.name}/{PAGE.name}")
    if parser.parse_args(arguments).write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}\n")


if __name__ == "__main__":
    command(main)
