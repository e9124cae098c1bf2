"""The predictor: every kind of picture, every kind of config, and what it says about mistakes."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from tiny_nuclei_model import build_tiny_model, one_thread, tiny_config, write_tiny_model

from mask2former.checkpoint import write_safetensors
from mask2former.data import build_mapper
from mask2former.drawing import draw
from mask2former.errors import UserError
from mask2former.predictor import Predictor
from mask2former.results import to_json

LAZY_CONFIG = """\
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from mask2former.data import MaskFormerDatasetMapper
from tiny_nuclei_model import build_tiny_model

model = L(build_tiny_model)()
dataloader = dict(
    test=dict(
        mapper=L(MaskFormerDatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)],
            image_format="RGB",
        ),
    ),
    evaluator=dict(dataset_name="nuclei_val"),
)
train = dict(device="cpu", init_checkpoint="")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with one_thread():
        yield write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def predictor(tiny):
    return Predictor(*tiny)


@pytest.fixture
def image():
    """RGB, 90 wide and 70 high, without symmetry."""
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def assert_same(actual, expected):
    torch.testing.assert_close(actual["sem_seg"], expected["sem_seg"], atol=0, rtol=0)
    assert actual["panoptic_seg"][1] == expected["panoptic_seg"][1]
    assert torch.equal(actual["panoptic_seg"][0], expected["panoptic_seg"][0])
    torch.testing.assert_close(actual["instances"].scores, expected["instances"].scores, atol=0, rtol=0)
    assert torch.equal(actual["instances"].pred_masks, expected["instances"].pred_masks)


def test_what_evaluation_computes(predictor, image, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(image).save(path)
    sample = build_mapper(tiny_config(), is_train=False)({"file_name": str(path)})
    with torch.no_grad():
        (expected,) = build_tiny_model().eval()([sample])
    assert expected["sem_seg"].shape == (2, 70, 90)
    assert_same(predictor(str(path)), expected)
    assert_same(predictor(path), expected)


def test_what_detectron2s_predictor_computes(predictor, image, tmp_path):
    cfg = tiny_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_tiny_model().state_dict()}, cfg.MODEL.WEIGHTS)
    bgr = image[:, :, ::-1]
    assert_same(predictor(bgr), DefaultPredictor(cfg)(bgr))


def test_all_kinds_of_pictures_are_the_same(predictor, image):
    expected = predictor(image, image_format="RGB")
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    assert_same(predictor(bgr), expected)
    assert_same(predictor(Image.fromarray(image)), expected)
    assert_same(predictor(torch.from_numpy(image).permute(2, 0, 1), image_format="RGB"), expected)
    assert_same(predictor(torch.from_numpy(bgr).permute(2, 0, 1)), expected)


