"""Registrations, checks before the first step, and loaders."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from published_layouts import (
    HEIGHT,
    WIDTH,
    make_ade20k,
    make_mapillary_vistas,
    make_semantic,
    registered_at,
    save_picture,
    stripes,
)
from tiny_dataset import TinyNames, tiny_dataset

from mask2former.config import get_default_config
from mask2former.data import (
    MaskFormerDatasetMapper,
    build_mapper,
    build_test_loader,
    build_train_loader,
    check_dataset,
    load_dataset,
    register_panoptic,
)
from mask2former.data.annotations import read_panoptic
from mask2former.data.augmentation import large_scale_jitter
from mask2former.data.checks import count_classes
from mask2former.data.datasets import cityscapes, load_panoptic, panoptic_metadata, read_classes
from mask2former.data.panoptic_files import instances_to_panoptic
from mask2former.errors import UserError


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[TinyNames]:
    with tiny_dataset(tmp_path, num_images=5) as names:
        yield names


@pytest.fixture
def scratch_name() -> Iterator[str]:
    name = "test_data_datasets_scratch"
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog.list():
            catalog.remove(name)


def tiny_config(name: str, mapper: str = "coco_panoptic_lsj", num_classes: int = 3) -> CfgNode:
    cfg = get_default_config()
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATASETS.TEST = (name,)
    cfg.INPUT.DATASET_MAPPER_NAME = mapper
    cfg.INPUT.IMAGE_SIZE = 64
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = num_classes
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 5
    return cfg


# ------------------------------------------------------------------------------------------- registrations

PRINT_METADATA = """
import importlib, json
import mask2former.data.datasets as datasets
importlib.reload(datasets)  # importing twice does no harm
from detectron2.data import MetadataCatalog
print(json.dumps({name: MetadataCatalog.get(name).as_dict() for name in MetadataCatalog}))
"""


def test_metadata_without_any_file_equals_the_published(repository: Path) -> None:
    environment = {**os.environ, "DETECTRON2_DATASETS": "ROOT", "PYTHONPATH": str(repository)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRINT_METADATA], env=environment, capture_output=True, check=True
    )
    ours = json.loads(result.stdout)
    published = json.loads(gzip.decompress((repository / "tests/data/published_datasets.json.gz").read_bytes()))
    published = {name: value for name, value in published.items() if not name.startswith("ytvis")}
    assert len(published) == 16
    for name, attributes in published.items():
        assert ours[name].pop("name") == name
        assert ours[name] == attributes

    nuclei = ours["nuclei_train"]
    assert nuclei["thing_classes"] == ["nucleus"]
    assert nuclei["stuff_classes"] == ["nucleus", "background"]
    assert nuclei["thing_dataset_id_to_contiguous_id"] == {"1": 0}
    assert nuclei["stuff_dataset_id_to_contiguous_id"] == {"1": 0, "2": 1}
    assert nuclei["panoptic_json"] == "ROOT/nuclei/annotations/panoptic_train.json"
    assert nuclei["json_file"] == "ROOT/nuclei/annotations/train.json"
    assert nuclei["evaluator_type"] == "coco_panoptic_seg"


def test_detectron2s_own_data_sets_stay_as_they_are() -> None:
    metadata = MetadataCatalog.get("coco_2017_train_panoptic")
    assert len(metadata.thing_classes) == 133  # the published package replaces them


def test_metadata_needs_things_first_and_unique_ids() -> None:
    thing, stuff = read_classes("nuclei")
    with pytest.raises(UserError, match="'nucleus' is a thing, but comes after stuff"):
        panoptic_metadata([stuff, thing])
    with pytest.raises(UserError, match="class id 1 is used twice"):
        panoptic_metadata([thing, {**stuff, "id": 1}])


def write_panoptic(folder: Path, **changes: Any) -> dict[str, Any]:
    """A panoptic data set of one picture without its files; the arguments to register it with."""
    segment = {"id": 9, "category_id": 1, "iscrowd": 0, "area": 4, "bbox": [0, 0, 2, 2], **changes}
    content = {
        "images": [{"id": 3, "file_name": "a/b.tif", "height": 20, "width": 30}],
        "annotations": [{"image_id": 3, "file_name": "b.png", "segments_info": [segment]}],
    }
    (folder / "panoptic.json").write_text(json.dumps(content))
    return {
        "metadata": panoptic_metadata(read_classes("nuclei")),
        "image_root": str(folder / "images"),
        "panoptic_root": str(folder / "panoptic"),
        "panoptic_json": str(folder / "panoptic.json"),
        "sem_seg_root": str(folder / "semantic"),
    }


def test_dataset_dicts_of_a_users_own_panoptic_folder(tmp_path: Path, scratch_name: str) -> None:
    arguments = write_panoptic(tmp_path)
    register_panoptic(scratch_name, **arguments)
    register_panoptic(scratch_name, **arguments)  # a notebook's cell that is run again
    (dataset_dict,) = DatasetCatalog.get(scratch_name)
    segments = dataset_dict.pop("segments_info")
    assert dataset_dict == {
        "file_name": str(tmp_path / "images/a/b.tif"),
        "image_id": 3,
        "height": 20,
        "width": 30,
        "pan_seg_file_name": str(tmp_path / "panoptic/b.png"),
        "sem_seg_file_name": str(tmp_path / "semantic/b.png"),
    }
    expected = {"id": 9, "category_id": 0, "isthing": True, "iscrowd": 0, "area": 4, "bbox": [0, 0, 2, 2]}
    assert segments == [expected]
    with pytest.raises(UserError, match=f"'{scratch_name}' is taken"):
        register_panoptic(scratch_name, **{**arguments, "panoptic_json": "other.json"})


def test_coco_dicts_agree_with_detectron2s_loader(shared_data: Path) -> None:
    coco = shared_data / "coco"
    paths = [str(coco / "annotations/panoptic_val2017.json"), str(coco / "val2017"), str(coco / "panoptic_val2017")]
    metadata = panoptic_metadata(COCO_CATEGORIES)
    ours, theirs = load_panoptic(*paths, None, metadata), load_coco_panoptic_json(*paths, metadata)
    assert len(ours) == 100
    assert [{k: v for k, v in d.items() if k not in ("height", "width")} for d in ours] == theirs


# ------------------------------------------------------------------------------------- published data sets


def training_sample(name: str, mapper: str, dicts: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The picture as it is, through a published mapper."""
    cfg = get_default_config()
    cfg.DATASETS.TRAIN = (name,)
    cfg.INPUT.DATASET_MAPPER_NAME = mapper
    cfg.INPUT.MIN_SIZE_TRAIN = 0
    cfg.INPUT.RANDOM_FLIP = "none"
    sample = build_mapper(cfg, True)(dicts[index])
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    return sample


