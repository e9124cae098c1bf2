"""Training and evaluation on a tiny data set: repeatable, resumable, stoppable; mistakes take one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage
from scripts import Program, program
from tiny_dataset import TinyNames, tiny_dataset
from tiny_nuclei_model import one_thread

from mask2former.engine import Recipe, evaluate_weights, load_recipe, train, trainer
from mask2former.engine.recipe import TestSet as EvaluatedSet  # pytest collects what is called Test*
from mask2former.errors import PREEMPTED, UserError

RECIPE = """\
VERSION: 2
MODEL:
  META_ARCHITECTURE: MaskFormer
  DEVICE: cpu
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {NAME: build_resnet_backbone, FREEZE_AT: 0}
  RESNETS:
    DEPTH: 50
    STRIDE_IN_1X1: False
    RES2_OUT_CHANNELS: 16
    WIDTH_PER_GROUP: 4
    STEM_OUT_CHANNELS: 16
    OUT_FEATURES: [res2, res3, res4, res5]
  SEM_SEG_HEAD:
    NAME: MaskFormerHead
    NUM_CLASSES: 3
    PIXEL_DECODER_NAME: MSDeformAttnPixelDecoder
    IN_FEATURES: [res2, res3, res4, res5]
    CONVS_DIM: 32
    MASK_DIM: 32
    NORM: GN
    TRANSFORMER_ENC_LAYERS: 1
    DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD: 64
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: multi_scale_pixel_decoder
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 10
    DEC_LAYERS: 3
    DIM_FEEDFORWARD: 64
    DROPOUT: 0.0
    CLASS_WEIGHT: 2.0
    MASK_WEIGHT: 5.0
    DICE_WEIGHT: 5.0
    TRAIN_NUM_POINTS: 256
    TEST: {INSTANCE_ON: True, PANOPTIC_ON: True, SEMANTIC_ON: True}
INPUT: {FORMAT: RGB, DATASET_MAPPER_NAME: coco_panoptic_lsj, IMAGE_SIZE: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATASETS:
  TRAIN: [tiny_panoptic]
  TEST: [tiny_panoptic]
DATALOADER: {NUM_WORKERS: 0}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.0001
  WEIGHT_DECAY: 0.05
  MAX_ITER: 6
  STEPS: [4]
  WARMUP_ITERS: 0
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: full_model, CLIP_VALUE: 0.01}
SEED: 1
"""
NO_EVALUATION = ("DATASETS.TEST", "()")


@pytest.fixture(scope="module", autouse=True)
def slow_machine_friendly() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def data(data_root: Path) -> Iterator[TinyNames]:
    with tiny_dataset(data_root) as names:
        yield names


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def tiny_recipe(recipe_file: Path, output_dir: Path, *options: str) -> Recipe:
    """The recipe with a line in metrics.json for every step."""
    output_dir.mkdir(exist_ok=True)
    recipe = load_recipe(str(recipe_file), ["OUTPUT_DIR", str(output_dir), *options])
    return replace(recipe, log_period=1)


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.json without times."""
    lines = [json.loads(line) for line in (output_dir / "metrics.json").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.endswith("time") and "/" not in key} for line in lines
    ]


