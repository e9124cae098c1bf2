"""Sine position embedding of a feature map."""

import math

import torch
from torch import Tensor, nn

__all__ = ["PositionEmbeddingSine"]


class PositionEmbeddingSine(nn.Module):
    """Sines and cosines of a cell's row and column (DETR, appendix A.4).

    Args:
        num_pos_feats: channels for each of the two axes; the embedding has twice as many.
        temperature: ratio between the longest and the shortest wavelength.
        normalize: scale rows and columns to (0, ``scale``], so that maps of all sizes share one range.
        scale: the range in radians where ``normalize`` is set.
    """

    def __init__(
        self, num_pos_feats: int = 64, temperature: float = 10000.0, normalize: bool = False, scale: float = 2 * math.pi
    ) -> None:
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = scale

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """Embedding (1, 2 * num_pos_feats, height, width) in float32: channels of y first, then of x."""
        rows = torch.arange(1, height + 1, dtype=torch.float32, device=device)
        columns = torch.arange(1, width + 1, dtype=torch.float32, device=device)
        y = self._encode(rows, axis=0)[:, None].expand(-1, width, -1)
        x = self._encode(columns, axis=0)[None].expand(height, -1, -1)
        return torch.cat([y, x], dim=-1).permute(2, 0, 1)[None]

    def of_padded(self, padding: Tensor) -> Tensor:
        """Embedding (B, 2 * num_pos_feats, H, W) of maps whose cells are counted without padding.

        ``padding``: (B, H, W) bool, True = padding, at the bottom and the right.
        """
        rows, columns = ((~padding).cumsum(axis, dtype=torch.float32) for axis in (1, 2))
        embedding = torch.cat([self._encode(rows, axis=1), self._encode(columns, axis=2)], dim=-1)
        return embedding.permute(0, 3, 1, 2)

    def _encode(self, position: Tensor, axis: int) -> Tensor:
        """Sines and cosines (..., num_pos_feats) of positions (...), which count from 1 along ``axis``."""
        if self.normalize:
            last = position.narrow(axis, position.shape[axis] - 1, 1)
            position = position / (last + 1e-6) * self.scale
        index = torch.arange(self.num_pos_feats, dtype=torch.float32, device=position.device)
        wavelength = self.temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / self.num_pos_feats)
        angle = position[..., None] / wavelength
        return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