def classes_and_areas(sample: dict[str, Any]) -> list[tuple[int, int]]:
    instances = sample["instances"]
    return list(zip(instances.gt_classes.tolist(), instances.gt_masks.sum(dim=(1, 2)).tolist(), strict=True))


STRIPE = HEIGHT * WIDTH // 4  # pixels


def test_ade20k(tmp_path: Path) -> None:
    make_ade20k(tmp_path, "train")
    with registered_at(tmp_path):
        panoptic = check_dataset("ade20k_panoptic_train", 150, semantic_files=True)
        assert panoptic[0]["image_id"] == "ADE_train_00000001"
        assert panoptic[0]["file_name"].endswith("images/training/ADE_train_00000001.jpg")
        assert [segment["isthing"] for segment in panoptic[0]["segments_info"]] == [False, True, False, True]
        sample = training_sample("ade20k_panoptic_train", "mask_former_panoptic", panoptic)
        assert classes_and_areas(sample) == [(0, STRIPE), (7, STRIPE), (3, STRIPE), (12, STRIPE)]
        assert np.array_equal(sample["sem_seg"].numpy(), stripes([0, 7, 3, 12]))

        instances = check_dataset("ade20k_instance_train", 100)
        sample = training_sample("ade20k_instance_train", "mask_former_instance", instances)
        names = MetadataCatalog.get("ade20k_instance_train").thing_classes
        assert [(names[c], area) for c, area in classes_and_areas(sample)] == [("bed", STRIPE), ("person", STRIPE)]


