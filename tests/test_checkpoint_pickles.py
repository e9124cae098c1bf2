"""Pickles and files of torch.save: arrays and tensors come out, and nothing else happens, whatever is in them."""

import builtins
import io
import os
import pickle
import random
import re
import struct
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mask2former.checkpoint import read_checkpoint
from mask2former.errors import UserError

PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


def state() -> "OrderedDict[str, Tensor]":
    """A small model's, with the versions of its modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    return OrderedDict(model.state_dict())


def write(path: Path, content: Any, protocol: int = 4) -> str:
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


def refusal(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(str(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 500
    return message


@PROTOCOLS
@pytest.mark.filterwarnings("error")
def test_pickled_tensors(tmp_path: Path, protocol: int) -> None:
    """As the published Swin conversions are: tensors and parameters, pickled without torch.save."""
    weights: OrderedDict[str, Any] = state()
    weights["parameter"] = nn.Parameter(torch.ones(2))
    weights["transposed"] = torch.arange(6.0).view(2, 3).T
    weights["part"] = torch.arange(12.0).view(3, 4)[1:, 1:3]
    weights["half"] = torch.ones(2, dtype=torch.float16)
    weights["index"] = torch.arange(4)
    weights["none"] = torch.ones(0, 3)
    path = write(tmp_path / "swin.pkl", {"model": weights, "__author__": "third_party"}, protocol)
    content = read_checkpoint(path)
    assert content["__author__"] == "third_party" and list(content["model"]) == list(weights)
    for name, value in weights.items():
        read = content["model"][name]
        assert read.dtype == value.dtype and not read.requires_grad
        torch.testing.assert_close(read, value.detach(), atol=0, rtol=0)


def test_pickled_versions_of_modules(tmp_path: Path) -> None:
    """Models rename the weights of their older versions by them."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    weights: Any = model.state_dict()
    read = read_checkpoint(write(tmp_path / "weights.pkl", {"model": weights}))["model"]
    assert type(read) is OrderedDict
    assert read._metadata == weights._metadata == {"": {"version": 1}, "0": {"version": 2}}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickled_arrays(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "rows": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        "part": np.arange(12, dtype=np.int64).reshape(3, 4)[::2, 1:],
        "number": np.array(3, dtype=np.int64),
        "flags": np.array([True, False]),
        "nothing": np.zeros((0, 4), np.float32),
        "other machine": np.arange(3, dtype=">f4"),
    }
    content = read_checkpoint(write(tmp_path / "weights.pkl", {"model": arrays, "step": np.float32(0.5)}, protocol))
    assert content["step"] == 0.5
    for name, array in arrays.items():
        read = content["model"][name]
        np.testing.assert_array_equal(read, array)
        assert read.flags.writeable
        torch.from_numpy(read)  # takes this machine's byte order alone


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_arrays_of_both_generations_of_numpy(tmp_path: Path, core: bytes) -> None:
    content = pickle.dumps({"model": {"a": np.arange(3)}}, 2)
    name = b"numpy._core" if b"numpy._core" in content else b"numpy.core"
    path = tmp_path / "weights.pkl"
    path.write_bytes(content.replace(name, core))
    assert read_checkpoint(str(path))["model"]["a"].tolist() == [0, 1, 2]


def test_shared_storage_and_names(tmp_path: Path) -> None:
    """One array under two names, as a pickle's memo has it."""
    array = np.arange(3)
    read = read_checkpoint(write(tmp_path / "weights.pkl", {"a": array, "b": array, "dtypes": [array[:1], array[1:]]}))
    assert read["a"] is read["b"]


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def storage_file(content: Any) -> Call:
    """What torch puts into a pickle for a tensor's storage, with ``content`` in the place of the storage."""
    return Call(torch.storage._load_from_bytes, content)


def tensor_of(storage: Any, offset: Any = 0, shape: Any = (2,), strides: Any = (1,)) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())


