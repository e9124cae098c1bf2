"""Test-time augmentation, against each augmentation made by hand with Pillow and torch, and in ``train_net.py``."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import NoOpTransform, TransformList
from detectron2.modeling import META_ARCH_REGISTRY, DatasetMapperTTA
from PIL import Image
from tiny_dataset import TinyNames, tiny_dataset
from tiny_nuclei_model import build_tiny_model, one_thread, tiny_config, write_tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mask2former import SemanticSegmentorWithTTA
from mask2former.engine import Recipe, evaluate_weights, load_recipe, train
from mask2former.errors import UserError
from mask2former.evaluation import SemanticEvaluator

HEIGHT, WIDTH = 50, 70  # of the results
MIN_SIZES, MAX_SIZE = (48, 64), 80


@pytest.fixture(scope="module", autouse=True)
def slow_machine_friendly() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_tiny_model().eval()


@pytest.fixture
def cfg() -> CfgNode:
    cfg = tiny_config()
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE, cfg.TEST.AUG.FLIP = MIN_SIZES, MAX_SIZE, True
    return cfg


def make_picture(height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_sample() -> dict[str, Any]:
    image = torch.from_numpy(make_picture().transpose(2, 0, 1).copy())
    return {"image": image, "height": HEIGHT, "width": WIDTH, "file_name": "made.png"}


def resized(picture: np.ndarray, short: int, longest: int) -> np.ndarray:
    """The shorter side ``short`` pixels, or less where the longer one would be more than ``longest``; by Pillow."""
    height, width = picture.shape[:2]
    scale = min(short / min(height, width), longest / max(height, width))
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


def mean_by_hand(model: nn.Module, sample: dict[str, Any], flip: bool = True) -> torch.Tensor:
    """The mean of the scores of all resized pictures and their mirror images, kept all at once."""
    picture = sample["image"].permute(1, 2, 0).numpy()
    scores = []
    for short in MIN_SIZES:
        image = torch.from_numpy(resized(picture, short, MAX_SIZE).transpose(2, 0, 1).copy())
        for mirrored in (False, True)[: 1 + flip]:
            version = image.flip(2) if mirrored else image
            with torch.no_grad():
                output = model([{"image": version, "height": HEIGHT, "width": WIDTH}])[0]["sem_seg"]
            scores.append(output.flip(2) if mirrored else output)
    return torch.stack(scores).double().mean(0).float()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("flip", [True, False])
def test_equals_the_mean_made_by_hand(model: nn.Module, cfg: CfgNode, flip: bool) -> None:
    cfg.TEST.AUG.FLIP = flip
    sample = make_sample()
    outputs = SemanticSegmentorWithTTA(cfg, model)([sample])
    assert [set(output) for output in outputs] == [{"sem_seg"}]
    assert_close(outputs[0]["sem_seg"], mean_by_hand(model, sample, flip))
    assert (outputs[0]["sem_seg"] - model([sample])[0]["sem_seg"]).abs().max() > 1e-3
    assert set(sample) == {"image", "height", "width", "file_name"}


def test_pictures_of_equal_size_may_go_together(model: nn.Module, cfg: CfgNode) -> None:
    sizes = []
    handle = model.register_forward_pre_hook(lambda _, inputs: sizes.append([s["image"].shape[1:] for s in inputs[0]]))
    together = SemanticSegmentorWithTTA(cfg, model, batch_size=3)([make_sample()])[0]["sem_seg"]
    handle.remove()
    assert sizes == [[(48, 67)] * 2, [(57, 80)] * 2]  # the second shorter side would be 64, but 80 is the limit
    assert_close(together, mean_by_hand(model, make_sample()))


def test_labels_are_the_best_of_the_mean(model: nn.Module, cfg: CfgNode) -> None:
    with model.other_inference(semantic_labels=True):
        labels = SemanticSegmentorWithTTA(cfg, model)([make_sample()])[0]["sem_seg"]
        assert model.inference.semantic_labels
    scores = SemanticSegmentorWithTTA(cfg, model)([make_sample()])[0]["sem_seg"]
    assert labels.dtype == torch.int32 and torch.equal(labels.long(), scores.argmax(0))


def test_in_tiles(cfg: CfgNode) -> None:
    cfg.MODEL.MASK_FORMER.TEST.TILE_SIZE, cfg.MODEL.MASK_FORMER.TEST.TILE_OVERLAP = 48, 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = META_ARCH_REGISTRY.get("MaskFormer")(cfg).eval()
    assert_close(
        SemanticSegmentorWithTTA(cfg, model)([make_sample()])[0]["sem_seg"], mean_by_hand(model, make_sample())
    )


def test_only_semantic_results_are_made(model: nn.Module, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others could not be averaged, and would cost time and memory for every augmentation."""
    made = []
    forward = model.forward

    def remember(batch: Any) -> Any:
        outputs = forward(batch)
        made.extend(set(output) for output in outputs)
        return outputs

    monkeypatch.setattr(model, "forward", remember)
    SemanticSegmentorWithTTA(cfg, model)([make_sample()])
    assert made == [{"sem_seg"}] * 4
    assert set(model([make_sample()])[0]) == {"sem_seg", "panoptic_seg", "instances"}  # as before