def test_mapillary_vistas(tmp_path: Path) -> None:
    make_mapillary_vistas(tmp_path, "train")
    with registered_at(tmp_path):
        panoptic = check_dataset("mapillary_vistas_panoptic_train", 65, semantic_files=True)
        sample = training_sample("mapillary_vistas_panoptic_train", "mask_former_panoptic", panoptic)
        assert classes_and_areas(sample) == [(0, STRIPE), (2, STRIPE), (19, STRIPE)]
        assert np.array_equal(sample["sem_seg"].numpy(), stripes([0, 2, 19, 65]))
        assert [segment["isthing"] for segment in panoptic[0]["segments_info"]] == [True, False, True]

        semantic = check_dataset("mapillary_vistas_sem_seg_train", 65)
        assert [Path(d["file_name"]).name for d in semantic] == ["_0abC-1.jpg", "x9.jpg"]
        sample = training_sample("mapillary_vistas_sem_seg_train", "mask_former_semantic", semantic)
        assert classes_and_areas(sample) == [(0, STRIPE), (2, STRIPE), (19, STRIPE)]


def test_ade20k_full(tmp_path: Path) -> None:
    folder = tmp_path / "ADE20K_2021_17_01"
    labels = stripes([846, 65535, 255, 0], np.uint16)
    make_semantic(
        folder / "images_detectron2/training", folder / "annotations_detectron2/training", [labels] * 2, "tif"
    )
    with registered_at(tmp_path):
        dicts = check_dataset("ade20k_full_sem_seg_train", 847)
        sample = training_sample("ade20k_full_sem_seg_train", "mask_former_semantic", dicts, 1)
    assert classes_and_areas(sample) == [(0, STRIPE), (255, STRIPE), (846, STRIPE)]
    assert np.array_equal(sample["sem_seg"].numpy(), labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_coco_stuff_10k(split: str, tmp_path: Path) -> None:
    folder = tmp_path / "coco/coco_stuff_10k"
    make_semantic(
        folder / f"images_detectron2/{split}", folder / f"annotations_detectron2/{split}", [stripes([170, 255, 0, 5])]
    )
    with registered_at(tmp_path):
        name = f"coco_2017_{split}_stuff_10k_sem_seg"
        sample = training_sample(name, "mask_former_semantic", check_dataset(name, 171))
    assert classes_and_areas(sample) == [(0, STRIPE), (5, STRIPE), (170, STRIPE)]


def test_missing_files_of_published_data_sets(tmp_path: Path) -> None:
    with registered_at(tmp_path):
        for name, file in (
            ("ade20k_full_sem_seg_val", "images_detectron2/validation"),
            ("ade20k_panoptic_val", r"ade20k_panoptic_val\.json"),
            ("ade20k_instance_val", r"ade20k_instance_val\.json"),
            ("mapillary_vistas_panoptic_val", r"validation/panoptic/panoptic_2018\.json"),
            ("coco_2017_test_stuff_10k_sem_seg", "coco_stuff_10k/images_detectron2/test"),
        ):
            with pytest.raises(UserError, match=rf"'{tmp_path}.*{file}/?'.* does not exist: .*datasets/README\.md"):
                load_dataset(name)
        folder = tmp_path / "coco/coco_stuff_10k"
        (folder / "images_detectron2/test").mkdir(parents=True)
        (folder / "annotations_detectron2/test").mkdir(parents=True)
        with pytest.raises(
            UserError, match=r"stuff_10k_sem_seg' can't be loaded from '.*': No annotations found in .*README\.md"
        ):
            load_dataset("coco_2017_test_stuff_10k_sem_seg")

        make_ade20k(tmp_path, "train")
        cfg = tiny_config("ade20k_panoptic_train", "mask_former_panoptic", 150)
        (tmp_path / "ADEChallengeData2016/annotations_detectron2/training/ADE_train_00000002.png").unlink()
        with pytest.raises(UserError, match=r"1 of 2 semantic annotations are missing"):
            build_train_loader(cfg)
        with pytest.raises(UserError, match=r"1 of 2 semantic annotations are missing"):
            build_train_loader("ade20k_panoptic_train", mapper=build_mapper(cfg), total_batch_size=2)
        cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"  # reads none
        build_train_loader(cfg)


def test_a_name_that_another_package_took_is_left_alone(tmp_path: Path, scratch_name: str) -> None:
    from mask2former.data.datasets.catalog import register

    DatasetCatalog.register(scratch_name, lambda: [{"by": "another package"}])
    register(scratch_name, lambda: [], evaluator_type="ours")
    assert DatasetCatalog.get(scratch_name) == [{"by": "another package"}]
    assert MetadataCatalog.get(scratch_name).get("evaluator_type") is None


# --------------------------------------------------------------------------------------------- Cityscapes


def test_cityscapes_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cityscapes, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package cityscapesscripts: pip install cityscapesscripts"):
        load_dataset("cityscapes_fine_instance_seg_val")


def test_cityscapes_instances(tmp_path: Path, scratch_name: str) -> None:
    pytest.importorskip("cityscapesscripts", reason="needs cityscapesscripts, which Detectron2's loader imports")
    stem, images, truth = "aachen_000000_000019", tmp_path / "leftImg8bit/train", tmp_path / "gtFine/train"
    save_picture(images / f"aachen/{stem}_leftImg8bit.png")
    objects = [
        {"label": "road", "polygon": [[0, 20], [59, 20], [59, 39], [0, 39]]},
        {"label": "car", "polygon": [[10, 10], [30, 10], [30, 30], [10, 30]]},
        {"label": "person", "polygon": [[40, 5], [50, 5], [50, 35], [40, 35]]},
        {"label": "cargroup", "polygon": [[0, 0], [5, 0], [5, 5], [0, 5]]},
    ]
    (truth / "aachen").mkdir(parents=True)
    content = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}
    (truth / f"aachen/{stem}_gtFine_polygons.json").write_text(json.dumps(content))
    for kind in ("instanceIds", "labelIds"):
        (truth / f"aachen/{stem}_gtFine_{kind}.png").touch()
    DatasetCatalog.register(
        scratch_name,
        lambda: load_cityscapes_instances(str(images), str(truth), from_json=True, to_polygons=True),
    )
    published = MetadataCatalog.get("cityscapes_fine_instance_seg_train").as_dict()
    MetadataCatalog.get(scratch_name).set(**{k: v for k, v in published.items() if k != "name"})
    sample = training_sample(scratch_name, "mask_former_instance", check_dataset(scratch_name, 8))
    names = [MetadataCatalog.get(scratch_name).thing_classes[c] for c in sample["instances"].gt_classes]
    areas = dict(zip(names, sample["instances"].gt_masks.sum(dim=(1, 2)).tolist(), strict=True))
    # Cityscapes' polygons go through the middle of the pixels at their border.
    assert areas == {"car": pytest.approx(21 * 21, abs=2), "person": pytest.approx(11 * 31, abs=2)}


