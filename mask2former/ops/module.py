"""Multi-scale deformable attention with its learned parts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .functional import ms_deform_attn_fused

__all__ = ["MSDeformAttn"]


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention module (Deformable DETR, section 4.1).

    Parameter names, shapes and initialisation are the published ones.

    Args:
        d_model: width of queries and values.
        n_levels: number of feature levels.
        n_heads: number of heads; must divide ``d_model``.
        n_points: sampling points for each head and level.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, but they are {d_model} and {n_heads}")
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, samples * 2)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point ``p`` of head ``m`` starts ``p + 1`` cells away from its query, each head in its own direction."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values  # on the unit square's border
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * steps[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to a few points around its reference point on every level.

        Args:
            query: (B, Q, C).
            reference_points: (B, Q, L, 2) or (1, Q, L, 2), normalised (x, y) in [0, 1].
            value: (B, S, C), the levels one after another.
            spatial_shapes: (height, width) of each level.
            padding_mask: (B, S), True where a position is padding and reads as zero.

        Returns:
            (B, Q, C).
        """
        return self.attend(query, reference_points, self.project(value, padding_mask), spatial_shapes)

    def project(self, value: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Values (B, S, M, D) of all heads, the first half of :meth:`forward`."""
        projected = self.value_proj(value)
        if padding_mask is not None:
            projected = projected.masked_fill(padding_mask[..., None], 0.0)
        return projected.unflatten(-1, (self.n_heads, -1))

    def attend(
        self, query: Tensor, reference_points: Tensor, value: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The second half of :meth:`forward`, for any part of the queries: ``value`` is what :meth:`project` made."""
        batch, queries, _ = query.shape
        shape = (batch, queries, self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        logits = self.attention_weights(query).view(shape)
        output = ms_deform_attn_fused(value, spatial_shapes, reference_points, offsets, logits)
        return self.output_proj(output)
