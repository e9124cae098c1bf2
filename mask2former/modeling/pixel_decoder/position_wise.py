"""What an encoder layer does with each position by itself, on a CPU.

The same as its modules do, gradients too, but for rounding. Some positions at a time go through all parts, so that what
is made of them stays in the cache, in memory that is used again, and gradients of weights are added up where they are.
Of a sum and its norm only the sum is kept for gradients, and nothing of hidden features, by far the largest part: they
are made again, and so is what one layer hands to the next. Compiled operators do it where there are any, and what is
in ``_InChunks`` elsewhere.

Letters: ``B`` batch, ``S`` positions, ``C`` channels, ``F`` hidden features, ``n`` positions of a chunk.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import KERNELS
from ..made_again import can_be_made_again, made_again_if_it_can

__all__ = ["CHUNK_ROWS", "add_and_feed_forward", "is_fast", "project"]

# Positions; with 1024 hidden features 8 MB in float32. Products for gradients of weights are faster with more of them.
CHUNK_ROWS = 2048


def project(
    x: Tensor, position: Tensor, of_content: nn.Linear, of_places: tuple[nn.Linear, nn.Linear]
) -> tuple[Tensor, ...]:
    """What one linear layer makes of x, and what two make of x and positions together.

    Args:
        x: (B, S, C); position: broadcasts to it.
        of_content: the layer that sees x alone.
        of_places: the layers that see the sum of both, which is not kept for gradients.

    Returns:
        a tensor (B, S, ...) of each layer.
    """
    layers = (of_content, *of_places)
    parameters = (*(layer.weight for layer in layers), *(layer.bias for layer in layers))
    with made_again_if_it_can(x):
        results: tuple[Tensor, ...] = _Project.apply(x, position, *parameters)
    return results


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
    parts = (output_layer, norms[0], *feed_forward, norms[1])
    parameters = [parameter for part in parts for parameter in (part.weight, part.bias)]
    eps = (norms[0].eps, norms[1].eps)
    with made_again_if_it_can(x, for_first_gradients=False):
        result, *kept = _AddAndFeedForward.apply(torch.is_grad_enabled(), eps, x, attended, *parameters)
    for sum2 in kept:  # the next layer need not keep what is made of it
        norm = norms[1]
        arguments = (norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        can_be_made_again(result, functools.partial(F.layer_norm, sum2.detach(), *arguments))
    return result


def is_fast(x: Tensor) -> bool:
    """Whether these functions are faster than modules of a layer are on some positions at a time."""
    return torch.is_grad_enabled() or _have_kernels(x)


def _have_kernels(x: Tensor) -> bool:
    return "cpu" in KERNELS and x.dtype == torch.float32


def _operators(x: Tensor) -> Any:
    return torch.ops.mask2former if _have_kernels(x) else _InChunks


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, position, *parameters)
        return tuple(_operators(x).project_positions(x, position, *_halves(parameters)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, position, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable_gradients(_project_plainly, ctx.saved_tensors, needed, grads)
        weights, _ = _halves(parameters)
        return _where(needed, _operators(x).project_positions_backward(grads, x, position, weights, needed))


class _AddAndFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, with_sums: bool, eps: tuple[float, float], x: Tensor, attended: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        result, *sums = _operators(x).add_and_feed_forward(x, attended, parameters, *eps, with_sums)
        ctx.eps = eps
        ctx.mark_non_differentiable(*sums[1:])
        ctx.set_materialize_grads(False)  # that of the sum would be zeros
        # x is for gradients of gradients alone.
        ctx.save_for_backward(*sums, x, attended, *parameters)
        return result, *sums[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        sum1, sum2, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            plain = functools.partial(_add_and_feed_forward_plainly, ctx.eps)
            return None, None, *_differentiable_gradients(plain, inputs, needed, grad)
        x, attended, *parameters = inputs
        backward = _operators(x).add_and_feed_forward_backward
        return None, None, *_where(needed, backward(grad, sum1, sum2, attended, parameters, *ctx.eps, needed))


class _InChunks:
    """The operators for all dtypes, from parts that torch has. Their arguments are in ``csrc/position_wise.cpp``."""

    @staticmethod
    def project_positions(
        x: Tensor, position: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> list[Tensor]:
        position = position.expand_as(x)
        results = [x.new_empty(*x.shape[:2], len(bias)) for bias in biases]
        for chunk in _chunks(x):
            for rows, weight, bias, result in zip(
                _rows_of_layers(x[chunk], position[chunk], len(weights)), weights, biases, results, strict=True
            ):
                torch.addmm(bias, rows, weight.T, out=result[chunk])
        return results

    @staticmethod
    def project_positions_backward(
        grads: Sequence[Tensor], x: Tensor, position: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor]:
        grad_x, grad_placed = x.new_empty(x.shape), x.new_empty(x.shape)
        biases = [weight[:, 0] for weight in weights]  # of their shapes
        sums = _zeros((*weights, *biases), needed[2:])
        every_position = position.expand_as(x)
        for chunk in _chunks(x):
            here = [grad[chunk] for grad in grads]
            all_rows = _rows_of_layers(x[chunk], every_position[chunk], len(weights))
            for pair, rows, grad in zip(zip(*_halves(sums), strict=True), all_rows, here, strict=True):
                _add_gradients(_Pair(*pair), rows, grad)
            torch.mm(here[1], weights[1], out=grad_placed[chunk]).addmm_(here[2], weights[2])
            torch.addmm(grad_placed[chunk], here[0], weights[0], out=grad_x[chunk])
        return _those([grad_x, grad_placed.sum_to_size(position.shape), *sums], needed)

    @staticmethod
    def add_and_feed_forward(
        x: Tensor, attended: Tensor, parameters: Sequence[Tensor], eps1: float, eps2: float, with_sums: bool
    ) -> list[Tensor]:
        parts, width = _Parts(*_pairs(parameters)), x.shape[2:]
        result, sum1, sum2 = (x.new_empty(x.shape) for _ in range(3))
        [buffer] = _buffers(1, x, parts)
        for chunk in _chunks(x):
            torch.add(x[chunk], parts.output.bias, out=sum1[chunk])
            sum1[chunk].addmm_(attended[chunk], parts.output.weight.T)
            normed1 = F.layer_norm(sum1[chunk], width, *parts.norm1, eps1)
            torch.add(normed1, parts.linear2.bias, out=sum2[chunk])
            sum2[chunk].addmm_(_make_hidden(normed1, parts, buffer), parts.linear2.weight.T)
            result[chunk] = F.layer_norm(sum2[chunk], width, *parts.norm2, eps2)
        return [result, sum1, sum2] if with_sums else [result]

    @staticmethod
    def add_and_feed_forward_backward(
        grad: Tensor,
        sum1: Tensor,
        sum2: Tensor,
        attended: Tensor,
        parameters: Sequence[Tensor],
        eps1: float,
        eps2: float,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        parts, width = _Parts(*_pairs(parameters)), grad.shape[2:]
        all_sums = _zeros(parameters, needed[2:])
        sums = _Parts(*_pairs(all_sums))
        grad_x, grad_attended = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
        buffers = _buffers(2, grad, parts)
        for chunk in _chunks(grad):
            _, *scaling2 = torch.native_layer_norm(sum2[chunk], width, None, None, eps2)
            grad2 = _norm_backward(grad[chunk], sum2[chunk], scaling2, parts.norm2, sums.norm2)
            normed1, *scaling1 = torch.native_layer_norm(sum1[chunk], width, *parts.norm1, eps1)
            hidden = make_hidden_again(normed1, parts, buffers[0])
            _add_gradients(sums.linear2, hidden, grad2)
            grad_hidden = torch.mm(grad2, parts.linear2.weight, out=buffers[1][: len(grad2)])
            torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
            _add_gradients(sums.linear1, normed1, grad_hidden)
            grad_normed1 = grad2.addmm_(grad_hidden, parts.linear1.weight)
            grad1 = _norm_backward(grad_normed1, sum1[chunk], scaling1, parts.norm1, sums.norm1)
            _add_gradients(sums.output, attended[chunk], grad1)
            torch.mm(grad1, parts.output.weight, out=grad_attended[chunk])
            grad_x[chunk] = grad1
        return _those([grad_x, grad_attended, *all_sums], needed)


class _Pair(NamedTuple):
    """Parameters of a linear layer or a norm; or their gradients, None where nobody needs them."""

    weight: Any
    bias: Any


class _Parts(NamedTuple):
    """Of what ``add_and_feed_forward`` uses."""

    output: _Pair
    norm1: _Pair
    linear1: _Pair
    linear2: _Pair
    norm2: _Pair


def _pairs(tensors: Sequence[Any]) -> list[_Pair]:
    return [_Pair(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


def _halves(tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Weights and biases of several layers."""
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def _those(gradients: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    """Of all gradients those that are needed."""
    return [gradient for gradient, wanted in zip(gradients, needed, strict=True) if wanted]


def _where(needed: Sequence[bool], gradients: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that are needed in their places."""
    found = iter(gradients)
    return tuple(next(found) if wanted else None for wanted in needed)


def _chunks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """Indices of the chunks (n, ...) of a tensor (B, S, ...)."""
    for picture in range(x.shape[0]):
        for start in range(0, x.shape[1], CHUNK_ROWS):
            yield picture, slice(start, start + CHUNK_ROWS)


def _rows_of_layers(x: Tensor, position: Tensor, count: int) -> list[Tensor]:
    """What each of the layers sees that ``project`` calls."""
    return [x, *[x + position] * (count - 1)]


def _project_plainly(x: Tensor, position: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    weights, biases = _halves(parameters)
    return tuple(map(F.linear, _rows_of_layers(x, position, len(weights)), weights, biases))


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
    found = torch.autograd.grad(function(*inputs), _those(inputs, needed), grads, create_graph=True)
    return _where(needed, found)


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


def _norm_backward(grad: Tensor, x: Tensor, scaling: Sequence[Tensor], norm: _Pair, sums: _Pair) -> Tensor:
    """The gradient of what a norm takes, x (n, C) with its mean and 1 / deviation; those of parameters are added."""
    needed = [True, sums.weight is not None, sums.bias is not None]
    backward = torch.ops.aten.native_layer_norm_backward
    grad_x, grad_weight, grad_bias = backward(grad, x, x.shape[-1:], *scaling, *norm, needed)
    if sums.weight is not None:
        sums.weight.add_(grad_weight)
    if sums.bias is not None:
        sums.bias.add_(grad_bias)
    return grad_x
