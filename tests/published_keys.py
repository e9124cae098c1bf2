"""Names and shapes of published state dicts, in ``data/checkpoint_keys``."""

import gzip
import json
from pathlib import Path

from recipe_parts import build_without_memory, load

__all__ = ["built_keys", "published_keys"]


def published_keys(case: str) -> list[tuple[str, list[int]]]:
    """Name and shape of every weight, in their order, which an optimizer's state follows."""
    with gzip.open(Path(__file__).parent / "data" / "checkpoint_keys" / f"{case}.keys.json.gz", "rt") as file:
        return list(json.load(file).items())


def built_keys(recipe: str, options: list[str]) -> list[tuple[str, list[int]]]:
    """The same of the model that a recipe under ``configs`` builds, with config keys and values put in."""
    model = build_without_memory(load(recipe, *options))
    return [(name, list(value.shape)) for name, value in model.state_dict().items()]
