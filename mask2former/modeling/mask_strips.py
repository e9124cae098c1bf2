"""Masks at the size of the results, some rows at a time, so that what is made of them stays in the cache.

Letters: ``N`` masks; ``h`` and ``w`` their size, ``H`` and ``W`` that of the results, ``R`` rows of a strip.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import KERNELS, MaskStrip

__all__ = ["mask_strips"]

Size = tuple[int, int]

# Values of a strip. In plain PyTorch on a CPU, few enough for its cache; the kernels keep none of them, and take more
# rows at a time. Elsewhere enough to keep a GPU busy and its memory free.
STRIP_VALUES = {"cpu": 1 << 22 if "cpu" in KERNELS else 1 << 20}
STRIP_VALUES_ELSEWHERE = 1 << 26


def mask_strips(logits: Tensor, padded_size: Size, valid_size: Size, size: Size) -> Iterator[tuple[slice, MaskStrip]]:
    """Resize masks as ``F.interpolate`` does, twice and strip by strip, the same but for rounding.

    Interpolation is linear in rows and in columns, so that columns can be made first, of those rows alone that the
    last step mixes.

    Args:
        logits: (N, h, w).
        padded_size: what they are resized to first.
        valid_size: rows and columns, from the top left, that are kept of that.
        size: what these are resized to.

    Yields:
        rows of the result, and masks (N, R, W) there.
    """
    height, width = size
    last = _taps(logits.shape[1], padded_size[0]).at(slice(0, valid_size[0]))
    before = None
    if valid_size[0] != height:
        before, last = last, _taps(valid_size[0], height)
    values = STRIP_VALUES.get(logits.device.type, STRIP_VALUES_ELSEWHERE)
    step = max(values // max(len(logits) * max(width, padded_size[1]), 1), 1)
    for start in range(0, height, step):
        strip = slice(start, min(start + step, height))
        taps = last.at(strip)
        needed, places = torch.cat([taps.low, taps.high]).unique(return_inverse=True)
        maps = logits[:, needed.to(logits.device)] if before is None else before.at(needed).mix(logits)
        maps = _resize_columns(_resize_columns(maps, padded_size[1])[..., : valid_size[1]], width)
        low, high = places.to(logits.device).chunk(2)
        yield strip, MaskStrip(maps, low, high, taps.share.to(logits))


class _Taps(NamedTuple):
    """Each row of a resized map as a mixture of two rows: (n) indices, indices, and shares of the second."""

    low: Tensor
    high: Tensor
    share: Tensor

    def at(self, rows: slice | Tensor) -> "_Taps":
        return _Taps(self.low[rows], self.high[rows], self.share[rows])

    def mix(self, maps: Tensor) -> Tensor:
        """Resized rows (N, n, w) of maps (N, h, w)."""
        return MaskStrip(maps, *(x.to(maps.device) for x in self)).logits


def _taps(size: int, resized: int) -> _Taps:
    """Bilinear interpolation between cell centres, those beyond the first and the last one clamped to them."""
    centres = (torch.arange(resized, dtype=torch.float32) + 0.5) * (size / resized) - 0.5
    centres = centres.clamp(min=0)
    low = centres.long().clamp(max=size - 1)
    return _Taps(low, (low + 1).clamp(max=size - 1), centres - low)


def _resize_columns(maps: Tensor, width: int) -> Tensor:
    if maps.shape[-1] == width:
        return maps
    return F.interpolate(maps, size=width, mode="linear", align_corners=False)
