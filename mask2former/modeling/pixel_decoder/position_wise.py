"""What an encoder layer does with each position by itself, on a CPU.

The same as its modules do, gradients too, but for rounding. Some positions at a time go through all parts, so that what
is made of them stays in the cache, in memory that is used again, and gradients of weights are added up where they are.
Of a sum and its norm only the sum is kept for gradients, and nothing of hidden features, by far the largest part: they
are made again. Where no gradients are asked for, compiled kernels do it.

Letters: ``B`` batch, ``S`` positions, ``C`` channels, ``F`` hidden features, ``n`` positions of a chunk.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import KERNELS

__all__ = ["CHUNK_ROWS", "add_and_feed_forward", "is_fast", "project"]

# Positions; with 1024 hidden features 8 MB in float32. Products for gradients of weights are faster with more of them.
CHUNK_ROWS = 2048


def project(
    x: Tensor, position: Tensor, of_content: nn.Linear, of_places: tuple[nn.Linear, nn.Linear]
) -> tuple[Tensor, Tensor, Tensor]:
    """What one linear layer makes of x, and what two make of x and positions together.

    Args:
        x: (B, S, C); position: broadcasts to it.
        of_content: the layer that sees x alone.
        of_places: the layers that see the sum of both, which is not kept for gradients.

    Returns:
        a tensor (B, S, ...) of each layer.
    """
    parameters = _parameters(of_content, *of_places)
    if _have_kernels(x):
        return tuple(torch.ops.mask2former.project_positions(x, position, parameters[::2], parameters[1::2]))
    return _Project.apply(x, position.expand_as(x), *parameters)


def add_and_feed_forward(
    x: Tensor,
    attended: Tensor,
    output_layer: nn.Linear,
    norms: tuple[nn.LayerNorm, nn.LayerNorm],
    feed_forward: tuple[nn.Linear, nn.Linear],
) -> Tensor:
    """Add what was attended to and norm the sum; add what the feed-forward network makes of that and norm it again.

    Args:
        x: (B, S, C).
        attended: (B, S, C), before ``output_layer``.
        output_layer, norms, feed_forward: the parts; between the two layers of ``feed_forward`` is a ReLU.

    Returns:
        (B, S, C).
    """
    eps = (norms[0].eps, norms[1].eps)
    if _have_kernels(x):
        in_order = _parameters(output_layer, norms[0], *feed_forward, norms[1])
        result: Tensor = torch.ops.mask2former.add_and_feed_forward(x, attended, in_order, *eps)
        return result
    return _AddAndFeedForward.apply(eps, x, attended, *_parameters(output_layer, *norms, *feed_forward))


def is_fast(x: Tensor) -> bool:
    """Whether these functions are faster than modules of a layer are on some positions at a time."""
    return torch.is_grad_enabled() or _have_kernels(x)


def _have_kernels(x: Tensor) -> bool:
    return "cpu" in KERNELS and x.dtype == torch.float32 and not torch.is_grad_enabled()


class _Pair(NamedTuple):
    """Parameters of a linear layer or a norm; or their gradients, None where nobody needs them."""

    weight: Any
    bias: Any


class _Parts(NamedTuple):
    """Of what ``add_and_feed_forward`` uses."""

    output: _Pair
    norm1: _Pair
    norm2: _Pair
    linear1: _Pair
    linear2: _Pair


def _parameters(*modules: Any) -> list[Tensor]:
    return [parameter for module in modules for parameter in (module.weight, module.bias)]


def _pairs(tensors: Sequence[Any]) -> list[_Pair]:
    return [_Pair(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


def _chunks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """Indices of the chunks (n, ...) of a tensor (B, S, ...)."""
    for picture in range(x.shape[0]):
        for start in range(0, x.shape[1], CHUNK_ROWS):
            yield picture, slice(start, start + CHUNK_ROWS)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, position, *parameters)
        layers = _pairs(parameters)
        results = tuple(x.new_empty(*x.shape[:2], len(layer.bias)) for layer in layers)
        for chunk in _chunks(x):
            placed = x[chunk] + position[chunk]
            for rows, layer, result in zip((x[chunk], placed, placed), layers, results, strict=True):
                torch.addmm(layer.bias, rows, layer.weight.T, out=result[chunk])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable_gradients(_project_plainly, ctx.saved_tensors, ctx.needs_input_grad, grads)
        x, position, *parameters = ctx.saved_tensors
        content, offsets, weights = (layer.weight for layer in _pairs(parameters))
        sums = _zeros(parameters, ctx.needs_input_grad[2:])
        grad_x, grad_position = x.new_empty(x.shape), x.new_empty(x.shape)
        for chunk in _chunks(x):
            placed = x[chunk] + position[chunk]
            here = [grad[chunk] for grad in grads]
            for pair, rows, grad in zip(_pairs(sums), (x[chunk], placed, placed), here, strict=True):
                _add_gradients(pair, rows, grad)
            grad_placed = grad_position[chunk]
            torch.mm(here[1], offsets, out=grad_placed).addmm_(here[2], weights)
            torch.addmm(grad_placed, here[0], content, out=grad_x[chunk])
        return grad_x, grad_position, *sums


class _AddAndFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: Sequence[float], x: Tensor, attended: Tensor, *parameters: Tensor) -> Tensor:
        parts = _Parts(*_pairs(parameters))
        sum1, sum2, normed = (x.new_empty(x.shape) for _ in range(3))
        mean, rstd = (x.new_empty(*x.shape[:2], 1) for _ in range(2))  # of sum2
        [buffer] = _buffers(1, x, parts)
        for chunk in _chunks(x):
            torch.add(x[chunk], parts.output.bias, out=sum1[chunk])
            sum1[chunk].addmm_(attended[chunk], parts.output.weight.T)
            normed1 = F.layer_norm(sum1[chunk], x.shape[2:], *parts.norm1, eps[0])
            torch.add(normed1, parts.linear2.bias, out=sum2[chunk])
            sum2[chunk].addmm_(_make_hidden(normed1, parts, buffer), parts.linear2.weight.T)
            result = torch.native_layer_norm(sum2[chunk], x.shape[2:], *parts.norm2, eps[1])
            normed[chunk], mean[chunk], rstd[chunk] = result
        ctx.eps = eps
        # x, which the layer's attention keeps, too, is for gradients of gradients alone.
        ctx.save_for_backward(sum1, sum2, mean, rstd, x, attended, *parameters)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sum1, sum2, mean, rstd, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = functools.partial(_add_and_feed_forward_plainly, ctx.eps)
            return None, *_differentiable_gradients(plain, inputs, ctx.needs_input_grad[1:], grad)
        _, attended, *parameters = inputs
        parts, all_sums = _Parts(*_pairs(parameters)), _zeros(parameters, ctx.needs_input_grad[3:])
        sums = _Parts(*_pairs(all_sums))
        grad_x, grad_attended = sum1.new_empty(sum1.shape), sum1.new_empty(sum1.shape)
        buffers = _buffers(2, sum1, parts)
        for chunk in _chunks(sum1):
            grad2 = _norm_backward(grad[chunk], sum2[chunk], mean[chunk], rstd[chunk], parts.norm2, sums.norm2)
            normed1, mean1, rstd1 = torch.native_layer_norm(sum1[chunk], sum1.shape[2:], *parts.norm1, ctx.eps[0])
            hidden = make_hidden_again(normed1, parts, buffers[0])
            _add_gradients(sums.linear2, hidden, grad2)
            grad_hidden = torch.mm(grad2, parts.linear2.weight, out=buffers[1][: len(grad2)])
            torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
            _add_gradients(sums.linear1, normed1, grad_hidden)
            grad_normed1 = grad2.addmm_(grad_hidden, parts.linear1.weight)
            grad1 = _norm_backward(grad_normed1, sum1[chunk], mean1, rstd1, parts.norm1, sums.norm1)
            _add_gradients(sums.output, attended[chunk], grad1)
            torch.mm(grad1, parts.output.weight, out=grad_attended[chunk])
            grad_x[chunk] = grad1
        return None, grad_x, grad_attended, *all_sums


def _project_plainly(x: Tensor, position: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    rows = (x, x + position, x + position)
    return tuple(F.linear(some, *layer) for some, layer in zip(rows, _pairs(parameters), strict=True))


def _add_and_feed_forward_plainly(eps: Sequence[float], x: Tensor, attended: Tensor, *parameters: Tensor) -> Tensor:
    parts, width = _Parts(*_pairs(parameters)), x.shape[2:]
    normed1 = F.layer_norm(x + F.linear(attended, *parts.output), width, *parts.norm1, eps[0])
    changes = F.linear(F.relu(F.linear(normed1, *parts.linear1)), *parts.linear2)
    return F.layer_norm(normed1 + changes, width, *parts.norm2, eps[1])


def _differentiable_gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor], needed: Sequence[bool], grads: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of those inputs that need one, which torch can differentiate again; that is rarely asked for."""
    inputs = [x.view_as(x) for x in inputs]  # of which none is made of another
    wanted = [x for x, wants in zip(inputs, needed, strict=True) if wants]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if wants else None for wants in needed)


