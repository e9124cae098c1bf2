"""What a model costs: operations, activations, and the time of its parts.

Operations are multiply-adds, as fvcore counts them and the published figures have them: one for each product of a
convolution, a matrix product or an attention. Elementwise operations are left out.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import Handle, get_shape
from torch import nn

from .modeling import MaskFormer

__all__ = ["PARTS", "count_activations", "count_flops", "time_parts", "whole_pictures"]

Batch = Sequence[dict[str, Any]]

ATTENTION = "aten::scaled_dot_product_attention"

# Parts of a model whose time is measured: name, where it is in the model, and the method that the model calls.
MEASURED = (
    ("backbone", "backbone", "forward"),
    ("pixel decoder", "sem_seg_head.pixel_decoder", "forward_features"),
    ("transformer decoder", "sem_seg_head.predictor", "forward"),
)
# What :func:`time_parts` gives times for.
PARTS = ("preparation", *(name for name, _, _ in MEASURED), "post-processing", "total")


def count_flops(model: nn.Module, batch: Batch) -> FlopCountAnalysis:
    """Count the operations of a model in evaluation mode on a batch.

    Args:
        model: takes a batch of samples, as all of Detectron2's do.
        batch: one sample, as the published figures are for.

    Returns:
        fvcore's analysis, which runs the model when it is first asked for ``total()``, ``by_operator()`` or
        ``by_module()``. What it has no count for is in ``unsupported_ops()``.
    """
    return _set_up(FlopCountAnalysis(model, batch), _count_attention)


def count_activations(model: nn.Module, batch: Batch) -> ActivationCountAnalysis:
    """Count the values that convolutions and matrix products give; arguments and result as :func:`count_flops`."""
    adapter = TracingAdapter(model, batch, allow_non_tensor=True)
    return _set_up(ActivationCountAnalysis(adapter, adapter.flattened_inputs), _count_attention_activations)


def _set_up(counts: JitModelAnalysis, count_attention: Handle) -> Any:
    """Count attention, which fvcore does not know, and say nothing of what it does not count."""
    counts.set_op_handle(ATTENTION, count_attention)
    return counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


@contextmanager
def whole_pictures(model: nn.Module) -> Iterator[bool]:
    """Let a ``MaskFormer`` take whole pictures in the block, and say whether it takes them in tiles otherwise.

    fvcore counts by tracing, which keeps what every tile gives in memory.
    """
    if not isinstance(model, MaskFormer) or not model.inference.tile_size:
        yield False
        return
    settings = model.inference
    model.inference = dataclasses.replace(settings, tile_size=0)
    try:
        yield True
    finally:
        model.inference = settings


def _attention_shape(inputs: Sequence[Any]) -> tuple[int, int, int, int, int]:
    """Batch x heads, queries, keys, channels of a key, and of a value."""
    shapes = [get_shape(value) for value in inputs[:3]]
    (*batch, queries, channels), (*_, keys, _), (*_, value_channels) = (shape or [] for shape in shapes)
    return math.prod(batch), queries, keys, channels, value_channels


def _count_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Queries times keys, and the weights times values."""
    batch, queries, keys, channels, value_channels = _attention_shape(inputs)
    return Counter(attention=batch * queries * keys * (channels + value_channels))


def _count_attention_activations(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """The weights and the result."""
    batch, queries, keys, _, value_channels = _attention_shape(inputs)
    return Counter(attention=batch * queries * (keys + value_channels))


def time_parts(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Run a model in evaluation mode once, and measure.

    Returns:
        Seconds of each of ``PARTS``, in their order: "preparation" is the time before the first part (moving,
        normalising and padding pictures), "post-processing" all that is left of the "total". Parts that the model lacks
        are left out. A part that is called several times, as in tiles, gets the sum.
    """
    spent: dict[str, float] = {}
    started: list[float] = []
    synchronize = _synchronizer(model)
    with torch.no_grad(), _measured(model, spent, started, synchronize):
        start = synchronize()
        model(batch)
        total = synchronize() - start
    preparation = started[0] - start if started else 0.0
    rest = total - preparation - sum(spent.values())
    return {"preparation": preparation, **spent, "post-processing": rest, "total": total}


def _synchronizer(model: nn.Module) -> Callable[[], float]:
    """A clock in seconds that waits for what the model's device still has to do."""
    device = next(model.parameters()).device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@contextmanager
def _measured(
    model: nn.Module, spent: dict[str, float], started: list[float], now: Callable[[], float]
) -> Iterator[None]:
    """In the block, calls of the model's parts add their seconds to ``spent`` and their begin to ``started``."""
    wrapped = []
    modules = dict(model.named_modules())
    for name, path, method in MEASURED:
        if path in modules and hasattr(modules[path], method):
            spent[name] = 0.0
            # An attribute of the object hides the method of its class, until it is deleted.
            setattr(modules[path], method, _timed(getattr(modules[path], method), name, spent, started, now))
            wrapped.append((modules[path], method))
    try:
        yield
    finally:
        for module, method in wrapped:
            delattr(module, method)


def _timed(
    call: Callable[..., Any], name: str, spent: dict[str, float], started: list[float], now: Callable[[], float]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = now()
        started.append(begin)
        result = call(*args, **kwargs)
        spent[name] += now() - begin
        return result

    return run
