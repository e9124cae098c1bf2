"""Names and shapes of published state dicts, in ``data/checkpoint_keys``."""

import gzip
import json
from pathlib import Path

import torch
from detectron2.modeling import build_model

from mask2former.engine import load_config

__all__ = ["built_keys", "published_keys"]

REPOSITORY = Path(__file__).resolve().parent.parent


def published_keys(case: str) -> list[tuple[str, list[int]]]:
    """Name and shape of every weight, in their order, which an optimizer's state follows."""
    with gzip.open(REPOSITORY / "tests" / "data" / "checkpoint_keys" / f"{case}.keys.json.gz", "rt") as file:
        return list(json.load(file).items())


def built_keys(recipe: str, options: list[str]) -> list[tuple[str, list[int]]]:
    """The same of the model that a recipe under ``configs`` builds, with config keys and values put in."""
    cfg = load_config(str(REPOSITORY / "configs" / recipe), options)
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    return [(name, list(value.shape)) for name, value in model.state_dict().items()]
