"""Every image recipe against the published one of the same path: all keys, those it says nothing of included."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from detectron2.config import CfgNode

from mask2former.config import get_default_config
from mask2former.engine import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "published_recipes.json.gz").read_bytes())
)
IMAGE_RECIPES = sorted(recipe for recipe in PUBLISHED if not recipe.startswith("youtubevis_"))
IMAGE_DATASETS = sorted({recipe.partition("/")[0] for recipe in IMAGE_RECIPES})


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, tuples as lists, as JSON has them."""
    values: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return values


def bases_of(path: Path) -> list[Path]:
    """The files that a YAML file names as its bases."""
    bases = yaml.safe_load(path.read_text()).get("_BASE_", [])
    return [(path.parent / base).resolve() for base in ([bases] if isinstance(bases, str) else bases)]


def all_bases_of(path: Path) -> Iterator[Path]:
    """Those, and the bases that they have."""
    for base in bases_of(path):
        yield base
        yield from all_bases_of(base)


def test_all_of_the_published_image_recipes_are_compared() -> None:
    assert len(IMAGE_RECIPES) == 57
    assert IMAGE_DATASETS == ["ade20k", "cityscapes", "coco", "mapillary-vistas"]


@pytest.mark.parametrize("recipe", IMAGE_RECIPES)
def test_every_key_equals_the_published_recipe(recipe: str) -> None:
    values = flatten(load_config(str(CONFIGS / recipe), ["MODEL.DEVICE", "cpu"]))
    expected = flatten(get_default_config()) | PUBLISHED[recipe] | {"MODEL.DEVICE": "cpu"}
    different = {
        key: (values.get(key, "missing"), expected.get(key, "missing"))
        for key in values.keys() | expected.keys()
        if values.get(key, "missing") != expected.get(key, "missing")
    }
    assert different == {}


def test_no_other_file_lies_among_the_recipes() -> None:
    found = {
        path.relative_to(CONFIGS).as_posix() for dataset in IMAGE_DATASETS for path in (CONFIGS / dataset).rglob("*")
    }
    folders = {parent.as_posix() for recipe in IMAGE_RECIPES for parent in Path(recipe).parents}
    assert found - folders == set(IMAGE_RECIPES)


def test_every_base_file_is_used() -> None:
    used = {base for recipe in IMAGE_RECIPES for base in all_bases_of(CONFIGS / recipe)}
    assert {path.resolve() for path in (CONFIGS / "base").rglob("*.yaml")} <= used


def test_bases_say_nothing_twice() -> None:
    """A recipe, a few lines long, doesn't repeat what its bases say."""
    repeated = {}
    for recipe in IMAGE_RECIPES:
        path = CONFIGS / recipe
        bases: dict[str, Any] = {}
        for base in bases_of(path):
            bases |= flatten(CfgNode(CfgNode.load_yaml_with_base(str(base))))
        own = yaml.safe_load(path.read_text())
        own.pop("_BASE_")
        same = {key for key, value in flatten(CfgNode(own)).items() if key in bases and bases[key] == value}
        if same:
            repeated[recipe] = same
    assert repeated == {}


def test_own_keys_are_off_by_default() -> None:
    cfg = get_default_config()
    assert cfg.MODEL.MASK_FORMER.TEST.TILE_SIZE == 0
    assert cfg.MODEL.MASK_FORMER.TEST.MASK_NMS_THRESHOLD >= 1
    assert cfg.MODEL.MASK_FORMER.TEST.INSTANCE_SCORE_THRESHOLD == 0
    assert cfg.INPUT.SCALE_TEST == 0
