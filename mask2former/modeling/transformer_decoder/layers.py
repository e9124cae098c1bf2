"""Attention and feed-forward layers of the transformer decoder.

Every layer adds its result to its input. ``normalize_before`` norms the input (pre-norm), else the sum.
Letters: ``B`` batch, ``Q`` queries, ``S`` keys, ``C`` channels, ``M`` heads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "CrossAttentionLayer", "FFNLayer", "SelfAttentionLayer"]


class MultiheadAttention(nn.Module):
    """Attention with the parameter names of ``nn.MultiheadAttention``, batch first, one mask for all heads."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.zeros_(self.out_proj.bias)
        initialize_matrices(self)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_bias: Tensor | None = None) -> Tensor:
        """Attend from query (B, Q, C) to key and value (B, S, C), with (B, 1, Q, S) added to the logits."""
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )  # each (B, M, Q or S, C/M)
        if attention_bias is not None:
            attention_bias = attention_bias.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class SelfAttentionLayer(nn.Module):
    """Queries attend to one another."""

    def __init__(self, d_model: int, nhead: int, normalize_before: bool = False) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.normalize_before = normalize_before
        initialize_matrices(self)

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        """Map queries (B, Q, C) with their positions (B, Q, C) to (B, Q, C)."""
        value = self.norm(x) if self.normalize_before else x
        key = value + query_position
        x = x + self.self_attn(key, key, value)
        return x if self.normalize_before else self.norm(x)


class CrossAttentionLayer(nn.Module):
    """Queries attend to the cells of a feature map (masked attention, paper equation 2)."""

    def __init__(self, d_model: int, nhead: int, normalize_before: bool = False) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.normalize_before = normalize_before
        initialize_matrices(self)

    def forward(self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        """Map queries (B, Q, C) to (B, Q, C).

        Args:
            x: (B, Q, C); query_position: (B, Q, C).
            memory: (B, S, C); position: (1, S, C), added to the keys and not to the values.
            bias: (B, 1, Q, S), 0 where a query may attend and -inf where it may not.
        """
        query = (self.norm(x) if self.normalize_before else x) + query_position
        x = x + self.multihead_attn(query, memory + position, memory, bias)
        return x if self.normalize_before else self.norm(x)


class FFNLayer(nn.Module):
    """Two linear layers with a ReLU between them, query by query."""

    def __init__(self, d_model: int, dim_feedforward: int, normalize_before: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.normalize_before = normalize_before
        initialize_matrices(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Q, C) to (B, Q, C)."""
        hidden = self.norm(x) if self.normalize_before else x
        x = x + self.linear2(F.relu(self.linear1(hidden)))
        return x if self.normalize_before else self.norm(x)


class MLP(nn.Module):
    """Linear layers with a ReLU after each but the last."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-1])."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


def initialize_matrices(module: nn.Module) -> None:
    """Xavier initialisation of every parameter of more than one dimension."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
