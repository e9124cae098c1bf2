"""Training batches depend on the seed, the rank and their number alone, and can be skipped without being read."""

import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import Sampler

from mask2former.data.sampling import RepeatRareClasses
from mask2former.data.stream import BatchStream
from mask2former.errors import UserError

Batches = list[list[tuple[int, float, float, float]]]
WIDE = {0, 3, 4, 8}
SAMPLERS: dict[str, Callable[[Sequence[dict[str, Any]]], Sampler[int]]] = {
    "shuffle": lambda dicts: TrainingSampler(len(dicts)),
    "repeat": RepeatRareClasses(0.9, sqrt=False),
    "subset": lambda dicts: RandomSubsetTrainingSampler(len(dicts), 0.7),
}


def dicts() -> list[dict[str, Any]]:
    """Nine pictures, four of them wider than high; every third has a rare class."""
    return [
        {"id": i, "width": 3 if i in WIDE else 1, "height": 2, "annotations": [{"category_id": int(i % 3 == 0)}]}
        for i in range(9)
    ]


def noisy(dataset_dict: dict[str, Any]) -> Any:
    """A picture's number, and one draw of each generator."""
    return dataset_dict["id"], random.random(), float(np.random.uniform()), float(torch.rand(()))


def stream(**values: Any) -> BatchStream:
    defaults: dict[str, Any] = {
        "mapper": noisy,
        "sampler": SAMPLERS["shuffle"],
        "batch_size": 2,
        "group_by_shape": True,
        "num_workers": 0,
        "seed": 5,
    }
    return BatchStream(dicts(), **{**defaults, **values})


def first(batches: BatchStream, number: int = 12) -> Batches:
    return list(islice(batches, number))


def skipped(batches: BatchStream, state: dict[str, int]) -> BatchStream:
    batches.load_state_dict(state)
    return batches


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grouped", [False, True])
def test_workers_and_interruptions_change_nothing(sampler: str, grouped: bool) -> None:
    values = {"sampler": SAMPLERS[sampler], "group_by_shape": grouped}
    expected = first(stream(**values))
    assert len({draw for batch in expected for sample in batch for draw in sample[1:]}) == 3 * 2 * 12  # none repeats
    if grouped:
        assert all(len({sample[0] in WIDE for sample in batch}) == 1 for batch in expected)
    for workers in (1, 2):
        assert first(stream(num_workers=workers, **values)) == expected
    interrupted = stream(num_workers=2, **values)
    assert first(interrupted, 5) == expected[:5]  # the workers have read further
    state = interrupted.state_dict()
    for workers in (0, 2):
        other_seed = stream(num_workers=workers, seed=6, **values)
        assert first(skipped(other_seed, state), 7) == expected[5:]


def test_seeds() -> None:
    assert first(stream(seed=5)) == first(stream(seed=5)) != first(stream(seed=6))
    random_seed = stream(seed=None)
    expected = first(random_seed)
    assert expected != first(stream(seed=None))
    again = skipped(stream(seed=None), {**random_seed.state_dict(), "batches": 0})
    assert first(again) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_generators_of_the_caller_are_left_alone(workers: int) -> None:
    def draws() -> Any:
        return noisy({"id": 0})

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [draws(), draws()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = draws()
    first(stream(num_workers=workers), 3)
    assert [before, draws()] == expected


def test_ranks_share_what_one_process_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first(stream(batch_size=4, group_by_shape=False))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "all_gather", lambda value: [value])
        shares.append(first(stream(batch_size=2, group_by_shape=False)))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(sample for part in parts for sample in part)


def test_skipped_pictures_are_not_read() -> None:
    read: list[int] = []

    def mapper(dataset_dict: dict[str, Any]) -> Any:
        read.append(dataset_dict["id"])
        return dataset_dict

    late = skipped(stream(mapper=mapper), {"seed": 5, "batches": 100_000})
    assert len(first(late, 1)) == 1 and len(read) == 2


def test_shapes_are_in_files_where_dataset_dicts_lack_them(tmp_path: Path) -> None:
    for name, size in (("wide", (3, 2)), ("high", (2, 3))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    pictures = [{"file_name": str(tmp_path / f"{name}.png")} for name in ("wide", "high", "wide", "high")]
    batches = BatchStream(
        pictures,
        mapper=lambda dataset_dict: dataset_dict["file_name"],
        sampler=SAMPLERS["shuffle"],
        batch_size=3,
        group_by_shape=True,
        num_workers=0,
        seed=1,
    )
    found = [set(batch) for batch in islice(batches, 10)]
    assert all(len(names) == 1 for names in found) and len(set.union(*found)) == 2


def test_pictures_of_which_the_mapper_makes_none() -> None:
    def some(dataset_dict: dict[str, Any]) -> Any:
        return noisy(dataset_dict) if dataset_dict["id"] < 4 else None

    batches = first(stream(mapper=some))
    assert {sample[0] for batch in batches for sample in batch} == {0, 1, 2, 3}
    assert first(stream(mapper=some, num_workers=2)) == batches
    with pytest.raises(UserError, match="the mapper made None of 100 pictures in a row"):
        first(stream(mapper=lambda _: None))
