"""Tensors that are made once more in the backward pass, where that is quick, instead of being kept for it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_be_made_again", "forget_how", "made_again_for_backward", "made_again_if_it_can"]


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
        return kept if isinstance(kept, Tensor) else kept()  # autograd knows what it was made of

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def can_be_made_again(made: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``made``, with the way of making it for :func:`made_again_if_it_can`. ``make`` must not hold on to ``made``."""
    if made.requires_grad:
        made._made_by = (made._version, torch.no_grad()(make))  # type: ignore[attr-defined]
    return made


def forget_how(made: Any) -> None:
    """Undo :func:`can_be_made_again` for what is kept in any case: what it can be made of need not be."""
    if not torch.compiler.is_compiling() and hasattr(made, "_made_by"):
        del made._made_by


def made_again_if_it_can(x: Tensor, for_first_gradients: bool = True) -> AbstractContextManager[None]:
    """As :func:`made_again_for_backward` for what came from :func:`can_be_made_again` and is what it was then.

    Args:
        x: what functions in the block take.
        for_first_gradients: whether they look at it for gradients, and not for gradients of those alone. Else it is
            made for the latter only.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    version, make = getattr(x, "_made_by", (None, None))
    if make is None or version != x._version:
        return nullcontext()
    if not for_first_gradients:
        make = partial(_for_gradients_of_gradients, make, x.new_zeros(()), x.shape)
    return made_again_for_backward(x, make)


def _for_gradients_of_gradients(make: Callable[[], Tensor], zero: Tensor, shape: torch.Size) -> Tensor:
    return make() if torch.is_grad_enabled() else zero.expand(shape)