IMPORTS_OF_DETECTRON2 = """
from deeplearning.projects.cityscapesApi.cityscapesscripts.helpers.labels import name2label
import deeplearning.projects.cityscapesApi.cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as pixels
import deeplearning.projects.cityscapesApi.cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as instances
"""


def test_cityscapes_with_a_detectron2_that_imports_from_inside_its_company(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in cityscapes._MODULES:
        path = tmp_path.joinpath(*name.split("."))
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        if name.count(".") == 2:
            path.with_suffix(".py").write_text(f"name2label = {name!r}")
    for name in [name for name in sys.modules if name.split(".")[0] in ("cityscapesscripts", "deeplearning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(sys.modules)
    monkeypatch.setattr(cityscapes.inspect, "getsource", lambda module: "import deeplearning.projects.cityscapesApi")
    try:
        cityscapes.require_cityscapesscripts()
        found: dict[str, Any] = {}
        exec(IMPORTS_OF_DETECTRON2, found)
        assert found["name2label"] == "cityscapesscripts.helpers.labels"
        assert found["pixels"] is sys.modules["cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"]
        assert found["instances"] is sys.modules["cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling"]
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]


# ------------------------------------------------------------------------------------------------- checks


def test_missing_json_says_what_to_run() -> None:
    if os.path.exists(MetadataCatalog.get("nuclei_train").panoptic_json):
        pytest.skip("the nuclei data set is there")
    with pytest.raises(UserError, match=r"panoptic_train\.json' does not exist: .*prepare_nuclei\.py"):
        load_dataset("nuclei_train")


def test_missing_instances_json_is_named(tmp_path: Path, scratch_name: str) -> None:
    register_coco_instances(scratch_name, {}, str(tmp_path / "absent.json"), str(tmp_path))
    with pytest.raises(UserError, match=r"absent\.json', which does not exist.*DETECTRON2_DATASETS"):
        load_dataset(scratch_name)


def test_unknown_names_list_similar_ones() -> None:
    with pytest.raises(UserError, match="'nuclei_tran' is not registered: did you mean 'nuclei_train'"):
        load_dataset("nuclei_tran")


def test_wrong_number_of_classes(tiny: TinyNames) -> None:
    with pytest.raises(UserError) as error:
        check_dataset(tiny.panoptic, 80)
    assert str(error.value) == (
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 80, but data set 'tiny_panoptic' has 3 classes: set it to 3"
    )
    assert len(check_dataset(tiny.panoptic, 3)) == 5
    assert len(check_dataset(tiny.instances, 2)) == 5


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("coco_2017_train", "annotations", 80),
        ("coco_2017_train_panoptic", "segments_info", 133),
        ("coco_2017_train_panoptic_with_sem_seg", "segments_info", 133),
        ("nuclei_val", "segments_info", 2),
        ("ade20k_sem_seg_train", "sem_seg_file_name", 150),
        ("ade20k_full_sem_seg_val", "sem_seg_file_name", 847),
        ("ade20k_panoptic_train", "segments_info", 150),
        ("ade20k_instance_train", "annotations", 100),
        ("coco_2017_train_stuff_10k_sem_seg", "sem_seg_file_name", 171),
        ("mapillary_vistas_sem_seg_val", "sem_seg_file_name", 65),
        ("mapillary_vistas_panoptic_val", "segments_info", 65),
        ("cityscapes_fine_sem_seg_train", "sem_seg_file_name", 19),
        ("cityscapes_fine_panoptic_train", "segments_info", 19),
        ("cityscapes_fine_instance_seg_train", "annotations", 8),
    ],
)
def test_number_of_classes_of_known_data_sets(name: str, key: str, expected: int) -> None:
    assert count_classes(name, [{key: []}]) == expected


