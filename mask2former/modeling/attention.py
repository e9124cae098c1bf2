"""Multi-head attention, the part that all transformer layers share.

Letters: ``B`` batch, ``Q`` queries, ``S`` keys, ``C`` channels, ``M`` heads.
"""

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops import linear, masked_attention

__all__ = ["MultiheadAttention", "initialize_matrices"]


class MultiheadAttention(nn.Module):
    """Attention with the parameter names of ``nn.MultiheadAttention``, batch first, one mask for all heads.

    Args:
        d_model: C, a multiple of ``num_heads``.
        num_heads: M.
        dropout: share of the attention weights that training leaves out.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise UserError(
                f"attention of width {d_model} can't be split into {num_heads} heads (MODEL.MASK_FORMER.NHEADS): "
                "make the width a multiple of them"
            )
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.out_proj.bias)
        initialize_matrices(self)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_bias: Tensor | None = None) -> Tensor:
        """Attend from query (B, Q, C) to key and value (B, S, C).

        ``attention_bias``, which broadcasts to (B, M, Q, S), is added to the logits: -inf where a query may not attend.
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )  # each (B, M, Q or S, C/M)
        if attention_bias is not None:
            attention_bias = attention_bias.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        attended = masked_attention(q, k, v, attention_bias, dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def initialize_matrices(module: nn.Module) -> None:
    """Xavier initialisation of every parameter of more than one dimension."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
