"""Products of matrices: of compiled kernels on CPUs where torch's are slower.

Those are CPUs with AVX512 that aren't Intel's, of which torch's library, mostly MKL, uses half.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extension import kernels_take

__all__ = ["Linear", "linear", "multiply", "product"]

FEWEST_PRODUCTS = 1 << 22  # of numbers, for which a function of Python's is worth it


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """Write a product to ``out``, or add it to what is there, without gradients.

    Args:
        a: (M, K).
        b: (K, N).
        out: (M, N).
        add: whether what is in ``out`` counts.
    """
    if kernels_take(a, b, out):
        torch.ops.mask2former.multiply(a, b, out, add)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (B, M, K) times b (B, K, N), without gradients: (B, M, N)."""
    if not kernels_take(a, b):
        return a @ b
    result = a.new_empty(*a.shape[:2], b.shape[2])
    for rows, columns, to in zip(a, b, result, strict=True):
        multiply(rows, columns, to)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``torch.nn.functional.linear``: x (..., C) and weight (K, C) give (..., K)."""
    # In this order: a compiler that follows is not to look at sizes.
    takes_kernels = kernels_take(x, weight, bias) and torch.ops.mask2former.has_faster_products()
    if not (takes_kernels and x.numel() * len(weight) >= FEWEST_PRODUCTS):
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return result.unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose products are :func:`linear`'s."""

    def forward(self, x: Tensor) -> Tensor:
        """As the class it is derived from."""
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        result = x.new_empty(len(x), len(weight)) if bias is None else bias.repeat(len(x), 1)
        multiply(x, weight.T, result, add=bias is not None)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        multiplied = torch.mm if torch.is_grad_enabled() else _product  # torch's has gradients, too
        return (
            multiplied(grad, weight) if of_x else None,
            multiplied(grad.T, x) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    return product(a[None], b[None])[0]
