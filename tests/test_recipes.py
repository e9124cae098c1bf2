"""Recipes against the published ones: every key, and LazyConfigs against their YAML."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mask2former.config import get_default_config
from mask2former.engine import load_config

PUBLISHED = "published_coco_recipes.json.gz"


def published_recipes() -> dict[str, dict[str, Any]]:
    with gzip.open(Path(__file__).parent / "data" / PUBLISHED, "rt") as file:
        return json.load(file)


def value_of(cfg: Any, dotted_key: str) -> Any:
    for part in dotted_key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, tuple) else cfg


@pytest.mark.parametrize("recipe", sorted(published_recipes()))
def test_every_key_equals_the_published_recipe(recipe: str, repository: Path) -> None:
    cfg = load_config(str(repository / "configs" / recipe))
    different = {
        key: (value_of(cfg, key), value)
        for key, value in published_recipes()[recipe].items()
        if value_of(cfg, key) != value
    }
    assert different == {}


def test_own_keys_are_off_by_default() -> None:
    cfg = get_default_config()
    assert cfg.MODEL.MASK_FORMER.TEST.TILE_SIZE == 0
    assert cfg.MODEL.MASK_FORMER.TEST.MASK_NMS_THRESHOLD >= 1
    assert cfg.MODEL.MASK_FORMER.TEST.INSTANCE_SCORE_THRESHOLD == 0
    assert cfg.INPUT.SCALE_TEST == 0
