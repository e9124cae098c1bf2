"""Checkpoints in every form that the project reads, whole and damaged, and what reads them."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from safetensors.torch import load, save
from torch import nn

from mask2former.checkpoint import write_hugging_face
from mask2former.engine import Recipe, evaluate_weights, load_recipe, train
from mask2former.engine.recipe import TestSet

from .changes import Change, change_bytes, change_value
from .runner import MARKER, Subject, Verdict, digest, in_process

__all__ = ["RECIPE", "damage_checkpoint", "checkpoint_subjects"]

RECIPE = f"""\
_BASE_: {Path(__file__).resolve().parents[2] / "configs" / "quick" / "nuclei.yaml"}
MODEL:
  WEIGHTS: ""
  BACKBONE: {{NAME: build_resnet_backbone, FREEZE_AT: 0}}
  RESNETS:
    DEPTH: 50
    STRIDE_IN_1X1: False
    RES2_OUT_CHANNELS: 8
    WIDTH_PER_GROUP: 4
    STEM_OUT_CHANNELS: 8
    OUT_FEATURES: [res2, res3, res4, res5]
  SEM_SEG_HEAD:
    NUM_CLASSES: 3
    CONVS_DIM: 32
    MASK_DIM: 32
    TRANSFORMER_ENC_LAYERS: 1
    DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS: 4
    DEFORMABLE_TRANSFORMER_ENCODER_DIM_FEEDFORWARD: 32
  MASK_FORMER:
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 8
    DIM_FEEDFORWARD: 32
    DEC_LAYERS: 2
    TRAIN_NUM_POINTS: 64
    TEST: {{TILE_SIZE: 0}}
INPUT: {{DATASET_MAPPER_NAME: coco_panoptic_lsj, IMAGE_SIZE: 64, MIN_SIZE_TEST: 48, MAX_SIZE_TEST: 64, SCALE_TEST: 0.0}}
DATASETS: {{TRAIN: [], TEST: []}}
SOLVER: {{IMS_PER_BATCH: 2, EMA_DECAY: 0.9, WARMUP_ITERS: 0}}
DATALOADER: {{NUM_WORKERS: 0}}
"""
STEPS = 2
FIRST, SECOND = "model_0000000.pth", "model_0000001.pth"
# What a run writes beside its checkpoints.
RUN_FILES = ("model_*", "last_checkpoint", "metrics.*", "events.*")


# ------------------------------------------------------------------------------------------- reading them


class PictureDigest:
    """An evaluator whose score is made of the model's output, so that other weights give another."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def reset(self) -> None:
        self.outputs = []

    def process(self, inputs: Any, outputs: Any) -> None:
        self.outputs += [output["sem_seg"] for output in outputs]

    def evaluate(self) -> dict[str, Any]:
        return {"output": {"mean": float(self.outputs[0].float().mean())}}


def picture() -> dict[str, Any]:
    """A sample as the mapper makes one, with two objects."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[0, 5:20, 5:30] = masks[1, 20:45, 30:60] = True
    instances = Instances((48, 64), gt_classes=torch.tensor([0, 2]), gt_masks=masks)
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 5, 30, 20], [30, 20, 60, 45]]))
    image = torch.randint(256, (3, 48, 64), generator=generator, dtype=torch.uint8)
    padding = torch.zeros(48, 64, dtype=torch.bool)
    return {
        "file_name": "picture.png",
        "image_id": 1,
        "height": 48,
        "width": 64,
        "image": image,
        "instances": instances,
        "padding_mask": padding,
    }


class Loader:
    """Endless batches of one sample, with a position as the project's loader has it."""

    def __init__(self) -> None:
        self.state = {"seed": 3, "batches": 0}

    def __iter__(self) -> Any:
        while True:
            self.state = {**self.state, "batches": self.state["batches"] + 1}
            yield [picture()]

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


def _recipe(path: Path, output_dir: Path, model: nn.Module, **values: Any) -> tuple[Recipe, PictureDigest]:
    """The small model's recipe, with its evaluation."""
    evaluator = PictureDigest()
    recipe = replace(
        load_recipe(str(path), ["OUTPUT_DIR", str(output_dir)]),
        build_model=lambda: model,
        build_train_loader=Loader,
        test_sets=[TestSet("picture", lambda: [[picture()]], lambda: evaluator)],
        log_period=1,
        **values,
    )
    return recipe, evaluator


