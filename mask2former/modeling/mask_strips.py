"""Masks at the size of the results, some rows at a time, so that what is made of them stays in the cache.

Letters: ``N`` masks; ``h`` and ``w`` their size, ``H`` and ``W`` that of the results, ``R`` rows of a strip.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["mask_strips"]

Size = tuple[int, int]

# Values of a strip: on a CPU few enough for its cache, elsewhere enough to keep a GPU busy and its memory free.
STRIP_VALUES = {"cpu": 1 << 20}
STRIP_VALUES_ELSEWHERE = 1 << 26


def mask_strips(logits: Tensor, padded_size: Size, valid_size: Size, size: Size) -> Iterator[tuple[slice, Tensor]]:
    """Resize masks as ``F.interpolate`` does, twice and strip by strip, the same but for rounding.

    Interpolation is linear in rows and in columns, so that the rows of both steps can be made first, while the
    columns are few.

    Args:
        logits: (N, h, w).
        padded_size: what they are resized to first.
        valid_size: rows and columns, from the top left, that are kept of that.
        size: what these are resized to.

    Yields:
        rows of the result, and masks (N, R, W) there.
    """
    height, width = size
    rows = [_taps(logits.shape[1], padded_size[0], logits.device).cut(slice(0, valid_size[0]))]
    if valid_size[0] != height:
        rows.append(_taps(valid_size[0], height, logits.device))
    values = STRIP_VALUES.get(logits.device.type, STRIP_VALUES_ELSEWHERE)
    step = max(values // max(len(logits) * max(width, padded_size[1]), 1), 1)
    for start in range(0, height, step):
        strip = slice(start, min(start + step, height))
        maps = _resize_columns(_resize_rows(logits, rows, strip), padded_size[1])[..., : valid_size[1]]
        yield strip, _resize_columns(maps, width)


class _Taps(NamedTuple):
    """Each row of a resized map as a mixture of two rows: (n) indices, indices, and shares of the second."""

    low: Tensor
    high: Tensor
    share: Tensor

    def cut(self, rows: slice) -> "_Taps":
        return _Taps(self.low[rows], self.high[rows], self.share[rows])


def _taps(size: int, resized: int, device: torch.device) -> _Taps:
    """Bilinear interpolation between cell centres, those beyond the first and the last one clamped to them."""
    centres = (torch.arange(resized, dtype=torch.float32, device=device) + 0.5) * (size / resized) - 0.5
    centres = centres.clamp(min=0)
    low = centres.long().clamp(max=size - 1)
    return _Taps(low, (low + 1).clamp(max=size - 1), centres - low)


def _resize_rows(maps: Tensor, steps: Sequence[_Taps], strip: slice) -> Tensor:
    """Rows ``strip`` of maps (N, h, w) resized by one step after the other."""
    *before, last = steps
    taps = last.cut(strip)
    if before:
        first, end = int(taps.low[0]), int(taps.high[-1]) + 1
        maps = _resize_rows(maps, before, slice(first, end))
        taps = _Taps(taps.low - first, taps.high - first, taps.share)
    return torch.lerp(maps[:, taps.low], maps[:, taps.high], taps.share[:, None])


def _resize_columns(maps: Tensor, width: int) -> Tensor:
    if maps.shape[-1] == width:
        return maps
    return F.interpolate(maps, size=width, mode="linear", align_corners=False)
