"""Convolutions: those of 3x3 weights and stride 1 have compiled kernels, which take a quarter of the products.

They do it in Winograd's way (Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, CVPR 2016), with
which results are the same but for rounding: errors are some times those of torch's own convolution, about a millionth
of a usual result. What isn't finite makes NaN of all results of its tile. All other convolutions are torch's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .extension import kernels_take

__all__ = ["conv2d"]

TILE_SIDE = 4  # results that are made together, in each direction
# Where fewer channels or tiles share the cost of what is done besides products, torch's convolution is faster.
FEWEST_CHANNELS = 32
FEWEST_TILES = 64
WEIGHTS_PER_TILE = 1024  # pairs of channels for which there has to be one tile more


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """As ``torch.nn.functional.conv2d``, of which it takes all arguments.

    Args:
        x: (B, C, H, W).
        weight: (K, C / groups, height, width).
        bias: (K).

    Returns:
        (B, K, ...).
    """
    same_size = tuple(stride) == tuple(padding) == tuple(dilation) == (1, 1) and groups == 1
    if not (same_size and kernels_take(x, weight, bias) and _is_worth_it(x, weight)):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if torch.is_grad_enabled():
        return _Conv3x3.apply(x, weight, bias)
    return torch.ops.mask2former.conv3x3(x, weight, bias)


def _is_worth_it(x: Tensor, weight: Tensor) -> bool:
    batch, channels, height, width = x.shape
    tiles = batch * -(-height // TILE_SIDE) * -(-width // TILE_SIDE)
    return (
        weight.shape[2:] == (3, 3)
        and min(channels, len(weight)) >= FEWEST_CHANNELS
        and tiles >= max(FEWEST_TILES, channels * len(weight) // WEIGHTS_PER_TILE)
    )


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result: Tensor = torch.ops.mask2former.conv3x3(x, weight, bias)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # torch's own has gradients, too
            ones, bias = (1, 1), [len(weight)] if ctx.needs_input_grad[2] else None
            backward = torch.ops.aten.convolution_backward
            grads = backward(grad, x, weight, bias, ones, ones, ones, False, (0, 0), 1, ctx.needs_input_grad)
            return tuple(grads)
        operators, (of_x, of_weight, of_bias) = torch.ops.mask2former, ctx.needs_input_grad
        return (
            operators.conv3x3_backward_input(grad, weight) if of_x else None,
            operators.conv3x3_backward_weight(grad, x) if of_weight else None,
            grad.sum((0, 2, 3)) if of_bias else None,
        )