def _evaluate(recipe_path: Path, model: nn.Module, name: str, folder: Path, output: Path) -> str:
    """``train_net.py --eval-only MODEL.WEIGHTS <name>``."""
    recipe, evaluator = _recipe(recipe_path, output, model, weights=str(folder / name))
    evaluate_weights(recipe)
    return digest(model.state_dict(), evaluator.outputs)


def _evaluate_resumed(recipe_path: Path, model: nn.Module, folder: Path, output: Path) -> str:
    """``train_net.py --eval-only --resume``."""
    recipe, evaluator = _recipe(recipe_path, folder, model)
    evaluate_weights(recipe, resume=True)
    return digest(evaluator.outputs)


def _resume(recipe_path: Path, model: nn.Module, best_metric: str, folder: Path, output: Path) -> str:
    """``train_net.py --resume``, for one more step."""
    period = 1 if best_metric else 0
    recipe, evaluator = _recipe(
        recipe_path, folder, model, max_iter=STEPS + 1, best_metric=best_metric, eval_period=period
    )
    train(recipe, resume=True)
    last = torch.load(folder / "model_final.pth", weights_only=True)
    best = json.loads((folder / "model_best.json").read_text(encoding="utf-8")) if best_metric else None
    return digest(last, evaluator.outputs, best)


# --------------------------------------------------------------------------------------------- making them


def checkpoint_subjects(work: Path, model: nn.Module) -> list[Subject]:
    """Every form of checkpoint, from a short run in ``work``, and what reads it. ``model`` is a small one."""
    recipe_path = work / "recipe.yaml"
    run = _run_files(recipe_path, work / "run", model)
    evaluate = partial(partial, _evaluate, recipe_path, model)
    state = torch.load(io.BytesIO(run[SECOND]), weights_only=True)
    weights = OrderedDict(state["model"])
    arrays = {name: value.numpy() for name, value in weights.items()}
    backbone = {name.removeprefix("backbone."): value for name, value in arrays.items() if "backbone." in name}
    hugging_face = _hugging_face(weights, work / "hugging_face")
    both = {name: run[name] for name in (FIRST, SECOND, "last_checkpoint")}
    records = {name: run[name] for name in (SECOND, "last_checkpoint", "model_best.json", "metrics.json")}

    def one(name: str, content: bytes) -> Subject:
        return Subject(name.replace("model.", "weights, "), {name: content}, [name], evaluate(name))

    return [
        Subject("resumed run", both, [SECOND], partial(_resume, recipe_path, model, ""), RUN_FILES),
        Subject("resumed run", both, [SECOND], partial(_resume, recipe_path, model, ""), RUN_FILES),
        Subject(
            "records of a resumed run",
            records,
            ["last_checkpoint", "model_best.json", "metrics.json"],
            partial(_resume, recipe_path, model, "output/mean"),
            RUN_FILES,
        ),
        Subject("evaluated run", both, [SECOND], partial(_evaluate_resumed, recipe_path, model), ()),
        one("model.pth", run[SECOND]),
        one("model.older.pth", _saved({"model": weights}, zipped=False)),
        one("model.arrays.pkl", pickle.dumps({"model": arrays, "__author__": "Detectron2"}, protocol=2)),
        one("model.tensors.pkl", pickle.dumps({"model": weights, "iteration": 1}, protocol=4)),
        one(
            "model.backbone.pkl",
            pickle.dumps({"model": backbone, "matching_heuristics": True, "__author__": "MSRA"}, protocol=2),
        ),
        one("model.safetensors", save(weights)),
        Subject(
            "Hugging Face's folder",
            {f"theirs/{name}": content for name, content in hugging_face.items()},
            ["theirs/model.safetensors"],
            evaluate("theirs"),
        ),
        Subject(
            "Hugging Face's older folder",
            {"theirs/pytorch_model.bin": _saved(load(hugging_face["model.safetensors"]))},
            ["theirs/pytorch_model.bin"],
            evaluate("theirs"),
        ),
    ]


