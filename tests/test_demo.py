"""The demo commands, as a user runs them, with the real model made small."""

import dataclasses
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from PIL import Image
from scripts import load_script
from tiny_nuclei_model import one_thread, write_tiny_model
from torch import tensor

import mask2former.predictor
from mask2former.data import read_image
from mask2former.errors import UserError
from mask2former.model_zoo import table

KINDS = ("instances", "panoptic", "semantic")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with one_thread():
        yield write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def demo(repository, tiny, monkeypatch, tmp_path):
    """demo/demo.py as a function of its arguments, with the tiny model, in an empty folder, without a screen."""
    module = load_script(repository / "demo" / "demo.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    recipe, weights = tiny

    def run(*arguments, model=("--config-file", str(recipe), "--weights", str(weights))):
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments, *model])
        return module.main()

    run.module, run.model = module, ("--config-file", str(recipe), "--weights", str(weights))
    return run


def save_picture(path: Path, seed=0, size=(48, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def names_in(folder: Path):
    return sorted(path.name for path in folder.iterdir())


def files_of(*names):
    return sorted([f"{name}_{kind}.png" for name in names for kind in KINDS] + [f"{name}.json" for name in names])


def test_files_patterns_and_folders(demo, tmp_path, capsys):
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "some" / "a.jpg", 1)
    save_picture(tmp_path / "some" / "b.jpg", 2)
    save_picture(tmp_path / "some" / "note.png", 3)
    save_picture(tmp_path / "folder" / "A.tif", 4)
    (tmp_path / "folder" / "readme.txt").write_text("no picture")
    # b.jpg is named twice.
    assert demo("--input", "a.png", "some/[ab].jpg", "some/b.jpg", "folder", "--output", "out") == 0
    assert names_in(tmp_path / "out") == files_of("a", "a_2", "b", "A_3")
    assert "4 pictures segmented" in capsys.readouterr().out
    documents = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert {name: Path(document["file"]).name for name, document in documents.items()} == {
        "a": "a.png",
        "a_2": "a.jpg",
        "b": "b.jpg",
        "A_3": "A.tif",
    }


def test_what_the_json_says_is_what_the_predictor_gives(demo, tiny, tmp_path):
    path = save_picture(tmp_path / "a.png", size=(60, 40))
    assert demo("--input", str(path), "--output", "out", "--polygons", "--confidence-threshold", "0.25") == 0
    document = json.loads((tmp_path / "out" / "a.json").read_text())
    outputs = mask2former.predictor.Predictor(*tiny, confidence_threshold=0.25)(path)
    instances = outputs["instances"]
    assert 0 < len(instances) < 10
    assert [record["score"] for record in document["instances"]] == pytest.approx(instances.scores.tolist(), abs=1e-6)
    for record, mask in zip(document["instances"], instances.pred_masks, strict=True):
        np.testing.assert_array_equal(mask_util.decode(record["segmentation"]), mask.numpy())
        assert record["polygons"]["type"] in ("Polygon", "MultiPolygon", "GeometryCollection")
    assert (document["width"], document["height"]) == (60, 40)
    assert Image.open(tmp_path / "out" / "a_semantic.png").size == (240, 160)


def test_unreadable_pictures_are_named_skipped_and_counted(demo, tmp_path, capsys):
    good = save_picture(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    assert demo("--input", "cut.png", "nowhere.jpg", "good.png", "no*.bmp", "--output", "out") == 1
    printed = capsys.readouterr()
    assert names_in(tmp_path / "out") == files_of("good")
    for name in ("cut.png", "nowhere.jpg", "no*.bmp"):
        assert name in printed.err
    assert "3 skipped" in printed.out


def test_pictures_that_fail_are_named_and_skipped(demo, tmp_path, capsys, monkeypatch):
    """Those too that can be read: the run goes on behind them."""
    for name, size in (("a", (48, 40)), ("thin", (1, 300)), ("vast", (60, 40)), ("z", (48, 40))):
        save_picture(tmp_path / "some" / f"{name}.png", size=size)
    segment = mask2former.predictor.Predictor.__call__

    def with_little_memory(self, image, **kwargs):
        if image.shape[1] == 60:
            raise torch.cuda.OutOfMemoryError
        return segment(self, image, **kwargs)

    monkeypatch.setattr(mask2former.predictor.Predictor, "__call__", with_little_memory)
    assert demo("--input", "some", "--output", "out") == 1
    printed = capsys.readouterr()
    assert names_in(tmp_path / "out") == files_of("a", "z")
    thin, vast = (line for line in printed.err.splitlines() if line.startswith("skipped: "))
    assert "'some/thin.png': a picture of 1 x 300 pixels can't be resized" in thin
    assert "'some/vast.png': 60 x 40 pixels need more memory than there is" in vast
    assert "2 pictures segmented" in printed.out and "2 skipped" in printed.out


def test_only_outputs_that_are_on_are_written(demo, tmp_path):
    save_picture(tmp_path / "a.png")
    options = ["--opts", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False", "MODEL.MASK_FORMER.TEST.INSTANCE_ON", "False"]
    assert demo("--output", "out", "--input", "a.png", model=[*demo.model, *options]) == 0
    assert names_in(tmp_path / "out") == ["a.json", "a_semantic.png"]


def test_ctrl_c_keeps_what_is_done(demo, tmp_path, monkeypatch, capsys):
    for name in "abc":
        save_picture(tmp_path / f"{name}.png")
    segment = mask2former.predictor.Predictor.__call__
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return segment(self, *args, **kwargs)

    monkeypatch.setattr(mask2former.predictor.Predictor, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo("--input", "a.png", "b.png", "c.png", "--output", "out")
    assert names_in(tmp_path / "out") == files_of("a")
    assert "1 picture segmented" in capsys.readouterr().out


@pytest.fixture
def zoo(demo, tiny, monkeypatch, tmp_path):
    """The tiny model in place of the shipped one and, once published, of the COCO model of the zoo."""
    monkeypatch.setattr(demo.module, "SHIPPED_CONFIG", tiny[0])
    monkeypatch.setattr(demo.module, "SHIPPED_WEIGHTS", tiny[1])
    monkeypatch.setattr(table.Entry, "config_file", tiny[0])
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    save_picture(tmp_path / "a.png")
    content = tiny[1].read_bytes()
    file = f"tiny_{hashlib.md5(content).hexdigest()[:6]}.safetensors"
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / file).write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "server")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    url = f"http://127.0.0.1:{server.server_port}/{file}"
    entries = [dataclasses.replace(entry, url=url) for entry in table.entries()]
    monkeypatch.setattr(table, "entries", lambda: entries)
    server.cached = tmp_path / "cache" / "mask2former" / demo.module.DEFAULT_MODEL / file
    yield server
    server.server_close()


@pytest.fixture
def zoo_online(zoo):
    thread = threading.Thread(target=zoo.serve_forever, args=(0.01,))
    thread.start()
    yield zoo
    zoo.shutdown()
    thread.join()


def test_the_zoos_model_is_the_default_and_says_so(demo, zoo_online, tmp_path, capsys):
    assert demo("--input", "a.png", model=()) == 0
    printed = capsys.readouterr().out
    assert f"no model named: using {demo.module.DEFAULT_MODEL} of the model zoo ({zoo_online.cached}; " in printed
    assert "no screen" in printed
    assert zoo_online.cached.is_file()
    assert names_in(tmp_path / "output") == files_of("a")


def test_a_model_in_the_cache_needs_no_network(demo, zoo, tiny, tmp_path, capsys):
    zoo.cached.parent.mkdir(parents=True)
    zoo.cached.write_bytes(tiny[1].read_bytes())
    zoo.server_close()
    assert demo("--input", "a.png", model=()) == 0
    assert f"using {demo.module.DEFAULT_MODEL}" in capsys.readouterr().out


def test_the_shipped_model_steps_in_without_a_network(demo, zoo, tmp_path, capsys):
    zoo.server_close()
    assert demo("--input", "a.png", model=()) == 0
    printed = capsys.readouterr().out
    assert "no model named: using the shipped one" in printed and "model.safetensors" in printed
    assert "nuclei" in printed and "connection refused" in printed
    assert names_in(tmp_path / "output") == files_of("a")


def test_models_by_name(demo, zoo_online, tmp_path, capsys):
    for name in ("ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k", "nuclei"):
        assert demo("--input", "a.png", "--output", name, model=("--model", name)) == 0
        assert names_in(tmp_path / name) == files_of("a")
        assert "no model named" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no model 'nuclej'"):
        demo("--input", "a.png", model=("--model", "nuclej"))
    with pytest.raises(UserError, match="videos"):
        demo("--input", "a.png", model=("--model", "youtubevis_2019/video_maskformer2_R50_bs16_8ep"))
    with pytest.raises(SystemExit):
        demo("--input", "a.png", "--model", "nuclei")  # and --config-file
    assert "not allowed with" in capsys.readouterr().err


def test_weights_without_a_recipe_are_those_of_the_shipped_one(demo, zoo, tiny, tmp_path):
    zoo.server_close()
    assert demo("--input", "a.png", "--output", "out", model=("--weights", str(tiny[1]))) == 0
    model = ("--model", demo.module.DEFAULT_MODEL, "--opts", "MODEL.WEIGHTS", str(tiny[1]))
    assert demo("--input", "a.png", "--output", "out", model=model) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere*"], "matches 'nowhere\\*'"),
        (["--input", "empty"], "no picture in folder 'empty'"),
        (["--input", "a_instances.png", "a.png", "--output", "."], "would replace the input .*a_instances.png"),
        (["--input", "a.png", "--confidence-threshold", "80"], "0 to 1, got 80"),
        (["--video-input", "nowhere.mp4"], "nowhere.mp4' does not exist"),
        (["--video-input", "a.png", "--output", "."], None),
        (["--video-input", "text.mp4"], "cannot read from text.mp4"),
    ],
)
def test_mistakes(demo, tmp_path, arguments, message):
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "a_instances.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    if message is None:  # OpenCV reads a picture as a video of one frame
        assert demo(*arguments) == 0
        return
    with pytest.raises(UserError, match=message):
        demo(*arguments)


