"""Attention and feed-forward layers of the transformer decoder.

Every layer adds its result to its input. ``pre_norm`` norms the input (pre-norm), else the sum.
Letters: ``B`` batch, ``Q`` queries, ``S`` keys, ``C`` channels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from detectron2.layers import Conv2d
from fvcore.nn import weight_init
from torch import Tensor, nn

from ...ops import Linear
from ..attention import MultiheadAttention, initialize_matrices

__all__ = ["MLP", "CrossAttentionLayer", "FFNLayer", "SelfAttentionLayer", "input_projection"]


class SelfAttentionLayer(nn.Module):
    """Queries attend to one another."""

    def __init__(self, d_model: int, nhead: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm
        initialize_matrices(self)

    def forward(self, x: Tensor, query_position: Tensor) -> Tensor:
        """Map queries (B, Q, C) with their positions (B, Q, C) to (B, Q, C)."""
        value = self.norm(x) if self.pre_norm else x
        key = value + query_position
        x = x + self.self_attn(key, key, value)
        return x if self.pre_norm else self.norm(x)


class CrossAttentionLayer(nn.Module):
    """Queries attend to the cells of a feature map (masked attention, paper equation 2)."""

    def __init__(self, d_model: int, nhead: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(d_model, nhead)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm
        initialize_matrices(self)

    def forward(self, x: Tensor, query_position: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Map queries (B, Q, C) to (B, Q, C).

        Args:
            x: (B, Q, C); query_position: (B, Q, C).
            key: (B, S, C), cells with their positions; value: (B, S, C), without.
            bias: (B, 1, Q, S), 0 where a query may attend and -inf where it may not.
        """
        query = (self.norm(x) if self.pre_norm else x) + query_position
        x = x + self.multihead_attn(query, key, value, bias)
        return x if self.pre_norm else self.norm(x)


class FFNLayer(nn.Module):
    """Two linear layers with a ReLU between them, query by query."""

    def __init__(self, d_model: int, dim_feedforward: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.linear1 = Linear(d_model, dim_feedforward)
        self.linear2 = Linear(dim_feedforward, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm
        initialize_matrices(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Q, C) to (B, Q, C)."""
        hidden = self.norm(x) if self.pre_norm else x
        x = x + self.linear2(F.relu(self.linear1(hidden)))
        return x if self.pre_norm else self.norm(x)


class MLP(nn.Module):
    """Linear layers with a ReLU after each but the last."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-1])."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


def input_projection(in_channels: int, hidden_dim: int, enforce: bool) -> nn.Module:
    """A 1x1 convolution from the feature map's width to the decoder's, left out where they agree, unless enforced."""
    if in_channels == hidden_dim and not enforce:
        return nn.Sequential()
    projection = Conv2d(in_channels, hidden_dim, kernel_size=1)
    weight_init.c2_xavier_fill(projection)
    return projection