def _buffers(count: int, x: Tensor, parts: _Parts) -> Tensor:
    """Memory (count, n, F) for one chunk of x (B, S, C) after the other."""
    return x.new_empty(count, min(CHUNK_ROWS, x.shape[1]), len(parts.linear1.bias))


def _make_hidden(x: Tensor, parts: _Parts, buffer: Tensor) -> Tensor:
    """Hidden features (n, F) of x (n, C)."""
    return torch.addmm(parts.linear1.bias, x, parts.linear1.weight.T, out=buffer[: len(x)]).relu_()


def make_hidden_again(x: Tensor, parts: _Parts, buffer: Tensor) -> Tensor:
    """The same for gradients, which the benchmark doesn't count as work that has to be done."""
    return _make_hidden(x, parts, buffer)


def _zeros(parameters: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """What gradients of chunks are added to; None where they aren't needed."""
    return [torch.zeros_like(x) if wanted else None for x, wanted in zip(parameters, needed, strict=True)]


def _add_gradients(sums: _Pair, rows: Tensor, grad: Tensor) -> None:
    """Add those of a linear layer, which of ``rows`` (n, C) made something with the gradient ``grad`` (n, M)."""
    if sums.weight is not None:
        sums.weight.addmm_(grad.T, rows)
    if sums.bias is not None:
        sums.bias.add_(grad.sum(0))


def _norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: _Pair, sums: _Pair) -> Tensor:
    """The gradient of what a norm takes, x (n, C) with its mean and 1 / deviation; those of parameters are added."""
    needed = [True, sums.weight is not None, sums.bias is not None]
    backward = torch.ops.aten.native_layer_norm_backward
    grad_x, grad_weight, grad_bias = backward(grad, x, x.shape[-1:], mean, rstd, *norm, needed)
    if sums.weight is not None:
        sums.weight.add_(grad_weight)
    if sums.bias is not None:
        sums.bias.add_(grad_bias)
    return grad_x
