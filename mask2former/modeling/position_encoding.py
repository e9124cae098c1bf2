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
        y = self._encode_axis(height, device)[:, :, None].expand(-1, -1, width)
        x = self._encode_axis(width, device)[:, None, :].expand(-1, height, -1)
        return torch.cat([y, x])[None]

    def _encode_axis(self, length: int, device: torch.device) -> Tensor:
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        if self.normalize:
            position = position / (length + 1e-6) * self.scale
        index = torch.arange(self.num_pos_feats, dtype=torch.float32, device=device)
        wavelength = self.temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / self.num_pos_feats)
        angle = position / wavelength[:, None]  # (num_pos_feats, length)
        return torch.stack([angle[0::2].sin(), angle[1::2].cos()], dim=1).flatten(0, 1)
