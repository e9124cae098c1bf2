"""What is known of another project's state dicts."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

__all__ = ["Format", "Names", "Weights"]

Names = Collection[str]
Weights = dict[str, Any]  # tensors or arrays by name


@dataclass(frozen=True)
class Format:
    """A way of naming weights.

    Attributes:
        title: whose weights these are.
        fits: whether names are of this kind.
        convert: from weights in their names to weights in ours, and the names of those that have no place here.
        backbone_only: the names that ``convert`` makes begin inside the backbone, wherever that is in the model.
    """

    title: str
    fits: Callable[[Names], bool]
    convert: Callable[[Weights], tuple[Weights, list[str]]]
    backbone_only: bool = False