def saved(content: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def commands(marker: Path) -> dict[str, Any]:
    """Ways to have code run, by the name that an unrestricted unpickler would call."""
    return {
        "system": Call(os.system, f"touch '{marker}'"),
        "eval": Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "getattr": Call(getattr, Path(marker), "touch"),
        "load": Call(torch.load, str(marker)),
    }


@pytest.mark.parametrize("name", ["system", "eval", "exec", "getattr", "load"])
@pytest.mark.parametrize("place", ["pickle", "newest pickle", "zip", "old", "in pickle", "in zip", "in old"])
def test_commands_are_refused_and_not_run(tmp_path: Path, name: str, place: str) -> None:
    """Also where a tensor's storage, a file within the file, holds the command."""
    marker = tmp_path / "was run"
    command = commands(marker)[name]
    content = {"model": {"a": command}}
    path = tmp_path / ("weights.pth" if place in ("zip", "old") else "weights.pkl")
    if place in ("pickle", "newest pickle"):
        write(path, content, 2 if place == "pickle" else 5)
    elif place in ("zip", "old"):
        path.write_bytes(saved(content, place == "zip"))
    else:
        inner = pickle.dumps(command, 2) if place == "in pickle" else saved(command, place == "in zip")
        write(path, {"model": {"a": tensor_of(storage_file(inner))}})
    message = refusal(path)
    reason = "a zip file where a tensor's values belong" if place == "in zip" else f"it names .*{name}"
    assert re.search(reason, message)
    assert not marker.exists()


def test_commands_do_run_where_nothing_restricts_them(tmp_path: Path) -> None:
    for name in ("system", "eval", "exec"):
        marker = tmp_path / name
        pickle.loads(pickle.dumps(commands(marker)[name]))
        assert marker.exists()


def test_archives_of_the_oldest_kind_are_refused(tmp_path: Path) -> None:
    """torch before 2.6 unpickles what is in a tar file without restrictions."""
    marker = tmp_path / "was run"
    path = tmp_path / "weights.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Call(os.system, f"touch '{marker}'"))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refusal(path)
    assert not marker.exists()


def test_programs_are_refused(tmp_path: Path) -> None:
    """torch before 2.6 loads a TorchScript program where weights are asked for."""
    path = tmp_path / "weights.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have it exported in its newer way
        torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    assert "TorchScript" in refusal(path)


def pickled_storage() -> Any:
    """The storage of six values as it stands in a pickled tensor."""
    function, arguments = torch.arange(6.0).__reduce_ex__(2)
    return arguments[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.array([{}, "text"], dtype=object), "no numbers"),
        (np.array(["text"]), "no numbers"),
        (np.zeros(2, np.longdouble), "no numbers"),
        (np.zeros(2, dtype=[("a", "f4")]), "array of"),
        (np.ma.masked_array([1]), "names numpy"),
        ({("a", "b"): 1}, "tuple as a key"),
        ({1, 2}, "no array needs"),
        (Call(OrderedDict, [(("a",), 1)]), "tuple as a key"),
        (lambda: tensor_of(pickled_storage(), 0, (7,), (1,)), "6 values"),
        (lambda: tensor_of(pickled_storage(), 5, (2,), (1,)), "6 values"),
        (lambda: tensor_of(pickled_storage(), 0, (2, 2), (5, 1)), "6 values"),
        (lambda: tensor_of(pickled_storage(), 0, (10**6, 10**6), (0, 0)), "6 values"),
        (lambda: tensor_of(pickled_storage(), -1, (2,), (1,)), "valid shape"),
        (lambda: tensor_of(pickled_storage(), 0, (2,), (-1,)), "valid shape"),
        (lambda: tensor_of(pickled_storage(), 0, (2**62, 4), (2**62, 4)), "6 values"),
        (lambda: tensor_of(pickled_storage(), 0, (1,) * 100, (1,) * 100), "valid shape"),
        (tensor_of(np.zeros(2)), "tensor of a ndarray"),
        (tensor_of(storage_file(saved([1, 2], False))), "list where a tensor's values belong"),
        (tensor_of(storage_file(b"")), "cut short"),
        (tensor_of(storage_file(3)), "int where bytes belong"),
    ],
)
def test_what_is_no_plain_array_is_refused(tmp_path: Path, content: Any, reason: str) -> None:
    content = content() if callable(content) else content
    assert reason in refusal(write(tmp_path / "weights.pkl", {"model": {"a": content}}))


