"""Endless training batches that depend on nothing but the seed, the rank and their number."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError
from ..seeds import SAMPLE, SAMPLER, seeded
from .checks import DatasetDicts
from .images import picture_size
from .workers import leaves_with_parent, outlasts_sigterm

__all__ = ["BatchStream", "Mapper"]

Mapper = Callable[[dict[str, Any]], dict[str, Any]]
# Where a sample stands in the stream of all ranks, and which picture it is made of.
Numbered = tuple[int, int]
# Pictures that are tried in place of one that the mapper makes None of.
TRIES = 100


class BatchStream:
    """Endless batches of this rank, which can go on behind those that an interrupted run has had.

    Detectron2's loader shuffles and groups in the workers or behind them, so that what it gives depends on their
    number, and can't skip pictures without reading them. Here batches are lists of numbers until a worker reads them,
    and a sample is augmented by generators that its number seeds. Skipping takes two or three seconds for ten million.

    Iterating goes on behind the batches that were taken before.

    Args:
        dataset_dicts: of the pictures.
        mapper: makes a sample of a dataset dict; of None, as Detectron2 has it, another picture is taken.
        sampler: gives indices of pictures, on each rank its share; or what makes one of the dataset dicts. That is
            called with generators that the stream's seed has seeded.
        batch_size: of this rank.
        group_by_shape: whether pictures that are wider than high, and the others, have batches of their own.
        num_workers: processes that make samples; 0: this one does.
        seed: at least 0; None: a random one, the same on all ranks.
    """

    def __init__(
        self,
        dataset_dicts: DatasetDicts,
        *,
        mapper: Mapper,
        sampler: Sampler[int] | Callable[[Any], Sampler[int]],
        batch_size: int,
        group_by_shape: bool,
        num_workers: int,
        seed: int | None,
    ) -> None:
        self._dicts = DatasetFromList(dataset_dicts, copy=False)  # packed, so that workers share its memory
        self._mapper = mapper
        self._batch_size = batch_size
        self._group_of: Callable[[int], Hashable] = _Shapes(dataset_dicts) if group_by_shape else _one_group
        self._num_workers = num_workers
        self._seed = comm.shared_random_seed() if seed is None else seed
        self._batches = 0
        self._given_sampler = sampler
        self._sampler = self._build_sampler()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        loader = DataLoader(
            _Samples(self._dicts, self._mapper, self._seed),
            batch_sampler=self._numbered_batches(),
            num_workers=self._num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=leaves_with_parent(outlasts_sigterm),
            generator=torch.Generator(),  # its own, so that starting an iteration leaves the caller's as it is
        )
        for batch in loader:
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The seed, and how many batches each rank has taken: the same on all ranks."""
        return {"seed": self._seed, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batches = state["batches"]
        if state["seed"] != self._seed:
            self._seed = state["seed"]
            self._sampler = self._build_sampler()

    def _build_sampler(self) -> Sampler[int]:
        if isinstance(self._given_sampler, Sampler):
            return self._given_sampler
        with seeded(SAMPLER, self._seed):
            return self._given_sampler(self._dicts)

    def _numbered_batches(self) -> Iterator[list[Numbered]]:
        numbers = count(comm.get_rank(), comm.get_world_size())
        batches = _batches(zip(numbers, self._sampler, strict=False), self._batch_size, self._group_of)
        return islice(batches, self._batches, None)


def _batches(samples: Iterable[Numbered], size: int, group_of: Callable[[int], Hashable]) -> Iterator[list[Numbered]]:
    """Samples of one group each, as soon as there are ``size``."""
    waiting: dict[Hashable, list[Numbered]] = defaultdict(list)
    for sample in samples:
        group = group_of(sample[1])
        waiting[group].append(sample)
        if len(waiting[group]) == size:
            yield waiting.pop(group)


def _one_group(index: int) -> Hashable:
    return None


class _Shapes:
    """Whether a picture is wider than high. Files are looked into where dataset dicts don't say it, once each."""

    def __init__(self, dataset_dicts: DatasetDicts) -> None:
        self._wide = [d["width"] > d["height"] if d.keys() >= {"width", "height"} else None for d in dataset_dicts]
        self._files = {i: dataset_dicts[i]["file_name"] for i, wide in enumerate(self._wide) if wide is None}

    def __call__(self, index: int) -> bool:
        wide = self._wide[index]
        if wide is None:
            height, width = picture_size(self._files[index])
            wide = self._wide[index] = width > height
        return wide


class _Samples(Dataset[dict[str, Any]]):
    """Samples by number and picture."""

    def __init__(self, dataset_dicts: DatasetFromList, mapper: Mapper, seed: int) -> None:
        self._dicts = dataset_dicts
        self._mapper = PicklableWrapper(mapper)  # a lambda too can be sent to a worker
        self._seed = seed

    def __getitem__(self, sample: Numbered) -> dict[str, Any]:
        number, index = sample
        with seeded(SAMPLE, self._seed, number):
            for _ in range(TRIES):
                made = self._mapper(self._dicts[index])
                if made is not None:
                    return made
                index = int(torch.randint(len(self._dicts), ()))
        raise UserError(f"the mapper made None of {TRIES} pictures in a row: expected a sample of most pictures")
