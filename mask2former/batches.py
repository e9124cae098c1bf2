"""Which samples go through a model together."""

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["batches_of_equal_size"]


def batches_of_equal_size(samples: Iterable[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Neighbours whose ``image`` has the same size, up to ``batch_size`` of them, in their order.

    The padding that pictures of other sizes would need changes results.
    """
    batch: list[dict[str, Any]] = []
    for sample in samples:
        if batch and (len(batch) == batch_size or sample["image"].shape != batch[0]["image"].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
