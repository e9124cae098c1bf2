"""Every LazyConfig makes what the YAML recipe of the same path makes."""

import dataclasses
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image
from recipe_parts import (
    CONFIGS,
    build_without_memory,
    describe_augmentations,
    describe_modules,
    groups_of_parameters,
    load,
    plain,
    schedule,
)
from torch import nn

from mask2former.data import build_mapper
from mask2former.data import loader as loader_module
from mask2former.engine import Recipe
from mask2former.evaluation import builder

FOLDERS = [
    "ade20k/semantic-segmentation",
    "cityscapes/semantic-segmentation",
    "coco/instance-segmentation",
    "coco/panoptic-segmentation",
]
NAMES = sorted(
    path.relative_to(CONFIGS).with_suffix("").as_posix()
    for folder in FOLDERS
    for path in (CONFIGS / folder).rglob("*.yaml")
    if not path.name.startswith("Base-")
)
Pair = tuple[Recipe, Recipe]


@pytest.fixture(scope="module", params=NAMES)
def recipes(request: pytest.FixtureRequest) -> Pair:
    """The YAML recipe and the LazyConfig."""
    return load(f"{request.param}.yaml"), load(f"lazy/{request.param}.py")


@pytest.fixture(scope="module")
def models(recipes: Pair) -> tuple[nn.Module, nn.Module]:
    """Their models, with shapes and no values."""
    return build_without_memory(recipes[0]), build_without_memory(recipes[1])


def test_every_recipe_of_these_data_sets_is_there() -> None:
    found = {path.relative_to(CONFIGS / "lazy").with_suffix("").as_posix() for path in CONFIGS.glob("lazy/**/*.py")}
    assert {name for name in found if not name.startswith("common/")} == set(NAMES)
    assert len(NAMES) == 27


def test_every_common_file_is_used() -> None:
    text = {path: path.read_text() for path in CONFIGS.glob("lazy/**/*.py")}
    for path in CONFIGS.glob("lazy/common/*.py"):
        assert any(f".{path.stem} import" in other for file, other in text.items() if file != path), path.name


def test_model(recipes: Pair, models: tuple[nn.Module, nn.Module]) -> None:
    """Names and shapes, and what every part was told: widths, losses and their weights, matching costs, inference."""
    first, second = models
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
    assert len(shapes[0]) > 400
    assert shapes[0] == shapes[1]
    assert describe_modules(first) == describe_modules(second)
    assert first.inference == second.inference
    # These are values of buffers, which the meta device lacks.
    yaml, lazy = (recipe.config for recipe in recipes)
    assert lazy.model.criterion.no_object_weight == yaml.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT
    assert list(lazy.model.pixel_mean) == yaml.MODEL.PIXEL_MEAN
    assert list(lazy.model.pixel_std) == yaml.MODEL.PIXEL_STD


def test_rates_and_decays_of_every_parameter(recipes: Pair, models: tuple[nn.Module, nn.Module]) -> None:
    optimizers = [recipe.build_optimizer(model) for recipe, model in zip(recipes, models, strict=True)]
    groups = [groups_of_parameters(*pair) for pair in zip(models, optimizers, strict=True)]
    assert len(groups[0]) > 250
    assert {(group["lr"], group["weight_decay"]) for group in groups[0].values()} == {
        (1e-4, 0.0),  # norms and embeddings
        (1e-4, 0.05),
        (1e-5, 0.05),  # the backbone
        *({(1e-5, 0.0)} if "swin" in recipes[0].weights or "SyncBN" in str(recipes[0].config) else {}),
    }
    assert groups[0] == groups[1]
    assert type(optimizers[0]) is type(optimizers[1])


