"""Config files of both kinds: what is wrong with them is said in one line."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from mask2former.engine import available_device, load_config, load_recipe
from mask2former.errors import UserError

PANOPTIC = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep"


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


@pytest.mark.parametrize("options", [("SOLVER.STEPS", "(20,)"), ("SOLVER.LR_SCHEDULER_NAME", "WarmupLinearLR")])
def test_schedules_that_cannot_be_made(yaml_recipe: Path, options: tuple[str, str]) -> None:
    recipe = load_recipe(str(yaml_recipe), ["SOLVER.MAX_ITER", "20", *options])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(UserError, match=r"the schedule of .* MAX_ITER 20 and STEPS .* can't be made"):
        recipe.build_scheduler(optimizer)


SIZES = "VERSION: 2\nINPUT:\n  MIN_SIZE_TRAIN: !!python/object/apply:eval {}\n"


class TestListsWrittenAsPython:
    """As the published recipes write the sizes of training pictures."""

    @pytest.mark.parametrize(
        "text",
        ["[int(x * 0.1 * 512) for x in range(5, 21)]", "[int(0.5 * x) for x in range(10)]", "[7 for _ in range(3)]"],
    )
    def test_equals_eval(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(SIZES.format(f'["{text}"]'))
        assert list(load_config(str(path)).INPUT.MIN_SIZE_TRAIN) == eval(text)

    @pytest.mark.parametrize(
        "text",
        [
            "__import__('os').mkdir('ran')",
            "[__import__('os').mkdir('ran') for x in range(3)]",
            "[x for x in range(10**9)]",
            "[x for x in range(1000000000)]",
            "[int('1' * 9) for x in range(3)]",
            "[x for x in [1, 2]]",
            "[x if x else x for x in range(3)]",
            "[x for x in range(3) if x]",
            "[y for x in range(3)]",
            "[x for x in range(3)",
            "[int(1e999) for x in range(3)]",
            "(" * 500,
        ],
    )
    def test_no_code_is_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "recipe.yaml"
        path.write_text(SIZES.format(f'["{text}"]'))
        assert "which is not run: write the value itself" in error_of(path)
        path.write_text(SIZES.format(f'{{"{text}": 1}}'))
        error_of(path)
        assert not (tmp_path / "ran").exists()


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