class Segmentor(nn.Module):
    """Detectron2's way of a semantic head: each pixel's class from its colour alone."""

    def __init__(self, cfg: CfgNode, input_shape: Any) -> None:
        super().__init__()
        self.predict = nn.Conv2d(next(iter(input_shape.values())).channels, 3, 3, padding=1)

    def forward(self, features: dict[str, torch.Tensor], targets: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
        scores = self.predict(features["res2"])
        return nn.functional.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False), {}


def test_detectron2s_semantic_segmentor(cfg: CfgNode) -> None:
    from detectron2.modeling import build_backbone

    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(cfg)
        model = META_ARCH_REGISTRY.get("SemanticSegmentor")(
            backbone=backbone,
            sem_seg_head=Segmentor(cfg, backbone.output_shape()),
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
        ).eval()
    assert_close(
        SemanticSegmentorWithTTA(cfg, model)([make_sample()])[0]["sem_seg"], mean_by_hand(model, make_sample())
    )


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_reads_the_file_where_there_is_no_image(
    model: nn.Module, cfg: CfgNode, tmp_path: Path, image_format: str
) -> None:
    cfg.INPUT.FORMAT = image_format
    picture = make_picture()
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    image = picture if image_format == "RGB" else picture[:, :, ::-1]
    sample = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "height": 40, "width": 56}
    augmented = SemanticSegmentorWithTTA(cfg, model)
    read, given = augmented([{"file_name": str(path)}, sample])
    assert read["sem_seg"].shape == (2, 40, 56)
    assert torch.equal(read["sem_seg"], given["sem_seg"])


def test_from_values_and_around_a_parallel_model(model: nn.Module, cfg: CfgNode) -> None:
    parallel = DistributedDataParallel.__new__(DistributedDataParallel)  # needs no process group
    nn.Module.__init__(parallel)
    parallel.module = model
    mapper = DatasetMapperTTA(min_sizes=list(MIN_SIZES), max_size=MAX_SIZE, flip=True)
    built = SemanticSegmentorWithTTA(model=parallel, tta_mapper=mapper)
    assert not built.training
    assert torch.equal(
        built([make_sample()])[0]["sem_seg"], SemanticSegmentorWithTTA(cfg, model)([make_sample()])[0]["sem_seg"]
    )