def step_of(recipe: Recipe) -> list[torch.Tensor]:
    """Gradients and weights of a small model after a step with gradients that are far too large."""
    model = nn.ModuleDict({"backbone": nn.Linear(3, 2), "head": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    for index, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, 0.1 * index)
        parameter.grad = torch.full_like(parameter, 10.0**index)
    recipe.build_optimizer(model).step()
    return [value.detach() for parameter in model.parameters() for value in (parameter, parameter.grad)]


def test_step_and_clipping(recipes: Pair) -> None:
    first, second = (step_of(recipe) for recipe in recipes)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    norm = torch.cat([gradient.flatten() for gradient in first[1::2]]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-4)


def test_schedule(recipes: Pair) -> None:
    steps = [i * (recipes[0].max_iter - 1) // 20 for i in range(21)]
    milestones = recipes[0].config.SOLVER.STEPS if recipes[0].max_iter > 160000 else ()
    steps += [step for milestone in milestones for step in (milestone - 1, milestone)]
    rates = schedule(recipes[0], steps)
    assert rates[0] == 1
    assert rates[20] < 0.02
    assert schedule(recipes[1], steps) == pytest.approx(rates, rel=1e-9)


def test_loop(recipes: Pair) -> None:
    """Weights, steps, mixed precision, when is evaluated and saved, and so on."""
    first, second = (
        {
            field.name: plain(getattr(recipe, field.name))
            for field in dataclasses.fields(Recipe)
            if field.name not in ("config", "test_sets") and not field.name.startswith("build_")
        }
        for recipe in recipes
    )
    assert {"weights", "max_iter", "amp", "eval_period"} < first.keys()
    assert first == second


def recorded(function: str, calls: list[Any], result: Any) -> Callable[..., Any]:
    def record(*arguments: Any, **options: Any) -> Any:
        calls.append((function, arguments, options))
        return result

    return record


def loading(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the recipe's loaders ask this package and Detectron2 for; the mappers and samplers by their values."""
    calls: list[Any] = []
    picture = {"file_name": "picture.png"}
    for function, result in (
        ("load_training_dicts", [picture]),
        ("check_dataset", [picture]),
        ("BatchStream", None),
        ("build_detection_test_loader", types.SimpleNamespace()),
    ):
        monkeypatch.setattr(loader_module, function, recorded(function, calls, result))
    recipe.build_train_loader()
    for test_set in recipe.test_sets:
        test_set.build_loader()

    described = []
    for function, arguments, options in calls:
        if function == "load_training_dicts":
            names = [arguments[0]] if isinstance(arguments[0], str) else list(arguments[0])
            arguments, options = names, {"filter_empty": True, **options}
        if "mapper" in options:
            values = dict(vars(options["mapper"]))
            values["augmentations"] = describe_augmentations(values["augmentations"].augs)
            options["mapper"] = (type(options["mapper"]).__name__, values)
        if "sampler" in options:
            sampler = options["sampler"]([picture])
            options["sampler"] = (type(sampler).__name__, {"of": sampler._size, "shuffle": sampler._shuffle})
        described.append((function, plain(arguments), plain(options)))
    return described


def test_data(recipes: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets, batches, workers, the mappers' readers and values, and the lists of augmentations."""
    first, second = (loading(recipe, monkeypatch) for recipe in recipes)
    assert [call[0] for call in first] == [
        "load_training_dicts",
        "BatchStream",
        "check_dataset",
        "build_detection_test_loader",
    ]
    assert first == second
    assert [test_set.name for test_set in recipes[0].test_sets] == [test_set.name for test_set in recipes[1].test_sets]


def test_evaluators(recipes: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are built, with which arguments; their annotation files are not needed."""
    made: list[Any] = []
    for kind, tasks in builder.EVALUATOR_TYPES.items():
        replaced = tuple(
            dataclasses.replace(task, evaluator=recorded(task.evaluator.__name__, made, None)) for task in tasks
        )
        monkeypatch.setitem(builder.EVALUATOR_TYPES, kind, replaced)
    evaluators = []
    for recipe in recipes:
        made.clear()
        for test_set in recipe.test_sets:
            test_set.build_evaluator()
        evaluators.append(list(made))
    assert evaluators[0]
    assert evaluators[0] == evaluators[1]


def test_number_of_classes_is_said_once() -> None:
    config = load("lazy/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.py", "model.sem_seg_head.num_classes", "7")
    model, dataloader = config.config.model, config.config.dataloader
    assert build_without_memory(config).sem_seg_head.predictor.class_embed.out_features == 8
    assert {model.criterion.num_classes, dataloader.train.num_classes, dataloader.test.num_classes} == {7}


def test_other_lengths_keep_the_form_of_the_schedule() -> None:
    for name in ("coco/instance-segmentation/maskformer2_R50_bs16_50ep", NAMES[0]):
        whole = load(f"lazy/{name}.py")
        short = load(f"lazy/{name}.py", "train.max_iter", "1000")
        shares = [0.0, 0.3, 0.85, 0.9, 0.95, 0.97, 0.999]
        rates = [schedule(recipe, [round(share * recipe.max_iter) for share in shares]) for recipe in (whole, short)]
        assert rates[0] == pytest.approx(rates[1], rel=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("ade", "city")) and "R50" in name])
def test_mappers_of_label_maps_make_the_same_sample(name: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "picture.png")
    labels = generator.integers(0, 19, (9, 12), dtype=np.uint8).repeat(10, axis=0).repeat(10, axis=1)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    picture = {"file_name": str(tmp_path / "picture.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}
    samples = []
    for mapper in (
        build_mapper(load(f"{name}.yaml").config, True),
        instantiate(load(f"lazy/{name}.py").config.dataloader.train.mapper),
    ):
        np.random.seed(0)
        random.seed(0)
        samples.append(mapper(picture))
    assert samples[0]["image"].shape[0] == 3
    assert len(samples[0]["instances"]) > 3
    torch.testing.assert_close(samples[0]["image"], samples[1]["image"], rtol=0, atol=0)
    torch.testing.assert_close(samples[0]["instances"].gt_masks, samples[1]["instances"].gt_masks, rtol=0, atol=0)