def test_missing_files_are_counted_and_named(tmp_path: Path, scratch_name: str) -> None:
    register_panoptic(scratch_name, **write_panoptic(tmp_path))
    with pytest.raises(UserError, match=r"1 of 1 pictures are missing, the first is '.*images/a/b\.tif'"):
        check_dataset(scratch_name)
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/b.tif").touch()
    with pytest.raises(UserError, match=r"1 of 1 panoptic annotations are missing.*panoptic/b\.png"):
        check_dataset(scratch_name)
    (tmp_path / "panoptic").mkdir()
    (tmp_path / "panoptic/b.png").touch()
    assert len(check_dataset(scratch_name, 2)) == 1
    with pytest.raises(UserError, match=r"1 of 1 semantic annotations are missing"):
        check_dataset(scratch_name, semantic_files=True)


def test_unknown_class_in_a_panoptic_json(tmp_path: Path, scratch_name: str) -> None:
    register_panoptic(scratch_name, **write_panoptic(tmp_path, category_id=5))
    with pytest.raises(UserError, match=r"panoptic\.json': 'b\.png': segment 9 has category_id 5.* 2 classes"):
        load_dataset(scratch_name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 12}, r"annotation 4 \(of picture 2\) has category_id 12"),
        ({"id": 3}, "annotation 3 .*its id is used more than once"),
        ({"bbox": []}, "annotation 4 .* has bbox"),
    ],
)
def test_broken_instances_json(change: dict[str, Any], message: str, tiny: TinyNames, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][3].update({"id": 4, "image_id": 2, **change})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"instances\.json'?: {message}"):
        load_dataset(tiny.instances)