def test_a_config_with_bgr_pictures(tiny, image):
    recipe, weights = tiny
    predictor = Predictor(recipe, weights, options=["INPUT.FORMAT", "BGR"])
    assert_same(predictor(image, image_format="BGR"), Predictor(recipe, weights)(image, image_format="RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pil_modes(predictor, image, mode):
    picture = Image.fromarray(image).convert(mode)
    assert_same(predictor(picture), predictor(np.array(picture.convert("RGB")), image_format="RGB"))


def test_grey_and_16_bit_pictures(predictor, image):
    grey = image[:, :, 0]
    expected = predictor(np.stack([grey] * 3, axis=2))
    deep = grey.astype(np.uint16) * 257
    assert_same(predictor(grey), expected)
    assert_same(predictor(deep), expected)
    assert_same(predictor(Image.fromarray(deep)), expected)
    assert_same(predictor(Image.fromarray(deep.astype(np.int32))), expected)


def test_exif_rotation(predictor, image, tmp_path):
    picture = Image.fromarray(image)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "turned.png"
    picture.save(path, exif=exif)
    expected = predictor(np.rot90(image, -1), image_format="RGB")
    assert expected["sem_seg"].shape == (2, 90, 70)
    assert_same(predictor(path), expected)
    assert_same(predictor(Image.open(path)), expected)


def test_lists_keep_their_order_and_results_do_not_depend_on_neighbours(tiny, image):
    predictor = Predictor(*tiny, batch_size=2)
    pictures = [image, image[::-1], image[:, ::-1], image[:40], image[:40, ::-1]]
    sizes = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    together = predictor(pictures)
    assert sizes == [2, 1, 2]
    assert isinstance(together, list)
    for outputs, picture in zip(together, pictures, strict=True):
        torch.testing.assert_close(outputs["sem_seg"], predictor(picture)["sem_seg"], atol=1e-4, rtol=0)
    assert predictor([]) == []


def test_results_need_no_gradient(predictor, image):
    assert not predictor(image)["sem_seg"].requires_grad


def test_lazy_config(tiny, image, tmp_path):
    _, weights = tiny
    path = tmp_path / "recipe.py"
    path.write_text(LAZY_CONFIG)
    lazy = Predictor(path, weights)
    assert_same(lazy(image), Predictor(*tiny)(image))
    assert lazy.metadata.thing_classes == ["nucleus"]
    assert Predictor(path, options=["train.init_checkpoint", str(weights)]).weights == str(weights)

    scores = lazy(image)["instances"].scores
    threshold = float(scores.sort().values[5])
    assert len(Predictor(path, weights, confidence_threshold=threshold)(image)["instances"]) == len(scores) - 5


def test_semantic_labels(tiny, predictor, image, tmp_path):
    """They are drawn and written as scores are; a LazyConfig's model gives them too."""
    path = tmp_path / "recipe.py"
    path.write_text(LAZY_CONFIG)
    scores = predictor(image, image_format="RGB")
    for other in (Predictor(*tiny, semantic_labels=True), Predictor(path, tiny[1], semantic_labels=True)):
        labels = other(image, image_format="RGB")
        assert labels["sem_seg"].shape == (70, 90) and not labels["sem_seg"].is_floating_point()
        assert to_json(labels, other.metadata) == to_json(scores, predictor.metadata)
        drawings = dict(draw(image, labels, other.metadata))
        for kind, drawing in draw(image, scores, predictor.metadata):
            assert np.array_equal(drawing, drawings[kind])


def test_per_pixel_baseline(tiny, image, tmp_path):
    """Its scores are semantic alone, so that a threshold, which the demo always gives, changes nothing."""
    options = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "PerPixelBaselineHead"]
    cfg = tiny_config()
    cfg.merge_from_list(options)
    weights = tmp_path / "model.safetensors"
    write_safetensors(build_model(cfg).state_dict(), str(weights))
    path = tmp_path / "recipe.py"
    path.write_text(
        LAZY_CONFIG.replace("import build_tiny_model", "import tiny_config").replace(
            "model = L(build_tiny_model)()",
            f"from detectron2.modeling import build_model\ncfg = tiny_config()\ncfg.merge_from_list({options})\n"
            "model = L(build_model)(cfg=cfg)",
        )
    )
    lazy = Predictor(path, weights, confidence_threshold=0.5, semantic_labels=True)(image)
    assert set(lazy) == {"sem_seg"} and lazy["sem_seg"].shape == (2, 70, 90)
    yaml = Predictor(tiny[0], weights, options=options, confidence_threshold=0.5)(image)
    torch.testing.assert_close(lazy["sem_seg"], yaml["sem_seg"], atol=0, rtol=0)


def test_one_threshold_for_instances_and_segments(tiny, image):
    options = ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "0.0"]
    outputs = Predictor(*tiny, options=options)(image)
    scores = outputs["instances"].scores
    threshold = float(scores.sort().values[5])
    kept = Predictor(*tiny, confidence_threshold=threshold)(image)
    assert torch.equal(kept["instances"].scores.sort().values, scores.sort().values[5:])

    assert outputs["panoptic_seg"][1]
    best = max(segment["score"] for segment in outputs["panoptic_seg"][1])
    kept = Predictor(*tiny, confidence_threshold=min(best + 0.2, 1))(image)
    assert kept["panoptic_seg"][1] == []
    assert not kept["panoptic_seg"][0].any()
    assert len(kept["instances"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_without_cuda_the_cpu_is_used_and_said_so_once(tiny, caplog):
    with caplog.at_level(logging.WARNING, logger="mask2former"):
        predictor = Predictor(*tiny, device="cuda")
    assert predictor.model.device == torch.device("cpu")
    assert len(caplog.records) == 1
    assert "running on the CPU" in caplog.text


def test_a_config_is_left_as_it_was(tiny):
    cfg = tiny_config()
    before = cfg.dump()
    Predictor(cfg, tiny[1], confidence_threshold=0.5, options=["INPUT.FORMAT", "BGR"])
    assert cfg.dump() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"weights": "nowhere.pth"}, "nowhere.pth"),
        ({"weights": None}, "no weights"),
        ({"options": ["MODEL.WEIGHT", "x"]}, "MODEL.WEIGHT"),
        ({"options": ["MODEL.WEIGHTS"]}, "MODEL.WEIGHTS"),
        ({"options": ["MODEL.MASK_FORMER.DEC_LAYERS", "many"]}, "DEC_LAYERS"),
        ({"config": tiny_config(), "options": ["MODEL.WEIGHT", "x"]}, "MODEL.WEIGHT x"),
        ({"device": "gpu"}, "'gpu'"),
        ({"confidence_threshold": 50}, "0 to 1, got 50"),
        ({"batch_size": 0}, "got 0"),
    ],
)
def test_mistakes_in_the_arguments(tiny, arguments, message):
    with pytest.raises(UserError, match=message) as info:
        Predictor(**{"config": tiny[0], "weights": tiny[1], **arguments})
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("unknown.yaml", "MODEL: {MASK_FORMR: {}}", "MASK_FORMR in .*unknown.yaml"),
        ("broken.yaml", "MODEL: {", "broken.yaml"),
        ("broken.py", "model = (", "broken.py"),
        ("empty.py", "train = dict(device='cpu')", "no dataloader.test.mapper"),
    ],
)
def test_mistakes_in_config_files(tiny, tmp_path: Path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        Predictor(tmp_path / name, tiny[1])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere.png", "'nowhere.png' does not exist"),
        (__file__, "cannot read picture '.*test_predictor.py'"),
        (np.zeros((4, 4, 3), dtype=np.float32), "uint8.*float32"),
        (np.zeros((4, 4, 4), dtype=np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"\(3, H, W\), got \(4, 4, 3\)"),
        (Image.new("F", (4, 4)), "floating-point"),
        (Image.new("I", (4, 4), 70000), "70000"),
        (7, "got int"),
    ],
    ids=str,
)
def test_mistakes_in_pictures(predictor, picture, message):
    with pytest.raises(UserError, match=message):
        predictor(picture)


def test_unknown_order_of_channels(predictor, image):
    with pytest.raises(UserError, match="got 'GBR'"):
        predictor(image, image_format="GBR")
