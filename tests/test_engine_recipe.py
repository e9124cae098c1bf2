"""Config files of both kinds: what is wrong with them is said in one line, and both make the same recipe."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_model
from torch import nn

from mask2former.data import build_mapper
from mask2former.engine import Recipe, available_device, load_config, load_recipe
from mask2former.errors import UserError
from mask2former.evaluation import builder

PANOPTIC = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep"
INSTANCE = "coco/instance-segmentation/maskformer2_R50_bs16_50ep"


def error_of(path: Path, *options: str) -> str:
    """The message, one line, with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load_config(str(path), options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_recipe(repository: Path) -> Path:
    return repository / "configs" / f"{PANOPTIC}.yaml"


@pytest.fixture
def lazy_recipe(repository: Path) -> Path:
    return repository / "configs" / "lazy" / f"{PANOPTIC}.py"


class TestYaml:
    def test_unknown_key(self, tmp_path: Path, yaml_recipe: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text("VERSION: 2\nMODEL:\n  MASK_FORMER:\n    NUM_OBJECT_QUERYS: 5\n")
        message = error_of(path)
        assert "unknown config key MODEL.MASK_FORMER.NUM_OBJECT_QUERYS" in message and str(path) in message
        assert "did you mean MODEL.MASK_FORMER.NUM_OBJECT_QUERIES" in message
        assert "did you mean SOLVER.BASE_LR" in error_of(yaml_recipe, "SOLVER.BASE_LRR", "1")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["SOLVER.BASE_LR"], "options must be KEY VALUE pairs, but are: SOLVER.BASE_LR"),
            (["SOLVER.BASE_LR", "1", "SEED"], "KEY VALUE pairs"),
            (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
            (["SEED.OF", "1"], "SEED.OF"),
            (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE must be cpu, cuda, .* but is 'gpu'"),
        ],
    )
    def test_options(self, yaml_recipe: Path, options: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_config(str(yaml_recipe), options)

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("MODEL: {WEIGHTS: [", "line 1"),
            ("VERSION: 2\nMODEL:\n  WEIGHTS: a\n WRONG: b\n", "line 4"),
            ("", "can't be read"),
            ("- a\n- b\n", "can't be read"),
            ("some text", "can't be read"),
            ("VERSION: 2\nMODEL: 3\n", "MODEL"),
            ("VERSION: 2\nSOLVER: {MAX_ITER: [1]}\n", "MAX_ITER"),
            ("VERSION: 9\n", "v9"),
            ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ],
    )
    def test_broken_file(self, tmp_path: Path, text: str, part: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        message = error_of(path)
        assert str(path) in message and part in message

    def test_code_in_a_file_is_refused_and_not_run(self, tmp_path: Path) -> None:
        path, marker = tmp_path / "recipe.yaml", tmp_path / "was run"
        path.write_text(f"VERSION: 2\nOUTPUT_DIR: !!python/object/apply:os.system ['touch {marker}']\n")
        assert "os.system" in error_of(path)
        assert not marker.exists()


@pytest.mark.parametrize("name", ["nowhere.yaml", "nowhere.py", ""])
def test_missing_file(name: str) -> None:
    with pytest.raises(UserError, match=f"config file {name or '.none.'} does not exist: give one with --config-file"):
        load_config(name)


class TestLazy:
    @pytest.mark.parametrize(
        "options",
        [
            ["train.max_iter", "7", "train.output_dir", "some/where", "dataloader.train.total_batch_size", "2"],
            ["train.max_iter=7", "train.output_dir=some/where", "dataloader.train.total_batch_size=2"],
        ],
    )
    def test_both_forms_of_options(self, lazy_recipe: Path, options: list[str]) -> None:
        recipe = load_recipe(str(lazy_recipe), options)
        assert (recipe.max_iter, recipe.output_dir) == (7, "some/where")
        assert recipe.config.dataloader.train.total_batch_size == 2
        assert recipe.config.dataloader.evaluator.output_dir == "some/where/inference"

    def test_values_with_an_equals_sign(self, lazy_recipe: Path) -> None:
        options = ["train.output_dir", "'lr=3'", "train.max_iter", "7"]
        assert load_config(str(lazy_recipe), options).train.output_dir == "lr=3"

    def test_argument_that_the_file_leaves_at_its_default(self, lazy_recipe: Path) -> None:
        config = load_config(str(lazy_recipe), ["model.inference.tile_size=256"])
        assert instantiate(config.model.inference).tile_size == 256

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["train.max_itr=7"], "unknown config key train.max_itr .*did you mean train.max_iter"),
            (["train.max_itr", "7"], "unknown config key train.max_itr .*did you mean train.max_iter"),
            (["model.inference.tile_sise=2"], "did you mean model.inference.tile_size"),
            (["train.max_iter.of=7"], "unknown config key train.max_iter.of"),
            (["train.max_iter"], "options must be KEY VALUE pairs, or KEY=VALUE each, but are: train.max_iter"),
            (["train.max_iter=[1"], "can't be read"),
            (["train.device=gpu"], "but is 'gpu'"),
        ],
    )
    def test_options(self, lazy_recipe: Path, options: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_config(str(lazy_recipe), options)

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("train = dict(", "syntax error"),
            ("from .nowhere import model\n", "nowhere.py does not exist"),
            ("import no_such_package\n", "no_such_package"),
            ("model = dict(a=1)\n", "train"),
        ],
    )
    def test_broken_file(self, tmp_path: Path, text: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
        # Detectron2 leaves its own import function in place where a file fails.
        monkeypatch.setattr("builtins.__import__", __import__)
        path = tmp_path / "recipe.py"
        path.write_text(text)
        message = error_of(path)
        assert str(path) in message and part in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_missing_gpu_means_cpu_and_one_line(
    yaml_recipe: Path, lazy_recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for recipe, option in ((yaml_recipe, "MODEL.DEVICE"), (lazy_recipe, "train.device")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mask2former"):
            assert load_recipe(str(recipe), [option, "cuda"]).device == "cpu"
        assert [record.getMessage() for record in caplog.records] == ["no cuda device is available: running on the CPU"]
    assert available_device("cpu") == "cpu"


def build_without_memory(recipe: Recipe) -> nn.Module:
    """The recipe's model with shapes and no values."""
    with torch.device("meta"):
        if not isinstance(recipe.config, CfgNode):
            return instantiate(recipe.config.model)
        cfg = recipe.config.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "meta"
        return build_model(cfg)


def settings(model: nn.Module) -> dict[str, Any]:
    """Class and plain attributes of every module."""
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    return {
        name: (
            type(module),
            {key: repr(value) for key, value in vars(module).items() if isinstance(value, plain) and key[0] != "_"},
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", [PANOPTIC, INSTANCE])
class TestLazyEqualsYaml:
    @pytest.fixture
    def recipes(self, repository: Path, name: str) -> tuple[Recipe, Recipe]:
        yaml_path, lazy_path = repository / "configs" / f"{name}.yaml", repository / "configs" / "lazy" / f"{name}.py"
        return load_recipe(str(yaml_path)), load_recipe(str(lazy_path))

    @pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
    def test_model_optimizer_and_schedule(self, recipes: tuple[Recipe, Recipe]) -> None:
        first, second = (build_without_memory(recipe) for recipe in recipes)
        shapes = [{name: tuple(x.shape) for name, x in model.state_dict().items()} for model in (first, second)]
        assert len(shapes[0]) > 500
        assert shapes[0] == shapes[1]
        assert settings(first) == settings(second)
        assert first.inference == second.inference
        yaml, lazy = (recipe.config for recipe in recipes)
        assert list(lazy.model.pixel_mean) == yaml.MODEL.PIXEL_MEAN
        assert list(lazy.model.pixel_std) == yaml.MODEL.PIXEL_STD

        rates, schedules = [], []
        for recipe, model in zip(recipes, (first, second), strict=True):
            optimizer = recipe.build_optimizer(model)
            names = {parameter: name for name, parameter in model.named_parameters()}
            of_parameters = {
                names[p]: {key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups
                for p in group["params"]
            }
            schedule: list[float] = []
            scheduler = recipe.build_scheduler(optimizer)
            for step in [*range(0, recipe.max_iter, 21000), 5, 327777, 327778, 355092]:
                scheduler.last_epoch = step - 1
                scheduler.step()
                schedule += [group["lr"] for group in optimizer.param_groups]
            rates.append((type(optimizer), of_parameters))
            schedules.append(schedule)
        assert rates[0] == rates[1]
        assert schedules[0] == pytest.approx(schedules[1], rel=1e-9)

    def test_loop(self, recipes: tuple[Recipe, Recipe]) -> None:
        first, second = (
            {
                field.name: getattr(recipe, field.name)
                for field in dataclasses.fields(Recipe)
                if field.name not in ("config", "test_sets") and not field.name.startswith("build_")
            }
            for recipe in recipes
        )
        assert first == second

    def test_data(self, recipes: tuple[Recipe, Recipe]) -> None:
        yaml, lazy = recipes[0].config, recipes[1].config.dataloader
        for is_train, loader in ((True, lazy.train), (False, lazy.test)):
            mappers = build_mapper(yaml, is_train), instantiate(loader.mapper)
            assert repr(mappers[0].augmentations) == repr(mappers[1].augmentations)
            for attribute in ("is_train", "image_format", "annotation_reader"):
                assert getattr(mappers[0], attribute) == getattr(mappers[1], attribute)
            assert loader.num_classes == yaml.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            assert loader.num_workers == yaml.DATALOADER.NUM_WORKERS
        assert ((lazy.train.dataset,), lazy.train.total_batch_size, lazy.train.seed) == (
            yaml.DATASETS.TRAIN,
            yaml.SOLVER.IMS_PER_BATCH,
            yaml.SEED,
        )
        # Left at the loader's defaults by the LazyConfig.
        assert yaml.DATALOADER.FILTER_EMPTY_ANNOTATIONS and yaml.DATALOADER.ASPECT_RATIO_GROUPING
        assert [test_set.name for test_set in recipes[0].test_sets] == [lazy.test.dataset]

    def test_evaluators(self, recipes: tuple[Recipe, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
        """Which are built, with which arguments; their annotation files are not needed."""
        made: list[tuple[Any, ...]] = []

        def recorder(evaluator: Any) -> Any:
            return lambda *arguments: made.append((evaluator, *arguments))

        for kind, tasks in builder.EVALUATOR_TYPES.items():
            replaced = tuple(dataclasses.replace(task, evaluator=recorder(task.evaluator)) for task in tasks)
            monkeypatch.setitem(builder.EVALUATOR_TYPES, kind, replaced)
        evaluators = []
        for recipe in recipes:
            made.clear()
            for test_set in recipe.test_sets:
                test_set.build_evaluator()
            evaluators.append(list(made))
        assert evaluators[0] and evaluators[0] == evaluators[1]