class Counting(nn.Module):
    """A model whose scores say how often it was called; it notes how many of its earlier scores are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[int] = []
        self._given: list[weakref.ref[torch.Tensor]] = []

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.kept.append(sum(scores() is not None for scores in self._given))
        scores = torch.full((1, 2, 2), float(len(self.kept)))
        self._given.append(weakref.ref(scores))
        return [{"sem_seg": scores}]


def test_an_own_mapper_gives_the_versions_and_only_the_sum_is_kept(cfg: CfgNode) -> None:
    def five_times(sample: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**sample, "transforms": TransformList([NoOpTransform()])} for _ in range(5)]

    counting = Counting()
    scores = SemanticSegmentorWithTTA(cfg, counting, five_times)([make_sample()])[0]["sem_seg"]
    assert torch.equal(scores, torch.full((1, 2, 2), 3.0))
    assert counting.kept == [0, 1, 1, 1, 1]


def test_mistakes(model: nn.Module, cfg: CfgNode) -> None:
    with pytest.raises(UserError, match="TEST.AUG.MIN_SIZES is empty"):
        SemanticSegmentorWithTTA(cfg, model, lambda _: [])([make_sample()])

    class Instances(nn.Module):
        def forward(self, batch: Any) -> Any:
            return [{"instances": None}]

    with pytest.raises(UserError, match="needs semantic scores .*, but the model gives instances"):
        SemanticSegmentorWithTTA(cfg, Instances())([make_sample()])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path_factory.mktemp("tiny"), num_images=2) as names:
        yield names


def tiny_recipe(tmp_path: Path, *options: str) -> Recipe:
    recipe, _ = write_tiny_model(tmp_path)
    common = (
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES 3 DATASETS.TRAIN ('tiny_panoptic',) DATASETS.TEST ('tiny_panoptic',) "
        "INPUT.DATASET_MAPPER_NAME coco_panoptic_lsj INPUT.IMAGE_SIZE 64 SOLVER.MAX_ITER 1 SOLVER.IMS_PER_BATCH 1 "
        "DATALOADER.NUM_WORKERS 0 TEST.AUG.ENABLED True TEST.AUG.MIN_SIZES (48,64) TEST.AUG.MAX_SIZE 80"
    )
    return load_recipe(str(recipe), [*common.split(), "OUTPUT_DIR", str(tmp_path / "output"), *options])


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """The scores that evaluators got, by their output folder."""
    found: dict[str, list[torch.Tensor]] = {}
    process = SemanticEvaluator.process

    def remember(self: Any, inputs: Any, outputs: Any) -> None:
        found.setdefault(str(self._output_dir), []).extend(output["sem_seg"] for output in outputs)
        process(self, inputs, outputs)

    monkeypatch.setattr(SemanticEvaluator, "process", remember)
    return found


def test_evaluation(data: TinyNames, judged: dict[str, list[torch.Tensor]], tmp_path: Path) -> None:
    results = evaluate_weights(tiny_recipe(tmp_path))
    assert set(results) == {"panoptic_seg", "segm", "bbox", "sem_seg", "sem_seg_TTA"}
    assert 0 <= results["sem_seg_TTA"]["mIoU"] <= 100
    output = tmp_path / "output"
    names = {folder.name: {path.name for path in folder.iterdir()} for folder in output.iterdir() if folder.is_dir()}
    assert set(names) == {"inference", "inference_TTA"}
    assert names["inference_TTA"] == {"sem_seg_predictions.json", "sem_seg_evaluation.pth"}
    assert names["inference_TTA"] < names["inference"]
    plain, augmented = judged[str(output / "inference")], judged[str(output / "inference_TTA")]
    assert len(plain) == len(augmented) == 2
    assert (plain[0] - augmented[0]).abs().max() > 1e-3


def test_evaluation_on_several_data_sets(data: TinyNames, tmp_path: Path) -> None:
    again = "tiny_panoptic_again"
    DatasetCatalog.register(again, lambda: DatasetCatalog.get(data.panoptic))
    metadata = MetadataCatalog.get(data.panoptic).as_dict()
    MetadataCatalog.get(again).set(**{key: value for key, value in metadata.items() if key != "name"})
    try:
        results = evaluate_weights(tiny_recipe(tmp_path, "DATASETS.TEST", f"('{data.panoptic}', '{again}')"))
    finally:
        DatasetCatalog.remove(again)
        MetadataCatalog.remove(again)
    assert set(results) == {data.panoptic, again, f"{data.panoptic}_TTA", f"{again}_TTA"}
    assert set(results[f"{again}_TTA"]) == {"sem_seg"}


def test_training_evaluates_without_it(data: TinyNames, tmp_path: Path) -> None:
    """As published: it is a part of --eval-only."""
    (tmp_path / "output").mkdir()
    assert set(train(tiny_recipe(tmp_path))) == {"panoptic_seg", "segm", "bbox", "sem_seg"}


def test_off_by_default(tmp_path: Path) -> None:
    assert load_recipe(str(write_tiny_model(tmp_path)[0])).augmented_test is None


def test_without_semantic_results_or_truth(data: TinyNames, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TEST.AUG.ENABLED .* but MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False"):
        tiny_recipe(tmp_path, "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "False")
    with pytest.raises(UserError, match=rf"AUG.ENABLED .* but data set '{data.instances}' has no semantic ground"):
        tiny_recipe(tmp_path, "DATASETS.TEST", f"('{data.panoptic}', '{data.instances}')")


LAZY = """\
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.modeling import DatasetMapperTTA, build_model
from mask2former import SemanticSegmentorWithTTA
from mask2former.data import MaskFormerDatasetMapper, build_test_loader
from mask2former.evaluation import build_evaluator
from tiny_nuclei_model import tiny_config

def make_model(num_classes):
    cfg = tiny_config()
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = num_classes
    return build_model(cfg)

model = L(make_model)(num_classes=3)
mapper = L(MaskFormerDatasetMapper)(
    is_train=False, augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)], image_format="RGB"
)
dataloader = dict(
    test=L(build_test_loader)(dataset="tiny_panoptic", mapper=mapper),
    evaluator=L(build_evaluator)(
        dataset_name="${dataloader.test.dataset}", output_dir="${train.output_dir}/inference",
        semantic_on=True, panoptic_on=True, instance_on=True,
    ),
)
test_time_augmentation = L(SemanticSegmentorWithTTA)(
    tta_mapper=L(DatasetMapperTTA)(min_sizes=[48, 64], max_size=80, flip=True)
)
train = dict(
    output_dir="./output", init_checkpoint="", max_iter=1, amp=dict(enabled=False), seed=1, device="cpu",
    checkpointer=dict(period=1, max_to_keep=1), eval_period=0, log_period=1, expected_results=[],
)
"""


def test_lazy_config_equals_yaml(data: TinyNames, judged: dict[str, list[torch.Tensor]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = evaluate_weights(tiny_recipe(tmp_path))
    path = tmp_path / "recipe.py"
    path.write_text(LAZY)
    torch.manual_seed(0)
    second = evaluate_weights(load_recipe(str(path), [f"train.output_dir={tmp_path / 'lazy'}"]))
    assert second["sem_seg_TTA"] == pytest.approx(first["sem_seg_TTA"], nan_ok=True)
    folders = [str(tmp_path / name / "inference_TTA") for name in ("output", "lazy")]
    for expected, found in zip(*(judged[folder] for folder in folders), strict=True):
        assert torch.equal(expected, found)

    assert load_recipe(str(path), ["test_time_augmentation=null"]).augmented_test is None
    with pytest.raises(UserError, match=r"test_time_augmentation .* but dataloader.evaluator.semantic_on is False"):
        load_recipe(str(path), ["dataloader.evaluator.semantic_on=False"])
