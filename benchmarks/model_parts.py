"""Where our model spends its time and its floating-point operations: part by part, forward and backward."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mask2former.modeling.pixel_decoder import position_wise

__all__ = ["counted_flops", "metered"]


class Meter:
    """Charges what a clock counts to one part after the other.

    Args:
        clock: gives seconds, or whatever else grows while work is done.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.spent: dict[str, float] = {}
        self._clock = clock
        self._part = "rest"
        self._last = clock()

    def switch(self, part: str) -> str:
        """From now on it is ``part`` that counts; returns the part that counted until now."""
        before, now = self._part, self._clock()
        self.spent[before] = self.spent.get(before, 0.0) + now - self._last
        self._part, self._last = part, now
        return before


@contextmanager
def metered(model: Any, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """In the block, parts of ``model`` are charged with what ``clock`` counts, by name.

    Backpropagation undoes first what was done last: when it gets to where one of a part's inputs was made, it is
    through with the part.
    """
    meter = Meter(clock)
    head = model.sem_seg_head
    places = [
        (model.backbone, "forward", "backbone"),
        (head.pixel_decoder, "forward_features", "pixel decoder"),
        (head.predictor, "forward", "transformer decoder"),
        (model.criterion.matcher, "forward", "matching"),
        (model.criterion, "forward", "losses"),
        (nn.utils, "clip_grad_norm_", "clipping, optimizer"),
    ]
    with ExitStack() as stack:
        for owner, attribute, part in places:
            call = _metered(getattr(owner, attribute), part, meter)
            stack.enter_context(mock.patch.object(owner, attribute, call))
        yield meter.spent
        meter.switch("rest")


def _metered(function: Callable[..., Any], part: str, meter: Meter) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        before = meter.switch(part)
        if torch.is_grad_enabled():
            args = _watched(part, args, meter)
        result = function(*args, **kwargs)
        meter.switch(_following(part, before))
        return result

    return call


def _following(part: str, before: str) -> str:
    """What comes after a part that was called within ``before``."""
    if part == "transformer decoder" and not torch.is_grad_enabled():
        return "post-processing"
    if part == "losses":
        return "losses, backward"
    return part if part == "clipping, optimizer" else before


def _watched(part: str, args: tuple[Any, ...], meter: Meter) -> tuple[Any, ...]:
    """Arguments of a part which tell when backpropagation leaves it, for the part that ``following`` names."""
    if part == "losses":
        inputs, following = [args[0].class_logits, args[0].mask_embeddings], "transformer decoder"
    elif part == "transformer decoder":
        # Views, because the pixel decoder goes on with the maps themselves.
        inputs, following = [x.view_as(x) for x in args[0]], "pixel decoder"
        args = (inputs, *args[1:])
    elif part == "pixel decoder":
        inputs, following = list(args[0].values()), "backbone"
    else:
        return args
    if all(x.grad_fn is not None for x in inputs):  # not where predictions are given
        register_multi_grad_hook(inputs, lambda _: meter.switch(f"{following}, backward"), mode="any")
    return args


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Torch's counter of operations of matrix products, convolutions and attention, at work in the block.

    By itself it leaves out the CPU's attention kernel and products in place. Sampling isn't counted, deformable
    attention's either. What the backward pass would make again to save memory isn't made again: it is no work that has
    to be done.
    """
    operators = torch.ops.aten
    left_out = {
        operators.addmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1],
        operators._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        operators._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("mask2former.") and getattr(module, "checkpoint", None) is checkpoint:
                plain = mock.patch.object(module, "checkpoint", lambda function, *args, **_: function(*args))
                stack.enter_context(plain)
        stack.enter_context(mock.patch.object(position_wise, "make_hidden_again", _zeros_without_work))
        yield stack.enter_context(FlopCounterMode(display=False, custom_mapping=left_out))


def _zeros_without_work(x: Tensor, parts: Any, buffer: Tensor) -> Tensor:
    return buffer[: len(x)].zero_()


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Of queries (B, M, Q, D) with keys (B, M, S, D), and of the weights with as many values."""
    return 2 * 2 * math.prod(query) * key[-2]


def _attention_backward_flops(grad: Sequence[int], query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Weights made again, and gradients of the weights, queries, keys and values."""
    return 5 * 2 * math.prod(query) * key[-2]
