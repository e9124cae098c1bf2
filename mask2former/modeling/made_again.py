"""Tensors that are made once more in the backward pass, where that is quick, instead of being kept for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_be_made_again", "made_again_for_backward", "made_again_if_it_can"]


@contextmanager
def made_again_for_backward(made: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Functions in the block do not keep ``made`` for their gradients: ``make`` makes it once more then."""
    if not (torch.is_grad_enabled() and made.requires_grad):
        yield
        return
    address, layout = made.data_ptr(), (made.shape, made.stride())

    def pack(x: Tensor) -> Any:
        return make if x.data_ptr() == address and (x.shape, x.stride()) == layout else x

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():  # autograd knows what it was made of
            return make()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def can_be_made_again(made: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``made``, with the way of making it for :func:`made_again_if_it_can`. ``make`` must not hold on to ``made``."""
    if made.requires_grad:
        made._made_by = (made._version, make)  # type: ignore[attr-defined]
    return made


@contextmanager
def made_again_if_it_can(x: Tensor) -> Iterator[None]:
    """As :func:`made_again_for_backward` for what came from :func:`can_be_made_again` and is what it was then."""
    version, make = getattr(x, "_made_by", (None, None))
    if make is None or version != x._version:
        yield
        return
    with made_again_for_backward(x, make):
        yield
