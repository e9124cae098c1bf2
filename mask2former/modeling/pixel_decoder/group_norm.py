"""Group norms of a feature pyramid's maps on a CPU, and what follows them, with one map kept for gradients.

A norm keeps what it takes. What is made of that by adding and comparing alone is made again in the backward pass, in
less time than a convolution takes by far, where modules keep it, too: the finest maps are the model's largest.

Letters: ``B`` batch, ``C`` channels.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import is_followed
from ..made_again import can_be_made_again

__all__ = ["add_upsampled", "has_hooks", "is_plain_group_norm", "relu_of_norm", "upsample"]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module's call does more than its ``forward``."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def is_plain_group_norm(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether the functions here may do what a norm does with x for gradients: nothing comes between."""
    return (
        type(norm) is nn.GroupNorm
        and norm.affine
        and not has_hooks(norm)
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == norm.weight.dtype
        and any(x.is_contiguous(memory_format=layout) for layout in (torch.channels_last, torch.contiguous_format))
        and not (torch.is_autocast_enabled("cpu") or is_followed())
    )


def relu_of_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """The ReLU of what a plain group norm makes of x (B, C, H, W); see :func:`is_plain_group_norm`.

    It is not kept for gradients here, nor by functions in a block of :func:`made_again_if_it_can`.
    """
    arguments = (norm.weight, norm.bias, norm.num_groups, norm.eps)
    result = _ReluOfNorm.apply(x, *arguments)
    return can_be_made_again(result, partial(_relu_of_norm, x.detach(), *arguments))


def add_upsampled(x: Tensor, norm: nn.GroupNorm, coarse: Tensor, mode: str) -> Tensor:
    """What a plain group norm makes of x (B, C, H, W), and a coarser map, upsampled: their sum.

    It is not kept for gradients by functions in a block of :func:`made_again_if_it_can`.
    """
    result = upsample(coarse, x, mode).add_(norm(x))
    parts = (x.detach(), norm.weight, norm.bias, norm.num_groups, norm.eps, coarse.detach(), mode)
    return can_be_made_again(result, partial(_sum, *parts))


def upsample(coarse: Tensor, like: Tensor, mode: str) -> Tensor:
    """A coarse map in the size and dtype of another one."""
    coarse = coarse.to(like.dtype)
    return F.interpolate(coarse, size=like.shape[-2:], mode=mode, align_corners=False if mode == "bilinear" else None)


def _sum(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, coarse: Tensor, mode: str) -> Tensor:
    return upsample(coarse, x, mode).add_(F.group_norm(x, groups, weight, bias, eps))


def _relu_of_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.relu(F.group_norm(x, groups, weight, bias, eps), inplace=True)


class _ReluOfNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        normed, *scaling = _normed(x, weight, bias, groups, eps)
        ctx.groups, ctx.eps = groups, eps
        ctx.save_for_backward(x, weight, bias, *scaling)
        return normed.relu_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *scaling = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for gradients of gradients
            return *_differentiable_gradients((x, weight, bias), needed, ctx.groups, ctx.eps, grad), None, None
        grad_normed, *_ = _normed(x, weight, bias, ctx.groups, ctx.eps)  # in whose place its gradient comes
        torch.ops.aten.threshold_backward.grad_input(grad, grad_normed, 0, grad_input=grad_normed)
        backward = torch.ops.aten.native_group_norm_backward
        return *backward(grad_normed, x, *scaling, weight, *_sizes(x), ctx.groups, needed), None, None


def _normed(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
    """What is normed, and means and 1 / deviations (B, groups)."""
    return torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _differentiable_gradients(
    inputs: Sequence[Tensor], needed: Sequence[bool], groups: int, eps: float, grad: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, bias = inputs = [value.view_as(value) for value in inputs]
    wanted = [value for value, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(_relu_of_norm(x, weight, bias, groups, eps), wanted, grad, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)