def test_class_out_of_range_in_a_users_own_dicts(tmp_path: Path, scratch_name: str) -> None:
    annotations = [{"id": 17, "category_id": 2}]
    DatasetCatalog.register(scratch_name, lambda: [{"file_name": "a.png", "annotations": annotations}])
    MetadataCatalog.get(scratch_name).set(thing_classes=["one", "two"])
    with pytest.raises(UserError, match=r"'a\.png': annotation 17 has category_id 2, expected 0 to 1"):
        check_dataset(scratch_name, 2)


def test_broken_json_is_named(tmp_path: Path, scratch_name: str) -> None:
    arguments = write_panoptic(tmp_path)
    (tmp_path / "panoptic.json").write_text('{"images": [')
    register_panoptic(scratch_name, **arguments)
    with pytest.raises(UserError, match=r"cannot read '.*panoptic\.json'"):
        load_dataset(scratch_name)
    (tmp_path / "panoptic.json").write_text("[]")
    with pytest.raises(UserError, match=r"panoptic\.json' is not in COCO's panoptic format"):
        load_dataset(scratch_name)


# ------------------------------------------------------------------------------------------------ loaders


def first_batches(loader: Any, count: int = 3) -> list[list[dict[str, Any]]]:
    return list(islice(iter(loader), count))


def assert_equal_batches(left: list[Any], right: list[Any]) -> None:
    for a, b in zip(left, right, strict=True):
        assert [sample["image_id"] for sample in a] == [sample["image_id"] for sample in b]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_repeat_with_a_seed(workers: int, tiny: TinyNames) -> None:
    cfg = tiny_config(tiny.panoptic)
    cfg.DATALOADER.NUM_WORKERS = workers
    runs = []
    for state in (1, 2):
        np.random.seed(state)  # the caller's generators have no part in it
        torch.manual_seed(state)
        runs.append(first_batches(build_train_loader(cfg)))
    assert_equal_batches(*runs)
    sample = runs[0][0][0]
    assert len(runs[0][0]) == 2
    assert sample["image"].shape == (3, 64, 64) and sample["instances"].gt_masks.dtype == torch.bool

    cfg.SEED = 6
    other = [s["image_id"] for batch in first_batches(build_train_loader(cfg), 6) for s in batch]
    cfg.SEED = 5
    same = [s["image_id"] for batch in first_batches(build_train_loader(cfg), 6) for s in batch]
    assert other != same


def test_keyword_values_give_the_same_batches_as_a_config(tiny: TinyNames) -> None:
    node = LazyCall(build_train_loader)(
        dataset=tiny.panoptic,
        mapper=LazyCall(MaskFormerDatasetMapper)(
            augmentations=LazyCall(large_scale_jitter)(image_size=64),
            image_format="BGR",
            annotation_reader=read_panoptic,
        ),
        total_batch_size=2,
        num_workers=0,
        seed=5,
        num_classes=3,
    )
    by_keywords = first_batches(instantiate(node))
    assert_equal_batches(first_batches(build_train_loader(tiny_config(tiny.panoptic))), by_keywords)


