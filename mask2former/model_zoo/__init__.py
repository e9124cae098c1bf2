"""The published models by name: weights as ``mask2former://name``, and predictors.

A name is the path of the model's recipe under ``configs/``, without ``.yaml``; MODEL_ZOO.md lists all, with figures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .handler import ModelZooHandler
from .table import PREFIX, Entry, entries, find
from .weights import cached_file, download_weights

if TYPE_CHECKING:
    from ..predictor import Predictor

__all__ = [
    "PREFIX",
    "Entry",
    "ModelZooHandler",
    "cached_file",
    "config_file",
    "download_weights",
    "entries",
    "find",
    "get",
    "names",
    "url",
]


def names() -> list[str]:
    """Names of all published models."""
    return [entry.name for entry in entries()]


def url(name: str) -> str:
    """Where a model's weights are published.

    Raises:
        UserError: if the zoo has no such model.
    """
    return find(name).url


def config_file(name: str) -> Path:
    """The recipe of a model, a YAML file.

    Raises:
        UserError: if the zoo has no such model, or the model segments videos, for which nothing is here yet.
    """
    entry = find(name)
    if entry.is_video:
        raise UserError(f"'{entry.name}' segments videos, which isn't here yet: its weights are at {entry.url}")
    return entry.config_file


def get(
    name: str,
    *,
    device: str | None = None,
    options: Sequence[str] = (),
    confidence_threshold: float | None = None,
    batch_size: int = 4,
) -> "Predictor":
    """A published model, ready to segment pictures; its weights are downloaded when they aren't there yet.

    Args:
        name: such as "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep".
        device, options, confidence_threshold, batch_size: see :class:`mask2former.predictor.Predictor`.

    Raises:
        UserError: if the zoo has no such model, it segments videos, or its weights can't be downloaded.
    """
    from ..predictor import Predictor  # which needs the training engine, and ``import mask2former`` does not

    config = config_file(name)
    return Predictor(
        config,
        download_weights(name),
        device=device,
        options=options,
        confidence_threshold=confidence_threshold,
        batch_size=batch_size,
    )