def test_evaluates_every_so_many_steps_and_at_the_end(
    data: TinyNames, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(trainer, "evaluate", lambda *_: steps.append(get_event_storage().iter) or {})
    train(replace(tiny_recipe(recipe_file, tmp_path / "output", "TEST.EVAL_PERIOD", "2"), max_iter=5))
    assert steps == [1, 3, 5]  # after steps 1 and 3, and after all 5


def test_a_seed_repeats_a_run(data: TinyNames, recipe_file: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        seed_all_rng(1)
        train(replace(tiny_recipe(recipe_file, tmp_path / name, *NO_EVALUATION), max_iter=5))
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert [line["iteration"] for line in first] == [0, 1, 2, 3, 4]
    assert {"total_loss", "loss_ce", "loss_mask", "loss_dice", "loss_ce_0", "lr"} <= first[0].keys()
    assert first == second


def saved(output_dir: Path, name: str = "model_final") -> dict[str, Any]:
    return torch.load(output_dir / f"{name}.pth", weights_only=True)


def assert_same_bits(first: Path, second: Path) -> None:
    """Losses, learning rates, weights and the optimizer's state of two runs."""
    assert metrics(first) == metrics(second)
    ends = [saved(folder) for folder in (first, second)]
    states = [{**end["model"], **flat(end["trainer"]["optimizer"])} for end in ends]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def flat(optimizer: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{i} {name}": value for i, values in optimizer["state"].items() for name, value in values.items()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [1, -1])
def test_resumed_run_goes_on_where_it_stopped(
    data: TinyNames, recipe_file: Path, tmp_path: Path, workers: int, seed: int
) -> None:
    """With as many workers or others, other states of the generators and an evaluation in between: the same bits."""
    options = [*NO_EVALUATION, "SEED", str(seed), "MODEL.MASK_FORMER.DROPOUT", "0.1"]
    whole = tiny_recipe(recipe_file, tmp_path / "whole", *options, "SOLVER.CHECKPOINT_PERIOD", "3")
    train(whole)
    (tmp_path / "parts").mkdir()
    for name in ("model_0000002.pth", "last_checkpoint"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "parts")
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000002.pth")
    shutil.copy(tmp_path / "whole" / "metrics.json", tmp_path / "parts")
    cut_metrics(tmp_path / "parts" / "metrics.json", lines=3)
    parts = tiny_recipe(recipe_file, tmp_path / "parts", *options, "DATALOADER.NUM_WORKERS", str(workers))
    seed_all_rng(2)
    train(parts, resume=True)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    lines = metrics(tmp_path / "parts")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert lines[-1]["lr"] == pytest.approx(0.1 * lines[0]["lr"])
    assert all(torch.isfinite(torch.tensor(line["total_loss"])) for line in lines)
    trainer = saved(tmp_path / "parts")["trainer"]
    assert trainer["iteration"] == 5
    assert {int(state["step"]) for state in trainer["optimizer"]["state"].values()} == {6}

    assert train(parts, resume=True) == {}  # nothing is left to do, and nothing to evaluate
    *before, again = metrics(tmp_path / "parts")
    assert before == lines and again.items() <= lines[-1].items()


def cut_metrics(path: Path, lines: int) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def losses_of(recipe: Recipe, steps: int) -> list[dict[str, float]]:
    seed_all_rng(1)
    model = recipe.build_model().train()
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer)
    history = []
    for _, batch in zip(range(steps), recipe.build_train_loader(), strict=False):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        scheduler.step()
        history.append({name: loss.item() for name, loss in losses.items()})
    return history


@pytest.mark.slow
def test_lazy_config_trains_as_the_yaml_does(
    data: TinyNames, recipe_file: Path, repository: Path, tmp_path: Path
) -> None:
    wide = "MODEL.RESNETS.RES2_OUT_CHANNELS 256 MODEL.RESNETS.WIDTH_PER_GROUP 64 MODEL.RESNETS.STEM_OUT_CHANNELS 64"
    first = losses_of(load_recipe(str(recipe_file), wide.split()), 5)
    decoder, transformer = "model.sem_seg_head.pixel_decoder", "model.sem_seg_head.transformer_predictor"
    options = {
        f"{decoder}.conv_dim": 32,
        f"{decoder}.mask_dim": 32,
        f"{decoder}.transformer_dim_feedforward": 64,
        f"{decoder}.transformer_enc_layers": 1,
        f"{transformer}.in_channels": 32,
        f"{transformer}.hidden_dim": 32,
        f"{transformer}.mask_dim": 32,
        f"{transformer}.num_queries": 10,
        f"{transformer}.dim_feedforward": 64,
        f"{transformer}.dec_layers": 2,
        f"{transformer}.num_classes": 3,
        "model.sem_seg_head.num_classes": 3,
        "model.criterion.num_classes": 3,
        "model.criterion.num_points": 256,
        "model.criterion.matcher.num_points": 256,
        "dataloader.train.dataset": "tiny_panoptic",
        "dataloader.train.num_classes": 3,
        "dataloader.train.num_workers": 0,
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.mapper.augmentations.image_size": 64,
        "lr_scheduler.multiplier.scheduler.milestones": "[4]",
        "lr_scheduler.multiplier.scheduler.values": "[1.0,0.1]",
        "lr_scheduler.multiplier.scheduler.num_updates": 6,
        "lr_scheduler.multiplier.warmup_length": 0,
        "train.max_iter": 6,
        "train.seed": 1,
        "train.device": "cpu",
    }
    lazy = repository / "configs" / "lazy" / "coco" / "panoptic-segmentation" / "maskformer2_R50_bs16_50ep.py"
    second = losses_of(load_recipe(str(lazy), [f"{key}={value}" for key, value in options.items()]), 5)
    assert first == second


class ConstantEvaluator:
    """Results that no model has a part in."""

    def reset(self) -> None: ...

    def process(self, inputs: Any, outputs: Any) -> None: ...

    def evaluate(self) -> dict[str, Any]:
        return {"segm": {"AP": 40.0}}


def test_expected_results(recipe_file: Path, tmp_path: Path) -> None:
    recipe = replace(
        tiny_recipe(recipe_file, tmp_path),
        build_model=lambda: torch.nn.Linear(1, 1),
        test_sets=[EvaluatedSet("constant", lambda: [], ConstantEvaluator)],
    )
    assert evaluate_weights(replace(recipe, expected_results=[["segm", "AP", 40.4, 0.5]])) == {"segm": {"AP": 40.0}}
    with pytest.raises(SystemExit) as caught:
        evaluate_weights(replace(recipe, expected_results=[["segm", "AP", 40.6, 0.5]]))
    assert caught.value.code == 1
    with pytest.raises(UserError, match="EXPECTED_RESULTS has rows for bbox, but there are results for segm"):
        evaluate_weights(replace(recipe, expected_results=[["bbox", "AP", 40.0, 0.5]]))


@pytest.mark.parametrize(
    "options", [(), ("MODEL.MASK_FORMER.TEST.TILE_SIZE", "48", "MODEL.MASK_FORMER.TEST.TILE_OVERLAP", "16")]
)
def test_evaluation_makes_labels_where_no_one_reads_scores(
    data: TinyNames, recipe_file: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    recipe = tiny_recipe(recipe_file, tmp_path / "out", *options)
    model = recipe.build_model().eval()
    kinds: set[torch.dtype] = set()
    model.register_forward_hook(lambda _, __, outputs: kinds.update(output["sem_seg"].dtype for output in outputs))
    with_labels = trainer.evaluate(recipe, model)
    assert kinds == {torch.int32} and not model.inference.semantic_labels

    class UsersOwn(ConstantEvaluator):
        """It may read scores."""

        def evaluate(self) -> dict[str, Any]:
            return {"own": {}}

    kinds.clear()
    (test_set,) = recipe.test_sets
    own = replace(test_set, build_evaluator=lambda: DatasetEvaluators([test_set.build_evaluator(), UsersOwn()]))
    results = trainer.evaluate(replace(recipe, test_sets=[own]), model)
    assert kinds == {torch.float32}
    for task in ("sem_seg", "panoptic_seg"):
        assert results[task] == pytest.approx(with_labels[task], nan_ok=True)


@pytest.fixture
def train_net(
    repository: Path,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Program:
    """train_net.py as a function of its arguments: exit code and all it prints."""
    monkeypatch.chdir(tmp_path)
    return program(repository / "train_net.py", monkeypatch, capsys, ["--config-file", str(recipe_file)])


def assert_one_error(outcome: tuple[int, str], message: str) -> None:
    code, printed = outcome
    assert code == 1
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(f"error: .*{message}", errors[0]), errors
    assert "Traceback" not in printed


def test_train_and_evaluate(data: TinyNames, train_net: Program, tmp_path: Path) -> None:
    code, printed = train_net("SOLVER.MAX_ITER", "2")
    assert code == 0
    for metric in ("PQ", "AP", "mIoU"):
        assert metric in printed
    trained = json.loads((tmp_path / "output" / "metrics.json").read_text().splitlines()[-1])
    assert {"panoptic_seg/PQ", "segm/AP", "sem_seg/mIoU"} <= trained.keys()

    code, again = train_net("--eval-only", "MODEL.WEIGHTS", "output/model_final.pth")
    assert code == 0
    copied = [re.findall(r"copypaste: (.*)", text) for text in (printed, again)]
    assert copied[0] and copied[0] == copied[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "80"), "NUM_CLASSES is 80, but data set 'tiny_panoptic' has 3 classes"),
        (("DATASETS.TRAIN", "('tiny_panoptik',)"), "'tiny_panoptik' is not registered: did you mean 'tiny_panoptic'"),
        (("DATASETS.TRAIN", "('lost',)"), "'lost'.*lost.json.*DETECTRON2_DATASETS"),
        (("SOLVER.OPTIMIZER", "ADAM"), "SOLVER.OPTIMIZER"),
        (("--eval-only", "MODEL.WEIGHTS", "cut.pth"), r"cut.pth \([\d,]+ bytes\) can't be read"),
        (("--eval-only", "MODEL.WEIGHTS", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--eval-only", "DATASETS.TEST", "('nowhere',)"), "'nowhere' is not registered"),
    ],
)
def test_mistakes(data: TinyNames, train_net: Program, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    if "cut.pth" in options:
        torch.save({"model": {"a": torch.zeros(1000)}}, tmp_path / "cut.pth")
        os.truncate(tmp_path / "cut.pth", 2000)
    if "('lost',)" in options:
        from detectron2.data import DatasetCatalog

        DatasetCatalog.register("lost", lambda: [])
        MetadataCatalog.get("lost").set(json_file=str(tmp_path / "lost.json"), evaluator_type="coco")
    try:
        assert_one_error(train_net(*options), message)
    finally:
        if "('lost',)" in options:
            DatasetCatalog.remove("lost")
            MetadataCatalog.remove("lost")


# What a user's own file does, which registers a data set in every process of a run.
WRAPPER = """\
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {repository!r}]
import tiny_dataset
from mask2former.errors import command
from train_net import main

tiny_dataset._register(Path({root!r}))
if __name__ == "__main__":
    command(main)
"""


@pytest.fixture
def in_subprocess(repository: Path, data: TinyNames, data_root: Path, recipe_file: Path, tmp_path: Path) -> list[str]:
    """train_net.py's arguments for a subprocess that knows the tiny data set."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(tests=str(repository / "tests"), repository=str(repository), root=str(data_root)))
    return [str(wrapper), "--config-file", str(recipe_file)]


def run_in(folder: Path, repository: Path, words: list[str]) -> "subprocess.CompletedProcess[str]":
    """Python with these words after its name, to the end."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(repository),
        timeout=300,
        check=False,
    )


def environment(repository: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "PYTHONUNBUFFERED": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, PREEMPTED)])
def test_interrupt_saves_and_resume_goes_on(
    in_subprocess: list[str], train_net: Program, repository: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Ctrl-C in a terminal, and SIGTERM of a cluster's scheduler, reach the data loader's workers too."""
    options = [*NO_EVALUATION, "DATALOADER.NUM_WORKERS", "1"]
    process = subprocess.Popen(
        [sys.executable, *in_subprocess, *options, "SOLVER.MAX_ITER", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=environment(repository),
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "step 20/100000" in line:
                os.killpg(process.pid, number)
                break
        printed += process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == code, printed
    assert printed.count(f"interrupted by {number.name}: saving after this step; go on with --resume") == 1, printed
    assert "Traceback" not in printed
    last = (tmp_path / "output" / "last_checkpoint").read_text()
    step = torch.load(tmp_path / "output" / last, weights_only=True)["iteration"]
    assert last == f"model_{step:07d}.pth"

    code, printed = train_net("--resume", *options, "SOLVER.MAX_ITER", str(step + 3))
    assert code == 0
    assert f"Starting training from iteration {step + 1}" in printed
    assert metrics(tmp_path / "output")[-1]["iteration"] == step + 2


@pytest.mark.slow
def test_unreadable_picture_in_a_worker(
    in_subprocess: list[str], data_root: Path, repository: Path, tmp_path: Path
) -> None:
    picture = sorted((data_root / "images").iterdir())[0]
    content = picture.read_bytes()
    picture.write_bytes(content[:100])
    try:
        run = run_in(tmp_path, repository, [*in_subprocess, "DATALOADER.NUM_WORKERS", "1"])
    finally:
        picture.write_bytes(content)
    assert_one_error((run.returncode, run.stdout + run.stderr), picture.name)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "--num-processes"])
def test_two_processes_train_evaluate_and_resume(
    in_subprocess: list[str], repository: Path, tmp_path: Path, launcher: str
) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    before, after = (torchrun, []) if launcher == "torchrun" else ([], ["--num-processes", "2"])
    for steps, resume in ((2, []), (3, ["--resume"])):
        words = [*before, *in_subprocess, *after, *resume, "SOLVER.MAX_ITER", str(steps)]
        run = run_in(tmp_path, repository, words)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("copypaste: Task: panoptic_seg") == 1
    trained = [line["iteration"] for line in metrics(tmp_path / "output") if "total_loss" in line]
    assert trained == [1, 2]
    names = sorted(path.name for path in (tmp_path / "output").iterdir() if "tfevents" not in path.name)
    assert names == [
        "config.yaml",
        "inference",
        "last_checkpoint",
        "log.txt",
        "log.txt.rank1",
        "metrics.json",
        "metrics.png",
        "model_final.pth",
    ]