def nested_tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}" + b"K\x01r\xff\xff\xff\xff.",  # memo of four billion
        b"\x80\x04}\x8e" + struct.pack("<Q", 2**62) + b"abc.",  # bytes of four exabytes
        b"\x80\x04}X" + struct.pack("<I", 2**32 - 1) + b"abc.",
        b"\x80\x02}" + nested_tuples(100_000) + b"K\x01s.",  # hashing it would overflow the stack
        b"\x80\x02cnumpy\ndtype\nU\x02f4\x89\x88\x87R(K\x03" + nested_tuples(100_000) + b"NNNtb.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + nested_tuples(100_000) + b"K\x01\x89C\x00tb.",
        b"\x80\x02" + b")" + b"2\x86" * 60 + b".",  # pairs of pairs: 2^60 when written out
        b"\x80\x02" + b"(" * 100_000,
        b"\x80\x02]" + b"]a" * 100 + b"0" * 200,
        b"\x80\x02Q.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02K\x01}b.",
        b"\x80\x02h\x07.",
        b"\x80\x02U\x01a\x93.",
        b"\x80\x02t.",
        b".",
        b"\x80",
        b"L" + b"9" * 5000 + b"L\n.",
        b"(dS'\\x'\n.",
        b"V\\ud800\n.",
        b"\xff\xfe\x00",
    ],
)
def test_broken_opcodes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_checkpoint(str(path))


@pytest.mark.parametrize("ending", [".pkl", ".pth", ".safetensors", ".bin"])
def test_what_is_no_checkpoint(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"weights{ending}"
    path.mkdir()
    assert "is a folder" in refusal(path)
    path.rmdir()
    for content in (b"", b"\n", b"some text\n" * 50, b"<html>", bytes(100), b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        assert "no checkpoint" in refusal(path)


def files(folder: Path) -> dict[str, bytes]:
    """The same weights in every kind of file, by its ending."""
    weights = state()
    save_file(dict(weights), folder / "whole.safetensors")
    return {
        "arrays.pkl": pickle.dumps({"model": {name: value.numpy() for name, value in weights.items()}}),
        "old_arrays.pkl": pickle.dumps({"model": {name: value.numpy() for name, value in weights.items()}}, 2),
        "tensors.pkl": pickle.dumps({"model": weights}),
        "new.pth": saved({"model": weights}, zipped=True),
        "old.pth": saved({"model": weights}, zipped=False),
        "weights.safetensors": (folder / "whole.safetensors").read_bytes(),
    }


KINDS = ["arrays.pkl", "old_arrays.pkl", "tensors.pkl", "new.pth", "old.pth", "weights.safetensors"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_altered_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Cut, or with some bytes or bits changed: no other error, no crash. The seed is the kind's name."""
    content, generator = files(tmp_path)[kind], random.Random(kind)
    path = tmp_path / kind
    refused = 0
    for _ in range(60):
        altered = bytearray(content)
        if generator.random() < 0.2:
            del altered[generator.randrange(len(altered)) :]
        else:
            for _ in range(generator.choice([1, 2, 10])):
                place = generator.randrange(len(altered))
                altered[place] ^= generator.choice([1 << generator.randrange(8), generator.randrange(1, 256)])
        path.write_bytes(altered)
        try:
            read_checkpoint(str(path))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10
