"""Attention with a mask that all heads share: compiled kernels on a CPU, else torch's own.

Letters: ``B`` batch, ``M`` heads, ``Q`` queries, ``S`` keys, ``D`` channels of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .extension import KERNELS, is_followed

__all__ = ["masked_attention"]

FEWEST_KEYS = 256  # of fewer torch's own is as fast


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``: softmax(query key^T / sqrt(D) + bias) value.

    Args:
        query: (B, M, Q, D).
        key, value: (B, M, S, D).
        attention_bias: broadcasts to (B, M, Q, S); -inf where a query may not attend.
        dropout: share of the weights that are left out.

    Returns:
        (B, M, Q, D).
    """
    if attention_bias is None or dropout or not _has_kernels(query, key, value, attention_bias):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_bias, dropout_p=dropout)
    if torch.is_grad_enabled():
        return _MaskedAttention.apply(query, key, value, attention_bias)
    result: Tensor = torch.ops.mask2former.masked_attention(query, key, value, attention_bias)[0]
    return result


def _has_kernels(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> bool:
    return (
        "cpu" in KERNELS
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (query, key, value, bias))
        and not is_followed()
        and not bias.requires_grad
        and bias.dim() == 4
        and bias.shape[1:] == (1, query.shape[2], key.shape[2])
        and key.shape[2] >= FEWEST_KEYS
        and query.shape[0] * query.shape[1] >= torch.get_num_threads()  # each head is one thread's
    )


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        result, log_sums = torch.ops.mask2former.masked_attention(query, key, value, bias)
        ctx.save_for_backward(query, key, value, bias, result, log_sums)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.mask2former.masked_attention_backward(grad, *ctx.saved_tensors), None