def _run_files(recipe_path: Path, folder: Path, model: nn.Module) -> dict[str, bytes]:
    """The files of a run of two steps, each with a checkpoint and an evaluation."""
    folder.mkdir()
    recipe, _ = _recipe(
        recipe_path, folder, model, max_iter=STEPS, checkpoint_period=1, best_metric="output/mean", eval_period=1
    )

    def run() -> str:
        train(recipe)
        return ""

    outcome = in_process(run, folder.with_name("making"), seconds=120, memory=2**32)  # the model stays as it is here
    if outcome.verdict is not Verdict.SAME:
        raise RuntimeError(f"the run that makes checkpoints failed: {outcome.text}")
    shutil.copy(folder / "model_final.pth", folder / SECOND)
    (folder / "last_checkpoint").write_text(SECOND, encoding="utf-8")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _hugging_face(weights: dict[str, torch.Tensor], folder: Path) -> dict[str, bytes]:
    write_hugging_face(weights, str(folder))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _saved(content: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


# ------------------------------------------------------------------------------------------- damaging them


def damage_checkpoint(path: Path, rng: random.Random) -> Change:
    """Damage a checkpoint or a record of a run in place; what was done."""
    kind = rng.random()
    if kind < 0.03 and path.name != "metrics.json":  # which is only written to
        path.unlink()
        path.mkdir()
        return Change("a folder in its place")
    if kind < 0.06:
        path.unlink()
        return Change("removed")
    content = path.read_bytes()
    if kind < 0.4 or path.name == "last_checkpoint":
        content, change = change_bytes(content, rng)
    elif kind < 0.55 and path.suffix != ".json":
        name = rng.choice(list(HOSTILE))
        content, change = HOSTILE[name](content), Change(name)
    else:
        content, change = _change_content(path, content, rng)
    path.write_bytes(content)
    return change


def _change_content(path: Path, content: bytes, rng: random.Random) -> tuple[bytes, Change]:
    """The file with a value of what it holds changed, in its own format and with the right checksums."""
    if path.suffix == ".json":
        lines = [json.loads(line) for line in content.splitlines()]
        lines, change = change_value(lines, rng)
        records = lines if isinstance(lines, list) else [lines]
        return "\n".join(map(json.dumps, records)).encode(), change
    if path.suffix == ".safetensors":
        return _change_safetensors(content, rng)
    if path.suffix == ".pkl":
        value, change = change_value(pickle.loads(content), rng)
        return pickle.dumps(value, protocol=2), change
    zipped = zipfile.is_zipfile(io.BytesIO(content))
    value, change = change_value(torch.load(io.BytesIO(content), weights_only=True), rng)
    return _saved(value, zipped=zipped), change


def _change_safetensors(content: bytes, rng: random.Random) -> tuple[bytes, Change]:
    (length,) = struct.unpack("<Q", content[:8])
    header, change = change_value(json.loads(content[8 : 8 + length]), rng)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :], replace(change, wrong_type=False)


