"""Every image recipe against the published one of the same path, and what is built from it."""

import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from recipe_parts import CONFIGS, build_without_memory, groups_of_parameters, load, schedule
from torch import nn

from mask2former.config import get_default_config
from mask2former.engine import Recipe

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    gzip.decompress((Path(__file__).parent / "data" / "published_recipes.json.gz").read_bytes())
)
IMAGE_RECIPES = sorted(recipe for recipe in PUBLISHED if not recipe.startswith("youtubevis_"))
MODEL_RECIPES = [recipe for recipe in IMAGE_RECIPES if "/Base-" not in recipe]
IMAGE_DATASETS = sorted({recipe.partition("/")[0] for recipe in IMAGE_RECIPES})


@functools.cache
def recipe_of(name: str) -> Recipe:
    """The recipe, loaded once for all tests."""
    return load(name)


def flatten(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; tuples as lists, which is how JSON has them."""
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
    values = flatten(recipe_of(recipe).config)
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


# Millions of parameters, as the paper gives them for COCO; other numbers of classes and queries change little.
SIZES = {"R50": 44, "R101": 63, "swin_tiny": 47, "swin_small": 69, "swin_base": 107, "swin_large": 216}


@pytest.mark.parametrize("recipe", MODEL_RECIPES)
def test_builds_the_model_with_its_optimizer(recipe: str) -> None:
    loaded = recipe_of(recipe)
    published = PUBLISHED[recipe]
    model = build_without_memory(loaded)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    expected = next(size for backbone, size in SIZES.items() if f"_{backbone}_" in recipe)
    assert millions == pytest.approx(expected, abs=0.6)
    predictor = model.sem_seg_head.predictor
    assert predictor.class_embed.out_features == published["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] + 1
    assert len(predictor.query_feat.weight) == published["MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"]
    norm = published.get("MODEL.RESNETS.NORM", "FrozenBN")
    sync_norms = sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    assert (sync_norms > 0) == (norm == "SyncBN" and "swin" not in recipe)

    optimizer = loaded.build_optimizer(model)
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = groups_of_parameters(model, optimizer)
    assert groups.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, group in groups.items():
        assert group["lr"] == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4)


@pytest.mark.parametrize("recipe", IMAGE_RECIPES)
def test_schedule(recipe: str) -> None:
    published = PUBLISHED[recipe]
    length, milestones = published["SOLVER.MAX_ITER"], published.get("SOLVER.STEPS", [])
    steps = [*range(0, length, length // 20), *(step for end in milestones for step in (end - 1, end)), length - 1]
    if milestones:
        expected = [0.1 ** sum(step >= milestone for milestone in milestones) for step in steps]
    else:
        assert published["SOLVER.LR_SCHEDULER_NAME"] == "WarmupPolyLR"
        expected = [(1 - step / length) ** 0.9 for step in steps]
    assert schedule(recipe_of(recipe), steps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("recipe", [recipe for recipe in IMAGE_RECIPES if "/Base-" in recipe])
def test_base_recipes_leave_the_model_to_others(recipe: str) -> None:
    """Alone, as the published ones do, they describe Detectron2's default model with this training."""
    loaded = recipe_of(recipe)
    model = build_without_memory(loaded)
    assert type(model).__name__ == "GeneralizedRCNN"
    assert loaded.build_optimizer(model).param_groups


def test_own_keys_are_off_by_default() -> None:
    cfg = get_default_config()
    assert cfg.MODEL.MASK_FORMER.TEST.TILE_SIZE == 0
    assert cfg.MODEL.MASK_FORMER.TEST.MASK_NMS_THRESHOLD >= 1
    assert cfg.MODEL.MASK_FORMER.TEST.INSTANCE_SCORE_THRESHOLD == 0
    assert cfg.INPUT.SCALE_TEST == 0
