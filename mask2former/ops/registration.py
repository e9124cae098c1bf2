"""What torch needs to know of the compiled operators besides their kernels: results' shapes, gradients, batching.

Their schemas are in the files of ``csrc``. To be imported only where their library is loaded.

``inputs`` stands for what an operator takes after ``spatial_shapes``: locations and weights or, fused, reference
points, offsets and logits.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .reference import ms_deform_attn_fused_reference, ms_deform_attn_reference

__all__ = ["apply"]


def apply(value: Tensor, spatial_shapes: Sequence[int], *inputs: Tensor) -> Tensor:
    """The operator on ``inputs``, with gradients, under torch.func's transforms too.

    Args:
        value: (B, S, M, D).
        spatial_shapes: height and width of each level, one after another.
        inputs: what the operator takes besides, which tells the two apart.
    """
    run = _Function.apply if transforms_are_active() else _operator(inputs)
    return run(value, spatial_shapes, *inputs)


@torch.compiler.assume_constant_result  # torch 2.4's compiler can't trace what it calls
def transforms_are_active() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def _operator(inputs: Sequence[Tensor]) -> Any:
    return torch.ops.mask2former.ms_deform_attn_fused if len(inputs) == 3 else torch.ops.mask2former.ms_deform_attn


def _backward_operator(inputs: Sequence[Tensor]) -> Any:
    operators = torch.ops.mask2former
    return operators.ms_deform_attn_fused_backward if len(inputs) == 3 else operators.ms_deform_attn_backward


# ------------------------------------------------------------------------------------------- shapes of results


def _fake(value: Tensor, spatial_shapes: Sequence[int], *inputs: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, inputs[-1].shape[1], heads * channels)


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *inputs: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (value, *inputs[-2:]))


# ------------------------------------------------------------------------------------------- gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    value, ctx.spatial_shapes, *rest = inputs
    ctx.save_for_backward(value, *rest)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *inputs = ctx.saved_tensors
    shapes = ctx.spatial_shapes
    run = _BackwardFunction.apply if transforms_are_active() else _backward_operator(inputs)
    grad_value, grad_sampling, grad_attention = run(grad_output, value, shapes, *inputs)
    if len(inputs) == 2:
        return grad_value, None, grad_sampling, grad_attention
    grad_points = _grad_of_reference_points(grad_sampling, shapes, inputs[0]) if ctx.needs_input_grad[2] else None
    return grad_value, None, grad_points, grad_sampling, grad_attention


def _grad_of_reference_points(grad_offsets: Tensor, spatial_shapes: Sequence[int], reference_points: Tensor) -> Tensor:
    """A step of a reference point moves all samples of its level by the level's size in cells."""
    # Not grad_offsets.new_tensor, which fails under torch.func in torch 2.4.
    sizes = torch.tensor(spatial_shapes, dtype=reference_points.dtype, device=grad_offsets.device)
    sizes = sizes.view(-1, 2).flip(-1)
    grad = grad_offsets.sum((2, 4), dtype=reference_points.dtype) * sizes  # (B, Q, L, 2)
    return grad.sum_to_size(reference_points.shape)


def _setup_second_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, value, ctx.spatial_shapes, *rest = inputs
    ctx.save_for_backward(grad_output, value, *rest)


def _second_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative, which is rarely asked for, is that of the plain PyTorch form."""
    reference = ms_deform_attn_fused_reference if len(ctx.saved_tensors) == 5 else ms_deform_attn_reference
    with torch.enable_grad():
        grad_output, value, *inputs = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        output = reference(value, _pairs(ctx.spatial_shapes), *inputs)
        first = torch.autograd.grad(output, (value, *inputs[-2:]), grad_output, create_graph=True)
        second = torch.autograd.grad(first, (grad_output, value, *inputs), grads)
    return second[0], second[1], None, *second[2:]


def _pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


# ------------------------------------------------------------------------------------------- torch.func


def _merge(x: Tensor, dim: int | None, count: int, batch: int) -> Tensor:
    """The ``count`` inputs that vmap goes over, ``batch`` pictures each (or one for all), as one larger batch."""
    x = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(count, batch, *x.shape[2:]).flatten(0, 1)


def _batch_size(value: Tensor, dim: int | None) -> int:
    """Pictures in each of the inputs that vmap goes over."""
    return value.shape[1 if dim == 0 else 0]


class _Function(torch.autograd.Function):
    """The operators where torch.func's transforms are at work, which an operator's own gradients don't go with."""

    @staticmethod
    def forward(value: Tensor, spatial_shapes: Sequence[int], *inputs: Tensor) -> Any:
        """Operator on ``value`` and ``inputs``."""
        return _operator(inputs)(value, spatial_shapes, *inputs)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, dims: Any, value: Tensor, spatial_shapes: Sequence[int], *inputs: Tensor) -> tuple[Tensor, int]:
        """All inputs in one call."""
        count, batch = info.batch_size, _batch_size(value, dims[0])
        merged = [_merge(x, dim, count, batch) for x, dim in zip(inputs, dims[2:], strict=True)]
        output = _Function.apply(_merge(value, dims[0], count, batch), spatial_shapes, *merged)
        return output.unflatten(0, (count, batch)), 0