class _Command:
    """What a pickle calls when it is read without restrictions."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _zip_with(content: bytes, member: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file with another ``member`` in the place of its own."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        content = _saved({"model": {}})
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w", compression) as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name != f"{root}/{member}":
                new.writestr(name, old.read(name))
        new.writestr(f"{root}/{member}", data)
    return changed.getvalue()


def _nested(opener: bytes, closer: bytes, count: int) -> bytes:
    return b"\x80\x02" + opener * count + closer * (count - 1) + b"."


def _weights_of(values: Iterable[tuple[str, Any]]) -> bytes:
    return _saved({"model": OrderedDict(values)})


def _with_metadata(value: Any) -> bytes:
    weights = OrderedDict([("backbone.stem.conv1.weight", torch.zeros(8, 3, 7, 7))])
    weights._metadata = value  # type: ignore[attr-defined]
    return _saved({"model": weights})


def _shared_weights(count: int) -> bytes:
    """Tensors that claim to be large, of one small storage."""
    large = torch.zeros(1).expand(count, 1000)
    return _weights_of([("backbone.stem.conv1.weight", large)])


TOUCH = (Path.touch, Path(MARKER))
SHELL = (os.system, f"touch {MARKER}")
# Whole files in the place of the good one.
HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "a pickle that runs a shell command": lambda _: pickle.dumps({"model": _Command(*SHELL)}),
    "a pickle that calls a function": lambda _: pickle.dumps(_Command(*TOUCH)),
    "an older file of torch.save that runs a shell command": lambda _: _saved(_Command(*SHELL), zipped=False),
    "a file of torch.save that runs a shell command": lambda _: _saved({"model": {}, "trainer": _Command(*SHELL)}),
    "a zip file whose pickle calls exec": lambda good: _zip_with(
        good, "data.pkl", pickle.dumps(_Command(exec, f"open({MARKER!r}, 'w')"))
    ),
    "a TorchScript program": lambda good: _zip_with(good, "constants.pkl", pickle.dumps(())),
    "a zip file with a very large pickle": lambda good: _zip_with(
        good, "data.pkl", bytes(300 * 2**20), zipfile.ZIP_DEFLATED
    ),
    "a zip file with very large weights": lambda good: _zip_with(
        good, "data/0", bytes(300 * 2**20), zipfile.ZIP_DEFLATED
    ),
    "lists in lists": lambda _: _nested(b"]", b"a", 100_000),
    "tuples in tuples": lambda _: _nested(b")", b"\x85", 1) + b"\x85" * 100_000 + b".",
    "a memo index of four billion": lambda _: b"\x80\x02Nr\xff\xff\xff\xff.",
    "text of 2 ** 62 bytes": lambda _: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "a header of 2 ** 62 bytes": lambda _: struct.pack("<Q", 2**62) + b"{}",
    "an empty dict": lambda _: _saved({}),
    "no weights": lambda _: _saved({"model": {}}),
    "weights of another model": lambda _: _weights_of([("weight", torch.zeros(3))]),
    "a list": lambda _: _saved([torch.zeros(3)]),
    "a tensor alone": lambda _: _saved(torch.zeros(3)),
    "sparse weights": lambda _: _weights_of([("backbone.stem.conv1.weight", torch.zeros(8, 3, 7, 7).to_sparse())]),
    "quantized weights": lambda _: _weights_of(
        [("backbone.stem.conv1.weight", torch.quantize_per_tensor(torch.zeros(8, 3, 7, 7), 1.0, 0, torch.quint8))]
    ),
    "weights without values": lambda _: _weights_of(
        [("backbone.stem.conv1.weight", torch.zeros(8, 3, 7, 7, device="meta"))]
    ),
    "nested weights": lambda _: _weights_of(
        [("backbone.stem.conv1.weight", torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))]
    ),
    "complex weights": lambda _: _weights_of(
        [("backbone.stem.conv1.weight", torch.zeros(8, 3, 7, 7, dtype=torch.complex64))]
    ),
    "weights of a huge size": lambda _: _shared_weights(2**50),
    "numbers in the place of names": lambda _: _saved({"model": {1: torch.zeros(3), 2: torch.zeros(3)}}),
    "a number in the place of versions": lambda _: _with_metadata(5),
    "text in the place of versions": lambda _: _with_metadata({"": "text", "sem_seg_head": {"version": "text"}}),
    "names with NUL and new lines": lambda _: _weights_of([("a\0b\nc", torch.zeros(3)), ("\ud800", torch.zeros(3))]),
    "arrays of objects": lambda _: pickle.dumps({"model": {"weight": np.array([None, "x"], dtype=object)}}),
    "arrays of text": lambda _: pickle.dumps({"model": {"weight": np.array(["x", "y"])}}),
    "Detectron's blobs without values": lambda _: pickle.dumps(
        {"blobs": {"conv1_w": np.zeros(0), "fc_b": np.zeros(())}}
    ),
    "Detectron's blobs that are no arrays": lambda _: pickle.dumps({"blobs": {"conv1_w": "text"}}),
    "Detectron's blobs of other shapes": lambda _: pickle.dumps(
        {"blobs": {"conv1_w": np.zeros((3, 3), "f4"), "res2_0_branch1_w": np.zeros(5, "f4")}}
    ),
}