def test_dataset_dicts_can_be_given(tiny: TinyNames) -> None:
    cfg = tiny_config(tiny.panoptic)
    mapper = MaskFormerDatasetMapper(cfg, True)
    loader = build_train_loader(load_dataset(tiny.panoptic)[:2], mapper=mapper, total_batch_size=2)
    assert {sample["image_id"] for sample in first_batches(loader, 1)[0]} <= {1, 2}


def test_instances_are_read_and_empty_pictures_filtered(tiny: TinyNames, tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] != 2]
    path.write_text(json.dumps(content))
    cfg = tiny_config(tiny.instances, "coco_instance_lsj", num_classes=2)
    seen = {s["image_id"] for batch in first_batches(build_train_loader(cfg), 10) for s in batch}
    assert seen == {1, 3, 4, 5}
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    seen = {s["image_id"] for batch in first_batches(build_train_loader(cfg), 10) for s in batch}
    assert seen == {1, 2, 3, 4, 5}


def test_repeat_factor_sampler(tiny: TinyNames) -> None:
    cfg = tiny_config(tiny.instances, "coco_instance_lsj", num_classes=2)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    assert len(first_batches(build_train_loader(cfg))) == 3
    cfg.DATALOADER.SAMPLER_TRAIN = "NoSampler"
    with pytest.raises(UserError, match="DATALOADER.SAMPLER_TRAIN is 'NoSampler', expected TrainingSampler"):
        build_train_loader(cfg)


def test_mistakes_are_found_before_the_first_batch(tiny: TinyNames) -> None:
    with pytest.raises(UserError, match="NUM_CLASSES is 80, but data set 'tiny_panoptic' has 3"):
        build_train_loader(tiny_config(tiny.panoptic, num_classes=80))
    with pytest.raises(UserError, match="NUM_CLASSES is 80, but data set 'tiny_panoptic' has 3"):
        build_test_loader(tiny_config(tiny.panoptic, num_classes=80), tiny.panoptic)
    cfg = tiny_config(tiny.panoptic)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(UserError, match="set DATASETS.TRAIN"):
        build_train_loader(cfg)


@pytest.mark.parametrize("workers", [0, 2])
def test_test_loader_gives_every_picture_once_in_order(workers: int, tiny: TinyNames) -> None:
    cfg = tiny_config(tiny.panoptic)
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.INPUT.MIN_SIZE_TEST = 96
    batches = list(build_test_loader(cfg, tiny.panoptic))
    assert [sample["image_id"] for batch in batches for sample in batch] == [1, 2, 3, 4, 5]
    assert batches[0][0]["image"].shape == (3, 96, 96)
    assert "instances" not in batches[0][0]


def test_nuclei_samples_have_the_annotated_areas(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "nuclei/annotations/val.json"
    problems = instances_to_panoptic(
        source, read_classes("nuclei"), tmp_path / "p.json", tmp_path / "p", tmp_path / "s", background=2
    )
    assert not problems
    dicts = load_panoptic(
        str(tmp_path / "p.json"),
        str(shared_data / "nuclei/val"),
        str(tmp_path / "p"),
        str(tmp_path / "s"),
        panoptic_metadata(read_classes("nuclei")),
    )
    mapper = MaskFormerDatasetMapper(augmentations=[], image_format="RGB", annotation_reader=read_panoptic)
    content = json.loads(source.read_text())
    assert len(dicts) == len(content["images"]) == 60
    for dataset_dict in dicts[:10]:
        instances = mapper(dataset_dict)["instances"]
        areas = sorted(instances.gt_masks[instances.gt_classes == 0].sum(dim=(1, 2)).tolist())
        annotated = sorted(a["area"] for a in content["annotations"] if a["image_id"] == dataset_dict["image_id"])
        assert areas == annotated
        assert bool(instances.gt_masks.any(dim=0).all())  # nuclei and background are everything