class _BackwardFunction(torch.autograd.Function):
    """The backward operators, likewise."""

    @staticmethod
    def forward(grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *inputs: Tensor) -> Any:
        """Backward operator on ``grad_output``, ``value`` and ``inputs``."""
        return _backward_operator(inputs)(grad_output, value, spatial_shapes, *inputs)

    setup_context = staticmethod(_setup_second_context)
    backward = staticmethod(_second_backward)

    @staticmethod
    def vmap(
        info: Any, dims: Any, grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *inputs: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """All inputs in one call."""
        count, batch = info.batch_size, _batch_size(value, dims[1])
        tensors = zip((grad_output, value, *inputs), (*dims[:2], *dims[3:]), strict=True)
        grad_output, value, *inputs_of_all = (_merge(x, dim, count, batch) for x, dim in tensors)
        grads = _BackwardFunction.apply(grad_output, value, spatial_shapes, *inputs_of_all)
        return tuple(grad.unflatten(0, (count, batch)) for grad in grads), (0, 0, 0)


for _name in ("mask2former::ms_deform_attn", "mask2former::ms_deform_attn_fused"):
    torch.library.register_fake(_name, _fake)
    torch.library.register_autograd(_name, _backward, setup_context=_setup_context)
    torch.library.register_fake(f"{_name}_backward", _fake_backward)
    torch.library.register_autograd(f"{_name}_backward", _second_backward, setup_context=_setup_second_context)


# ------------------------------------------------------------------------------------------- results of masks


def _strip_size(maps: Tensor, low: Tensor) -> tuple[int, int]:
    return low.shape[0], maps.shape[2]


@torch.library.register_fake("mask2former::class_labels")
def _fake_labels(maps: Tensor, low: Tensor, high: Tensor, share: Tensor, class_probabilities: Tensor) -> Tensor:
    return maps.new_empty(_strip_size(maps, low), dtype=torch.int32)


@torch.library.register_fake("mask2former::class_scores")
def _fake_scores(
    maps: Tensor, low: Tensor, high: Tensor, share: Tensor, class_probabilities: Tensor, scores: Tensor
) -> None:
    return None


@register_flop_formula([torch.ops.mask2former.class_labels, torch.ops.mask2former.class_scores])
def _class_product_flops(
    maps: Sequence[int],
    low: Sequence[int],
    high: Sequence[int],
    share: Sequence[int],
    class_probabilities: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """For torch's counter, from shapes: two operations for each class, mask and pixel."""
    return 2 * math.prod(class_probabilities) * low[0] * maps[2]


@torch.library.register_fake("mask2former::mask_winners")
def _fake_winners(
    maps: Tensor, low: Tensor, high: Tensor, share: Tensor, rivals: Tensor, scores: Tensor
) -> tuple[Tensor, ...]:
    counts = (rivals.new_empty(rivals.shape) for _ in range(3))
    return (maps.new_empty(_strip_size(maps, low), dtype=torch.int32), *counts)


@torch.library.register_fake("mask2former::binary_masks")
def _fake_binary_masks(
    maps: Tensor, low: Tensor, high: Tensor, share: Tensor, places: Tensor, binary: Tensor
) -> tuple[Tensor, ...]:
    count, (rows, columns) = maps.shape[0], _strip_size(maps, low)
    return (
        maps.new_empty(count),
        maps.new_empty(count, dtype=torch.int64),
        maps.new_empty(count, columns, dtype=torch.bool),
        maps.new_empty(count, rows, dtype=torch.bool),
    )


# ------------------------------------------------------------------------------------------- position-wise layers


@torch.library.register_fake("mask2former::project_positions")
def _fake_project(x: Tensor, position: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:2], weight.shape[0]) for weight in weights]


@torch.library.register_fake("mask2former::project_positions_backward")
def _fake_project_backward(
    grads: list[Tensor], x: Tensor, position: Tensor, weights: list[Tensor], needed: list[bool]
) -> list[Tensor]:
    inputs = [x.shape, position.shape, *(weight.shape for weight in weights), *(weight.shape[:1] for weight in weights)]
    return [x.new_empty(shape) for shape, wanted in zip(inputs, needed, strict=True) if wanted]


@torch.library.register_fake("mask2former::add_and_feed_forward")
def _fake_feed_forward(
    x: Tensor, attended: Tensor, parameters: list[Tensor], eps1: float, eps2: float, with_sums: bool
) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in range(3 if with_sums else 1)]