def save_video(path: Path):
    """Three frames of 64 x 48 pixels, 10 a second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for grey in (0, 100, 200):
        writer.write(np.full((48, 64, 3), grey, dtype=np.uint8))
    writer.release()


def test_video(demo, tmp_path, capsys):
    save_video(tmp_path / "clip.mp4")
    assert demo("--video-input", "clip.mp4", "--output", "out") == 0
    assert demo("--video-input", "clip.mp4", "--output", "named.mp4") == 0
    for path in (tmp_path / "out" / "clip.mp4", tmp_path / "named.mp4"):
        capture = cv2.VideoCapture(str(path))
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
        assert capture.get(cv2.CAP_PROP_FPS) == 10
        assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 4 * 64
    assert "clip.mp4" in capsys.readouterr().out
    assert names_in(tmp_path / "out") == ["clip.mp4"]
    with pytest.raises(UserError, match="would replace the input"):
        demo("--video-input", "clip.mp4", "--output", ".")


def test_a_window_where_there_is_a_screen(demo, tmp_path, monkeypatch):
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "b.png")
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda _, picture: shown.append(picture.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda _: ord("q") if len(shown) == 4 else ord(" "))
    assert demo("--input", "a.png", "b.png") == 0
    assert shown == [(160, 192, 3)] * 4
    assert not (tmp_path / "output").exists()


def test_webcam(demo, tmp_path, monkeypatch):
    save_video(tmp_path / "clip.mp4")
    capture, shown = cv2.VideoCapture, []
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: capture({0: "clip.mp4"}[source]))
    assert demo("--webcam", "--output", "out") == 0
    assert names_in(tmp_path / "out") == ["webcam.mp4"]

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda *_: shown.append(1))
    monkeypatch.setattr(cv2, "waitKey", lambda _: 27 if len(shown) == 2 else -1)
    assert demo("--webcam") == 0
    assert len(shown) == 2


def run_command(script: Path, *arguments, cwd: Path):
    """Run a script of the repository, whose root is found even where the package is not installed."""
    search = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_command_from_another_folder(repository, tiny, tmp_path):
    save_picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    model = ["--config-file", str(tiny[0]), "--weights", str(tiny[1])]
    script = repository / "demo" / "demo.py"
    result = run_command(script, "--input", "a.png", "b.png", "--output", "out", *model, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "b.png" in result.stderr and "Traceback" not in result.stderr
    assert names_in(tmp_path / "out") == files_of("a")


# ------------------------------------------------------------------------------------------ demo/nuclei


@pytest.fixture
def nuclei(repository, tiny, monkeypatch, tmp_path):
    """demo/nuclei/run.py as a function of its arguments, on two pictures with one nucleus each."""
    module = load_script(repository / "demo" / "nuclei" / "run.py")
    folder = tmp_path / "nuclei"
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[10:30, 10:30] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    images, annotations = [], []
    for number in (1, 2):
        save_picture(folder / "images" / f"{number}.png", number)
        images.append({"id": number, "file_name": f"{number}.png", "height": 40, "width": 48})
        annotation = {"id": number, "image_id": number, "category_id": 1, "iscrowd": 0, "bbox": [10, 10, 20, 20]}
        annotations.append({**annotation, "area": 400, "segmentation": segmentation})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances.json").write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(tiny[1].read_bytes())
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "--folder", "nuclei", "--config-file", str(tiny[0]), *arguments])
        return module.main()

    run.module, run.folder, run.mask = module, folder, mask
    yield run
    if module.DATASET in DatasetCatalog:
        DatasetCatalog.remove(module.DATASET)
        MetadataCatalog.remove(module.DATASET)


def test_nuclei_demo_writes_everything_and_says_where(nuclei, tmp_path, capsys):
    (nuclei.folder / "metrics.json").write_text(json.dumps({"six": {"AP": 12.34, "AP50": 56.78}}))
    nuclei("--output", "out")
    assert names_in(tmp_path / "out") == sorted([*files_of("1", "2"), "overview.png"])
    printed = capsys.readouterr().out
    assert "AP 12.3, AP50 56.8" in printed
    assert "out/" in printed
    assert "Accumulating" not in printed


def test_nuclei_demo_measures_average_precision(nuclei, monkeypatch, capsys):
    class KnowsTheAnswer:
        metadata = MetadataCatalog.get("nuclei_val")

        def __init__(self, *_args, **_kwargs):
            pass

        def __call__(self, image, image_format):
            instances = Instances(image.shape[:2])
            instances.pred_masks = tensor(nuclei.mask).bool()[None]
            instances.scores, instances.pred_classes = tensor([0.9]), tensor([0])
            return {"instances": instances}

    monkeypatch.setattr(nuclei.module, "Predictor", KnowsTheAnswer)
    nuclei("--output", "out")
    assert "mask AP 100.0, AP50 100.0" in capsys.readouterr().out


def test_nuclei_demo_says_what_is_wrong_with_its_files(nuclei):
    (nuclei.folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"metrics.json' should hold AP and AP50"):
        nuclei("--output", "out")


def test_pictures_stay_readable(nuclei, tmp_path):
    nuclei("--output", "out")
    assert read_image(tmp_path / "out" / "1_instances.png", "RGB").shape == (160, 192, 3)
    assert read_image(tmp_path / "out" / "overview.png", "RGB").shape[1] == 1200
