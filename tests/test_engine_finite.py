"""Steps whose numbers are not finite: not taken, explained, and what is saved is from before."""

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm
from scripts import Program
from test_engine_selection import Counter, base, last, saved, ten_steps
from test_engine_train import NO_EVALUATION, data, data_root, recipe_file, train_net
from tiny_dataset import TinyNames
from torch import Tensor, distributed, multiprocessing, nn

from mask2former.engine import Recipe, train
from mask2former.engine.finite import FiniteSteps
from mask2former.errors import UserError
from mask2former.modeling.loss_in_parts import LossInParts

__all__ = ["base", "data", "data_root", "recipe_file", "train_net"]  # fixtures


class Pictures:
    """Two pictures a step, by name: 0a.png and 0b.png, then 1a.png and 1b.png."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            self.position += 1
            yield [{"file_name": f"{self.position - 1}{name}.png"} for name in "ab"]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Breaks(LossInParts, Counter):
    """Makes ``break_loss`` of its loss when it sees the picture ``broken``."""

    broken = "3b.png"

    def __init__(self, break_loss: Callable[[Tensor], Tensor] = lambda loss: loss * math.nan) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.zeros(1))
        self.break_loss = break_loss

    def forward(self, batch: Any) -> Any:
        self.seen += len(batch)
        loss = -self.weight.sum() * len(batch) / 2
        names = [sample["file_name"] for sample in batch]
        return {"loss_a": self.break_loss(loss) if self.broken in names else loss, "loss_b": 0 * self.other.sum()}


def broken(base: Recipe, model: Callable[[], nn.Module] = Breaks, **values: Any) -> Recipe:
    return replace(base, test_sets=[], build_model=model, build_train_loader=Pictures, **values)


def infinite_gradient(loss: Tensor) -> Tensor:
    """The loss itself, whose gradient is not finite, as that of a square root at 0."""
    return loss + (loss - loss.detach()).sqrt()


def error_of(recipe: Recipe, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        train(recipe, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_loss(base: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Step 4 of pictures 3a and 3b is not taken; the run goes on from there when they are mended."""
    with caplog.at_level(logging.ERROR):
        message = error_of(broken(base))
    path = tmp_path / "model_0000002.pth"
    assert message.startswith(
        f"step 4 is not taken; not finite: loss_a of 3a.png, 3b.png; --resume goes on from {path}. "
    )
    assert "3a.png, 3b.png: loss_a nan, loss_b 0" in caplog.messages
    assert "1 of 2 gradients are not finite: weight" in caplog.messages
    assert "largest gradients: other 0" in caplog.messages
    assert "in the step before: largest gradients: weight 1, other 0" in caplog.messages
    assert last(tmp_path) == path.name and saved(tmp_path, "model_0000002") == 3
    content = torch.load(path, weights_only=True)
    assert content["trainer"]["hooks"]["Repeatable"]["loader"] == {"position": 3}
    assert content["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == 3

    assert "step 4 is not taken" in error_of(broken(base), resume=True)
    assert saved(tmp_path, "model_0000002") == 3
    train(broken(base, lambda: Breaks(lambda loss: loss)), resume=True)
    assert saved(tmp_path, "model_final") == 10


def test_a_gradient(base: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The losses of the step are finite; its weights would not have been."""
    with caplog.at_level(logging.ERROR):
        message = error_of(broken(base, lambda: Breaks(infinite_gradient)))
    assert message.startswith("step 4 is not taken; not finite: the gradient of weight, with 3a.png, 3b.png; ")
    assert "3a.png, 3b.png: loss_a -3, loss_b 0" in caplog.messages
    assert (
        "1 of 2 gradients are not finite: weight" in caplog.messages and "largest gradients: other 0" in caplog.messages
    )
    assert saved(tmp_path, "model_0000002") == 3


def test_in_the_first_step(base: Recipe, tmp_path: Path) -> None:
    class BreaksAtOnce(Breaks):
        broken = "0a.png"

    message = error_of(broken(base, BreaksAtOnce, max_iter=1))
    assert "step 1 is not taken; not finite: loss_a of 0a.png, 0b.png; nothing has been trained before" in message
    assert not list(tmp_path.glob("*.pth"))


def test_weights_that_are_broken_are_not_saved(base: Recipe, tmp_path: Path) -> None:
    """Statistics of batch norm, say, that a forward pass has spoiled."""

    class Spoiled(Breaks):
        def forward(self, batch: Any) -> Any:
            losses = super().forward(batch)
            if not losses["loss_a"].isfinite():
                self.seen *= math.nan
            return losses

    message = error_of(broken(base, Spoiled, checkpoint_period=2))
    path = tmp_path / "model_0000001.pth"
    assert f"nor is seen of the model; --resume goes on from {path}" in message
    assert [path] == list(tmp_path.glob("*.pth"))


def test_the_average_is_from_before(base: Recipe, tmp_path: Path) -> None:
    error_of(broken(base, ema_decay=0.5))
    assert saved(tmp_path, "model_ema") == 2.25  # of 1, 2 and 3


def test_the_last_step_is_not_evaluated(base: Recipe) -> None:
    """Detectron2's hook takes a run that fails in its last step for one that is done."""
    evaluated: list[Any] = []
    test_set = replace(base.test_sets[0], build_loader=lambda: evaluated.append(1))
    error_of(replace(broken(base, max_iter=4, eval_period=0), test_sets=[test_set]))
    assert not evaluated


def test_a_part_of_a_batch(base: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With accumulation the part that is not finite is named."""
    with caplog.at_level(logging.ERROR):
        message = error_of(broken(base, accumulation_steps=2))
    assert message.startswith("step 4 is not taken; not finite: loss_a of 3b.png; ")
    assert [x for x in caplog.messages if ".png: " in x] == [
        "3a.png: loss_a -1.5, loss_b 0",
        "3b.png: loss_a nan, loss_b 0",
    ]
    assert saved(tmp_path, "model_0000002") == 3


class Scaler:
    """A gradient scaler, which leaves out steps of infinite gradients."""

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return 8.0


class Trainer:
    """What the hook sees of a trainer in the middle of a step."""

    iter, start_iter = 5, 0


def test_scaled_gradients_may_be_infinite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Breaks()
    checkpointer = type("Checkpointer", (), {"get_checkpoint_file": lambda self: "", "save": lambda *_, **__: None})()
    hook = FiniteSteps(model, checkpointer, Pictures())
    hook.trainer = trainer = Trainer()
    hook.before_train()

    def step(name: str) -> None:
        hook.before_step()
        model([{"file_name": name}])
        model.weight.grad, model.other.grad = torch.tensor([math.inf]), torch.tensor([24.0, 32.0])
        hook.after_backward()

    with pytest.raises(UserError, match="not finite: the gradient of weight, with a.png"):
        step("a.png")
    trainer.grad_scaler = Scaler()
    step("a.png")
    with caplog.at_level(logging.ERROR), pytest.raises(UserError, match="loss_a of 3b.png"):
        step("3b.png")
    assert "largest gradients: other 5" in caplog.messages


def test_a_run_that_diverges(data: TinyNames, train_net: Program, tmp_path: Path) -> None:
    """The whole program with a learning rate that is much too high: one error, which is enough to go on."""
    options = [*NO_EVALUATION, "SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.MAX_ITER", "20"]
    code, printed = train_net(*options, "SOLVER.BASE_LR", "1e18")
    assert code == 1 and "Traceback" not in printed
    (error,) = (line for line in printed.splitlines() if line.startswith("error: "))
    step = int(re.match(r"error: step (\d+) is not taken; not finite: ", error)[1])
    assert re.search(r"00[1-4]\.png", error) and "lower SOLVER.BASE_LR" in error
    assert re.search(r"00[1-4]\.png: loss_ce_0 \S+, loss_mask_0 .*, loss_dice \S+$", printed, re.MULTILINE)
    assert re.search(r"in the step before: largest gradients: sem_seg_head\S+ [\d.]+, ", printed)
    kept = tmp_path / "output" / f"model_{step - 2:07d}.pth"
    assert f"--resume goes on from {Path('output') / kept.name}" in error.replace("./", "")
    weights = torch.load(kept, weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())


# -------------------------------------------------------------------------------------- two processes


def _run_of_a_rank(rank: int, repository: Path, folder: Path) -> None:
    """The picture that breaks is the second process's."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    Breaks.broken = "3b.png" if rank else ""
    message = error_of(broken(ten_steps(repository, folder)))
    (folder / f"error_{rank}").write_text(message)
    distributed.barrier()
    distributed.destroy_process_group()


def test_all_ranks_end_together(repository: Path, tmp_path: Path) -> None:
    """What the second process finds is the error of both, and the first has saved."""
    multiprocessing.spawn(_run_of_a_rank, (repository, tmp_path), nprocs=2)
    errors = [(tmp_path / f"error_{rank}").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("step 4 is not taken; not finite: loss_a of 3a.png, 3b.png; --resume goes on from ")
    assert saved(tmp_path, "model_0000002") == 3
