"""Losses of a batch that goes through the model in parts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["LossInParts"]


class LossInParts:
    """A module whose losses are divided by what ``batch`` holds, if it is set, and else by what the call's pictures do.

    Attributes:
        batch: samples, of which each call in the block of ``parts_of`` gets a part.
    """

    batch: Sequence[dict[str, Any]] | None = None

    @contextmanager
    def parts_of(self, batch: Sequence[dict[str, Any]]) -> Iterator[None]:
        """In the block, the losses of the parts of ``batch`` add up to the batch's losses."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None
