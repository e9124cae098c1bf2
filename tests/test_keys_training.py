"""Every key of optimizer, schedule and training samples does what it does in the published code."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_keys import config, effect_of, with_values
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.projects.deeplab import build_lr_scheduler
from PIL import Image
from recipe_parts import load, schedule
from tiny_nuclei_model import tiny_config
from torch import nn

from mask2former.data.mapper import MAPPERS, build_mapper
from mask2former.engine import build_optimizer, load_recipe
from mask2former.engine.batch_scaling import scale_to_batch
from mask2former.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread_and_seed")

# ------------------------------------------------------------------------------------------- optimizer


@effect_of(
    "SOLVER.OPTIMIZER",
    "SOLVER.BASE_LR",
    "SOLVER.BACKBONE_MULTIPLIER",
    "SOLVER.WEIGHT_DECAY",
    "SOLVER.WEIGHT_DECAY_EMBED",
)
def test_optimizer_rates_and_decays() -> None:
    cfg = config(
        SOLVER__OPTIMIZER="SGD",
        SOLVER__BASE_LR=0.01,
        SOLVER__BACKBONE_MULTIPLIER=0.5,
        SOLVER__WEIGHT_DECAY=0.2,
        SOLVER__WEIGHT_DECAY_EMBED=0.3,
    )
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.SGD)
    rates = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates[model.backbone.res5[0].conv1.weight] == (0.005, 0.2)
    assert rates[model.sem_seg_head.predictor.class_embed.weight] == (0.01, 0.2)
    assert rates[model.sem_seg_head.predictor.query_feat.weight] == (0.01, 0.3)
    assert isinstance(build_optimizer(tiny_config(), model), torch.optim.AdamW)


@effect_of("SOLVER.CLIP_GRADIENTS.ENABLED", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE")
@pytest.mark.parametrize(
    ("clip_type", "expected"),
    [
        ("full_model", [1.5, 2.0]),  # both together have a norm of 5, which becomes 2.5
        ("value", [2.5, 2.5]),
        ("norm", [2.5, 2.5]),
        (None, [3.0, 4.0]),
    ],
)
def test_gradient_clipping(clip_type: str | None, expected: list[float]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
    clipping = {"ENABLED": clip_type is not None, "CLIP_TYPE": clip_type or "value", "CLIP_VALUE": 2.5}
    optimizer = build_optimizer(with_values({f"SOLVER.CLIP_GRADIENTS.{k}": v for k, v in clipping.items()}), model)
    for parameter, gradient in zip(model, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizer.step()
    assert [parameter.grad.item() for parameter in model] == pytest.approx(expected, rel=1e-4)


# Options for YAML recipes and for LazyConfigs.
NO_CLIPPING = (("SOLVER.CLIP_GRADIENTS.ENABLED", "False"), ("optimizer.clip_type", "null"))


@effect_of("SOLVER.SHARD_OPTIMIZER")
@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml", "SOLVER.SHARD_OPTIMIZER"),
        ("lazy/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.py", "optimizer.shard"),
    ],
)
def test_sharding(monkeypatch: pytest.MonkeyPatch, path: str, key: str) -> None:
    """The switch reaches the optimizer, which several processes share; test_engine_sharding.py has them."""
    built = []
    monkeypatch.setattr("mask2former.engine.sharding.ShardedOptimizer", lambda *given, **_: built.append(given[1]))
    model = nn.LayerNorm(4)
    assert type(load(path, key, "True").build_optimizer(model)) is torch.optim.AdamW  # of one process: nothing to share
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    for value in ("False", "True"):
        recipe = load(path, key, value, *NO_CLIPPING[path.endswith(".py")])
        recipe.build_optimizer(model)
    assert built == [torch.optim.AdamW]


@effect_of("SOLVER.AMP.ENABLED")
def test_mixed_precision(repository: Path) -> None:
    """The switch reaches the loop, which heeds it on CUDA devices."""
    recipe = str(repository / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml")
    assert load_recipe(recipe).amp
    assert not load_recipe(recipe, ["SOLVER.AMP.ENABLED", "False"]).amp


def test_polynomial_schedule() -> None:
    """The schedule of the ADE20K and Cityscapes recipes: (1 - step / last) ** 0.9, no warm-up."""
    cfg = config(SOLVER__LR_SCHEDULER_NAME="WarmupPolyLR", SOLVER__MAX_ITER=100, SOLVER__WARMUP_ITERS=0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for step in range(100):
        assert optimizer.param_groups[0]["lr"] == pytest.approx((1 - step / 100) ** 0.9, rel=1e-6)
        optimizer.step()
        scheduler.step()


# ----------------------------------------------------------------------------------------------- batch


@effect_of("SOLVER.ACCUMULATION_STEPS")
@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml", "SOLVER.ACCUMULATION_STEPS"),
        ("lazy/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.py", "train.accumulation_steps"),
    ],
)
def test_accumulation(path: str, key: str) -> None:
    """The number reaches the loop, whose tests are in test_engine_accumulation.py."""
    assert load(path).accumulation_steps == 1
    assert load(path, key, "2").accumulation_steps == 2


@effect_of("MODEL.MASK_FORMER.NORMALIZE_OVER_RANKS")
def test_normalization_over_ranks() -> None:
    """The switch reaches the losses; test_engine_accumulation.py has two processes."""
    assert not build_model(tiny_config()).criterion.normalize_over_ranks
    assert build_model(config(MODEL__MASK_FORMER__NORMALIZE_OVER_RANKS=True)).criterion.normalize_over_ranks


SEMANTIC = "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k"


@effect_of("SOLVER.REFERENCE_BATCH_SIZE", "SOLVER.IMS_PER_BATCH")
def test_numbers_for_another_batch_size() -> None:
    path = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
    cfg = load(path, "SOLVER.REFERENCE_BATCH_SIZE", "16", "SOLVER.IMS_PER_BATCH", "64").config
    solver = cfg.SOLVER
    assert solver.IMS_PER_BATCH == 64
    assert pytest.approx(4e-4) == solver.BASE_LR
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (92188, (81944, 88773), 2)
    assert (solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (1250, 1250)
    assert scale_to_batch(cfg) == cfg  # so that the config of a run's output folder says the same again
    unscaled = load(path, "SOLVER.IMS_PER_BATCH", "64").config.SOLVER
    assert (unscaled.BASE_LR, unscaled.MAX_ITER) == (1e-4, 368750)
    periods = ("SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "0")
    short = load(path, "SOLVER.REFERENCE_BATCH_SIZE", "16", "SOLVER.IMS_PER_BATCH", "64", *periods).config
    assert (short.SOLVER.CHECKPOINT_PERIOD, short.TEST.EVAL_PERIOD) == (1, 0)


@effect_of("SOLVER.REFERENCE_WORLD_SIZE")
def test_numbers_for_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    solver = load(f"{SEMANTIC}.yaml", "SOLVER.REFERENCE_WORLD_SIZE", "8").config.SOLVER
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (4, 640000)
    assert pytest.approx(2.5e-5) == solver.BASE_LR


def test_a_lazy_configs_numbers_for_another_batch_size() -> None:
    options = ("train.reference_batch_size", "16", "dataloader.train.total_batch_size", "8")
    path = "lazy/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.py"
    recipe = load(path, *options)
    assert recipe.max_iter == 737500
    assert recipe.config.optimizer.base_lr == pytest.approx(5e-5)
    assert (recipe.checkpoint_period, recipe.eval_period) == (10000, 10000)
    steps = [0, 655550, 655562, 710178, 710190, 737499]
    assert schedule(recipe, steps) == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("SOLVER.REFERENCE_BATCH_SIZE", "-1"), "SOLVER.REFERENCE_BATCH_SIZE is -1, expected"),
        (("SOLVER.REFERENCE_BATCH_SIZE", "8", "SOLVER.REFERENCE_WORLD_SIZE", "8"), "set one of them"),
        (("SOLVER.REFERENCE_WORLD_SIZE", "3"), "REFERENCE_WORLD_SIZE is 3, .* divides SOLVER.IMS_PER_BATCH, 16"),
    ],
)
def test_references_that_do_not_fit(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(f"{SEMANTIC}.yaml", *options)


# ----------------------------------------------------------------------------------------------- input


def augmentations(name: str, **values: Any) -> list[T.Augmentation]:
    return MAPPERS[name].augmentations(config(**values))


def of_type(name: str, augs: list[T.Augmentation]) -> list[Any]:
    return [aug for aug in augs if type(aug).__name__ == name]


@effect_of("INPUT.DATASET_MAPPER_NAME")
def test_mapper_by_name(caplog: pytest.LogCaptureFixture) -> None:
    kinds = {
        name: [type(aug).__name__ for aug in build_mapper(config(INPUT__DATASET_MAPPER_NAME=name)).augmentations.augs]
        for name in ("mask_former_semantic", "coco_instance_lsj")
    }
    assert kinds["mask_former_semantic"] == ["ResizeShortestEdge", "RandomFlip"]
    assert kinds["coco_instance_lsj"] == ["RandomFlip", "ResizeAndCrop"]


@effect_of("INPUT.IMAGE_SIZE", "INPUT.MIN_SCALE", "INPUT.MAX_SCALE")
def test_large_scale_jitter() -> None:
    augs = augmentations("coco_panoptic_lsj", INPUT__IMAGE_SIZE=40, INPUT__MIN_SCALE=0.5, INPUT__MAX_SCALE=3.0)
    sizes = set()
    for _ in range(200):
        transform = of_type("ResizeAndCrop", augs)[0].resize.get_transform(np.zeros((100, 100, 3), np.uint8))
        sizes.add(transform.new_h)
    assert min(sizes) >= 20 and max(sizes) <= 120
    assert min(sizes) < 25 and max(sizes) > 110
    augmented = T.AugInput(np.zeros((100, 70, 3), np.uint8))
    T.AugmentationList(augs)(augmented)
    assert augmented.image.shape == (40, 40, 3)


@effect_of("INPUT.COLOR_AUG_SSD")
def test_ssd_colour() -> None:
    off, on = (augmentations("mask_former_semantic", INPUT__COLOR_AUG_SSD=value) for value in (False, True))
    assert len(on) == len(off) + 1
    grey = np.full((8, 8, 3), 100, np.uint8)

    def colours(augs: list[T.Augmentation]) -> set[int]:
        values = set()
        for _ in range(20):
            augmented = T.AugInput(grey.copy())
            T.AugmentationList(augs)(augmented)
            values |= set(np.unique(augmented.image).tolist())
        return values

    assert colours(off) == {100}
    assert len(colours(on)) > 10


@effect_of("INPUT.CROP.ENABLED", "INPUT.CROP.TYPE", "INPUT.CROP.SIZE", "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA")
def test_crop_that_no_class_may_fill() -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 48:] = 1

    def largest_shares(limit: float) -> list[float]:
        crop = {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute", "INPUT__CROP__SIZE": [32, 32]}
        augs = augmentations(
            "mask_former_semantic",
            **crop,
            INPUT__CROP__SINGLE_CATEGORY_MAX_AREA=limit,
            INPUT__MIN_SIZE_TRAIN=[64],
            INPUT__MAX_SIZE_TRAIN=64,
        )
        shares = []
        for _ in range(30):
            augmented = T.AugInput(np.zeros((64, 64, 3), np.uint8), sem_seg=labels)
            T.AugmentationList(augs)(augmented)
            assert augmented.image.shape == (32, 32, 3)
            shares.append(np.bincount(augmented.sem_seg.ravel()).max() / augmented.sem_seg.size)
        return shares

    assert np.mean([share <= 0.8 for share in largest_shares(0.8)]) > 0.8  # ten tries, then any crop
    assert np.mean([share <= 0.8 for share in largest_shares(1.0)]) < 0.6
    assert not any("Crop" in type(aug).__name__ for aug in augmentations("mask_former_semantic"))


@effect_of("INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN")
def test_training_sizes() -> None:
    augs = augmentations("mask_former_semantic", INPUT__MIN_SIZE_TRAIN=[20, 60], INPUT__MAX_SIZE_TRAIN=80)
    sizes = set()
    for _ in range(20):
        augmented = T.AugInput(np.zeros((100, 200, 3), np.uint8))
        T.AugmentationList(augs)(augmented)
        sizes.add(augmented.image.shape[:2])
    assert sizes == {(20, 40), (40, 80)}


@effect_of("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.FORMAT", "INPUT.SIZE_DIVISIBILITY")
def test_samples(tmp_path: Path) -> None:
    red = np.zeros((50, 100, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "red.png")
    Image.fromarray(np.ones((50, 100), np.uint8)).save(tmp_path / "labels.png")
    record = {"file_name": str(tmp_path / "red.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}

    def sample(is_train: bool, **values: Any) -> dict[str, Any]:
        sizes = {"INPUT__MIN_SIZE_TRAIN": [50], "INPUT__MAX_SIZE_TRAIN": 100}
        return build_mapper(config(**sizes, **values), is_train)(record)

    assert sample(False, INPUT__MIN_SIZE_TEST=20, INPUT__MAX_SIZE_TEST=80)["image"].shape == (3, 20, 40)
    assert sample(False, INPUT__MIN_SIZE_TEST=60, INPUT__MAX_SIZE_TEST=80)["image"].shape == (3, 40, 80)
    for form, channel in (("RGB", 0), ("BGR", 2)):
        assert sample(True, INPUT__FORMAT=form)["image"].flatten(1).max(1).values.argmax() == channel
    assert sample(True)["image"].shape == (3, 50, 100)
    padded = sample(True, INPUT__SIZE_DIVISIBILITY=128)
    assert padded["image"].shape == (3, 128, 128)
    assert padded["instances"].gt_masks.shape == (1, 128, 128)
    assert int(padded["instances"].gt_masks.sum()) == 50 * 100
    assert padded["image"][:, 127, 127].tolist() == [128, 128, 128]


def test_unknown_optimizer() -> None:
    with pytest.raises(UserError, match="SOLVER.OPTIMIZER"):
        build_optimizer(config(SOLVER__OPTIMIZER="LION"), nn.Linear(1, 1))
