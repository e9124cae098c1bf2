"""Transformer encoder and decoder of DETR (Carion et al., ECCV 2020, appendix A.3), as in MaskFormer.

Position embeddings are added to queries and keys in every layer, never to values. Of the two places for a layer norm,
``pre_norm`` takes the input of each attention and feed-forward network, else the sum of its input and output.

Letters: ``B`` batch, ``C`` channels, ``L`` decoder layers, ``Q`` queries, ``S`` keys (cells of the feature map).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MultiheadAttention, initialize_matrices
from .checkpointing import LayerCheckpointing

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerEncoderOnly",
]


class TransformerLayer(nn.Module):
    """What layers of the encoder and the decoder share: the feed-forward network, and sums with norm and dropout.

    Parts are made in the published order, which the state of an optimizer follows.
    """

    linear1: nn.Module
    linear2: nn.Module

    def __init__(self, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def add(self, x: Tensor, change: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """``x`` plus what ``change`` makes of it."""
        if self.pre_norm:
            return x + self.dropout(change(norm(x)))
        return norm(x + self.dropout(change(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class TransformerEncoderLayer(TransformerLayer):
    """Cells attend to one another, then a feed-forward network.

    Args:
        d_model: C.
        nhead: attention heads.
        dim_feedforward: width of the feed-forward network.
        dropout: share of attention weights, hidden units and changes that training leaves out.
        pre_norm: where the norms are, see above.
    """

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1, pre_norm: bool = False
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, position: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map cells (B, S, C) with positions that broadcast to them; ``bias`` as in ``MultiheadAttention``."""

        def attend(cells: Tensor) -> Tensor:
            placed = cells + position
            return self.self_attn(placed, placed, cells, bias)

        x = self.add(x, attend, self.norm1)
        return self.add(x, self.feed_forward, self.norm2)


class TransformerDecoderLayer(TransformerLayer):
    """Queries attend to one another and to cells, then a feed-forward network; arguments as in the encoder's layer."""

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1, pre_norm: bool = False
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = MultiheadAttention(d_model, nhead, dropout)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Map queries (B, Q, C).

        Args:
            x, query_position: (B, Q, C).
            memory: (B, S, C); position: broadcasts to it.
            bias: added to the logits of the attention to memory, see ``MultiheadAttention``.
        """

        def attend_to_queries(queries: Tensor) -> Tensor:
            placed = queries + query_position
            return self.self_attn(placed, placed, queries)

        def attend_to_memory(queries: Tensor) -> Tensor:
            return self.multihead_attn(queries + query_position, memory + position, memory, bias)

        x = self.add(x, attend_to_queries, self.norm1)
        x = self.add(x, attend_to_memory, self.norm2)
        return self.add(x, self.feed_forward, self.norm3)


class TransformerEncoder(LayerCheckpointing):
    """Encoder layers, with one more norm at the end where they are pre-norm."""

    def __init__(
        self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(d_model, nhead, dim_feedforward, dropout, pre_norm) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model) if pre_norm else nn.Identity()

    def forward(self, x: Tensor, position: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map cells (B, S, C), see ``TransformerEncoderLayer``."""
        for layer in self.layers:
            x = self.run_layer(layer, x, position, bias)
        return self.norm(x)


class TransformerDecoder(LayerCheckpointing):
    """Decoder layers; one norm, shared, is applied to what each of them gives."""

    def __init__(
        self, num_layers: int, d_model: int, nhead: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(d_model, nhead, dim_feedforward, dropout, pre_norm) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(d_model)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, position: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Map queries (B, Q, C), see ``TransformerDecoderLayer``, to those after each layer, normed: (L, B, Q, C)."""
        outputs = []
        for layer in self.layers:
            x = self.run_layer(layer, x, query_position, memory, position, bias)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class TransformerEncoderOnly(nn.Module):
    """The encoder on a feature map.

    Args:
        d_model: C.
        nhead: attention heads.
        num_encoder_layers: 0 or more.
        dim_feedforward, dropout, pre_norm: see ``TransformerEncoderLayer``.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(num_encoder_layers, d_model, nhead, dim_feedforward, dropout, pre_norm)
        initialize_matrices(self)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Encode a map (B, C, H, W) with positions (1, C, H, W)."""
        encoded = self.encoder(_flatten(x), _flatten(position))
        return encoded.transpose(1, 2).unflatten(-1, x.shape[-2:])


class Transformer(nn.Module):
    """Encoder and decoder: queries, which start as zeros with a learned position, read a feature map.

    Args:
        d_model: C.
        nhead: attention heads.
        num_encoder_layers: 0 or more.
        num_decoder_layers: L, at least 1.
        dim_feedforward, dropout, pre_norm: see ``TransformerEncoderLayer``.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(num_encoder_layers, d_model, nhead, dim_feedforward, dropout, pre_norm)
        self.decoder = TransformerDecoder(num_decoder_layers, d_model, nhead, dim_feedforward, dropout, pre_norm)
        initialize_matrices(self)

    def forward(self, x: Tensor, position: Tensor, query_position: Tensor, padding: Tensor | None = None) -> Tensor:
        """Decode a feature map.

        Args:
            x: (B, C, H, W).
            position: (1 or B, C, H, W).
            query_position: (Q, C).
            padding: (B, H, W) bool, True = cells that nothing attends to.

        Returns:
            the queries after each decoder layer, normed: (L, B, Q, C).
        """
        memory, position = _flatten(x), _flatten(position)
        bias = None
        if padding is not None:
            blocked = padding.flatten(1)[:, None, None]  # (B, 1, 1, S)
            bias = memory.new_zeros(blocked.shape).masked_fill_(blocked, float("-inf"))
        memory = self.encoder(memory, position, bias)
        query_position = query_position[None].expand(len(x), -1, -1)
        return self.decoder(torch.zeros_like(query_position), query_position, memory, position, bias)


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, H*W, C)
