"""What a run's checkpoint holds besides weights: nonsense in it is one line, not a traceback steps later."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from mask2former.checkpoint import Checkpointer, WrongState, check_state
from mask2former.engine.hooks import LossHistory, LRScheduler
from mask2former.engine.repeatable import Repeatable
from mask2former.errors import UserError


class Loader:
    def __init__(self) -> None:
        self.state = {"seed": 1, "batches": 0}

    def __iter__(self) -> Any:
        return iter([[{}]] * 9)

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


class Model(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.weight.sum()}


def make_run(folder: Path, width: int = 3) -> tuple[SimpleTrainer, Checkpointer]:
    model = Model(width)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = Loader()
    trainer = SimpleTrainer(model, loader, optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    trainer.register_hooks([Repeatable(1, loader), LossHistory(), LRScheduler(optimizer, schedule)])
    return trainer, Checkpointer(model, str(folder), trainer=trainer, ema=Model(width))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trainer, checkpointer = make_run(tmp_path)
    trainer.train(0, 2)
    trainer.storage.put_scalar("loss", 1.0)
    checkpointer.save("model_0000001", iteration=1)
    return tmp_path / "model_0000001.pth"


def at(content: Any, path: str) -> tuple[Any, Any]:
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in parents:
        content = content[key]
    return content, last


def replace(path: str, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        parent, key = at(content, path)
        parent[key] = value

    return change


def remove(path: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        parent, key = at(content, path)
        del parent[key]

    return change


STATE = "trainer/optimizer/state/0"
HOOKS = "trainer/hooks"
BROKEN = {
    "trainer is 5, expected a dict": replace("trainer", 5),
    "trainer lacks 'optimizer'": remove("trainer/optimizer"),
    r"trainer.iteration is '1', expected an integer": replace("trainer/iteration", "1"),
    "trainer.iteration is -2": replace("trainer/iteration", -2),
    "trainer.iteration is nan": replace("trainer/iteration", math.nan),
    "trainer.hooks is a list": replace(HOOKS, []),
    r"trainer.optimizer.param_groups is a list of 0, expected a list of 1": replace(
        "trainer/optimizer/param_groups", []
    ),
    r"param_groups\[0\].eps is None": replace("trainer/optimizer/param_groups/0/eps", None),
    r"param_groups\[0\].foreach is a list": replace("trainer/optimizer/param_groups/0/foreach", [1]),
    r"state\[0\].exp_avg is True, expected a tensor of shape \[3\]": replace(f"{STATE}/exp_avg", True),
    r"state\[0\].exp_avg_sq is a tensor of shape \[4\]": replace(f"{STATE}/exp_avg_sq", torch.zeros(4)),
    r"state\[0\].step is tensor|state\[0\].step is a tensor": replace(f"{STATE}/step", torch.tensor(math.nan)),
    "ema lacks 'weight'": remove("ema/weight"),
    "ema.weight is a tensor of shape": replace("ema/weight", torch.zeros(2)),
    "ema has 'more', which this run's has not": replace("ema/more", torch.zeros(2)),
    "Repeatable.seed is -1": replace(f"{HOOKS}/Repeatable/seed", -1),
    "loader.batches is 9+, expected at most the 3 steps": replace(f"{HOOKS}/Repeatable/loader/batches", 10**18 - 1),
    "loader lacks 'batches'": remove(f"{HOOKS}/Repeatable/loader/batches"),
    "LRScheduler.last_epoch is None": replace(f"{HOOKS}/LRScheduler/last_epoch", None),
    r"LRScheduler._last_lr is a list of 2": replace(f"{HOOKS}/LRScheduler/_last_lr", [1.0, 1.0]),
    r"LossHistory.loss is 'text'": replace(f"{HOOKS}/LossHistory/loss", "text"),
    r"LossHistory.loss\[0\]\[1\] is 'text'": replace(f"{HOOKS}/LossHistory/loss/0/1", "text"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_nonsense_is_named(message: str, saved: Path, tmp_path: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["trainer"]["hooks"]["LossHistory"] = {"loss": [[1.0, 0]]}
    BROKEN[message](content)
    torch.save(content, saved)
    with pytest.raises(UserError, match=message) as caught:
        make_run(tmp_path)[1].resume_or_load("", resume=True)
    assert str(saved) in str(caught.value) and "without --resume" in str(caught.value)


def test_what_fits_is_taken(saved: Path, tmp_path: Path) -> None:
    trainer, checkpointer = make_run(tmp_path)
    content = torch.load(saved, weights_only=True)
    group = content["trainer"]["optimizer"]["param_groups"][0]
    del group["maximize"]  # which an older torch may not have
    group.update(weight_decay=0, foreach=False)
    torch.save(content, saved)
    checkpointer.resume_or_load("", resume=True)
    assert trainer.iter == 2 and trainer.optimizer.state_dict()["state"][0]["step"] == 2
    assert trainer.optimizer.param_groups[0]["maximize"] is False


@pytest.mark.parametrize("text", [b"\xff\xfe\x00?", b"a\nb", b"model_0000001.pth?x=1", b"a" * 300, b""])
def test_a_broken_record_of_the_last_one(text: bytes, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_bytes(text)
    trainer, checkpointer = make_run(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    assert trainer.iter == 2


def test_another_model_is_told(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="checkpoint .*none of the checkpoint's 1 weights fits"):
        make_run(tmp_path, width=4)[1].load(str(saved), checkpointables=[])


@pytest.mark.parametrize(
    ("found", "like"),
    [
        (True, 1),
        (1.5, 1),
        (math.inf, 1.0),
        ("1", 1.0),
        (1, "text"),
        (0, False),
        ([1], [1, 2]),
        ({}, {"a": 1}),
        ("x", None),
    ],
)
def test_kinds(found: Any, like: Any) -> None:
    with pytest.raises(WrongState, match="^it "):
        check_state(found, like, "it")


@pytest.mark.parametrize(
    ("found", "like"), [(2, 1), (2, 1.0), ((1, 2), [0, 0]), ({"a": 1, "b": "x"}, {"a": 0}), (1, None)]
)
def test_kinds_that_fit(found: Any, like: Any) -> None:
    check_state(found, like, "it")


STRANGE = {
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "without values": lambda: torch.zeros(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)]),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_weights_are_plain_tensors(kind: str, tmp_path: Path) -> None:
    torch.save({"model": {"weight": STRANGE[kind]()}}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth"):
        Checkpointer(Model()).load(str(tmp_path / "model.pth"))


def test_versions_that_are_none_are_left_out(tmp_path: Path) -> None:
    weights = Model().state_dict()
    weights._metadata = 5
    torch.save({"model": weights}, tmp_path / "model.pth")
    model = Model()
    nn.init.zeros_(model.weight)
    Checkpointer(model).load(str(tmp_path / "model.pth"))
    assert model.weight.tolist() == [1, 1, 1]