@torch.library.register_fake("mask2former::add_and_feed_forward_backward")
def _fake_feed_forward_backward(
    grad: Tensor,
    sum1: Tensor,
    sum2: Tensor,
    attended: Tensor,
    parameters: list[Tensor],
    eps1: float,
    eps2: float,
    needed: list[bool],
) -> list[Tensor]:
    inputs = (grad, attended, *parameters)
    return [x.new_empty(x.shape) for x, wanted in zip(inputs, needed, strict=True) if wanted]


@register_flop_formula(torch.ops.mask2former.project_positions)
def _project_flops(x: Sequence[int], position: Sequence[int], weights: Any, *_: Any, **__: Any) -> int:
    """For torch's counter, from shapes: two operations for each weight and position."""
    return _product_flops(x, weights)


@register_flop_formula(torch.ops.mask2former.project_positions_backward)
def _project_backward_flops(
    grads: Any, x: Sequence[int], position: Sequence[int], weights: Any, needed: Sequence[bool], **_: Any
) -> int:
    """As many for gradients of what weights are multiplied with, and for those of weights that have one."""
    return _product_flops(x, weights) + _product_flops(x, itertools.compress(weights, needed[2:]))


@register_flop_formula(torch.ops.mask2former.add_and_feed_forward)
def _feed_forward_flops(x: Sequence[int], attended: Sequence[int], parameters: Any, *_: Any, **__: Any) -> int:
    return _product_flops(x, parameters)


@register_flop_formula(torch.ops.mask2former.add_and_feed_forward_backward)
def _feed_forward_backward_flops(
    grad: Sequence[int],
    sum1: Any,
    sum2: Any,
    attended: Any,
    parameters: Any,
    eps1: Any,
    eps2: Any,
    needed: Any,
    **_: Any,
) -> int:
    """Without those that make hidden features again, which is no work that has to be done."""
    return _product_flops(grad, parameters) + _product_flops(grad, itertools.compress(parameters, needed[2:]))


def _product_flops(x: Sequence[int], parameters: Iterable[Sequence[int]]) -> int:
    """Of products of rows x (B, S, C) and parameters, where those that are no matrices take none."""
    return 2 * math.prod(x[:2]) * sum(math.prod(shape) for shape in parameters if len(shape) == 2)


# ------------------------------------------------------------------------------------------- products


@torch.library.register_fake("mask2former::multiply")
def _fake_multiply(a: Tensor, b: Tensor, to: Tensor, add: bool) -> None:
    return None


@register_flop_formula(torch.ops.mask2former.multiply)
def _multiply_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[1]


# ------------------------------------------------------------------------------------------- convolutions


@torch.library.register_fake("mask2former::conv3x3")
def _fake_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _map_like(x, weight.shape[0])


@torch.library.register_fake("mask2former::conv3x3_backward_input")
def _fake_conv3x3_backward_input(grad: Tensor, weight: Tensor) -> Tensor:
    return _map_like(grad, weight.shape[1])


@torch.library.register_fake("mask2former::conv3x3_backward_weight")
def _fake_conv3x3_backward_weight(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1], 3, 3)


def _map_like(x: Tensor, channels: int) -> Tensor:
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


@register_flop_formula([torch.ops.mask2former.conv3x3, torch.ops.mask2former.conv3x3_backward_input])
def _conv3x3_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """For torch's counter, from shapes: those of a direct convolution, as of torch's own."""
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


@register_flop_formula(torch.ops.mask2former.conv3x3_backward_weight)
def _conv3x3_backward_weight_flops(grad: Sequence[int], x: Sequence[int], *_: Any, **__: Any) -> int:
    """Likewise."""
    return 2 * math.prod(grad) * x[1] * 9


# ------------------------------------------------------------------------------------------- masked attention


@torch.library.register_fake("mask2former::masked_attention")
def _fake_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _heads_like(query), query.new_empty(query.shape[:3])


@torch.library.register_fake("mask2former::masked_attention_backward")
def _fake_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, output: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_like(query), _heads_like(key), _heads_like(value)


def _heads_like(x: Tensor) -> Tensor:
    batch, heads, rows, channels = x.shape
    return x.new_empty(batch, rows, heads, channels).transpose(1, 2)


@register_flop_formula(torch.ops.mask2former.masked_attention)
def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Of queries with keys, and of the weights with as many values."""
    return 2 * 2 * math.prod(query) * key[2]


@register_flop_formula(torch.ops.mask2former.masked_attention_backward)
def _attention_backward_flops(grad: Sequence[int], query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Gradients of weights, queries, keys and values. Weights are made again, which is no work that has to be done."""
    return 4 * 2 * math.prod(query) * key[2]
