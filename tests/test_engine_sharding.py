"""An optimizer's state spread over processes: the steps are those of the whole one, and checkpoints load anywhere."""

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from config_keys import config
from detectron2.utils import comm
from recipe_parts import CONFIGS
from test_engine_accumulation import batch, build
from torch import Tensor, distributed, multiprocessing, nn

from mask2former.engine import Recipe, build_optimizer, load_recipe, train
from mask2former.engine.parallel import for_all_ranks
from mask2former.engine.recipe import TestSet as EvaluatedSet  # pytest collects what is called Test*
from mask2former.engine.sharding import ShardedOptimizer
from mask2former.errors import PREEMPTED
from mask2former.modeling.checkpointing import PARTS

STEPS, HALF, WIDTH, PICTURES = 6, 3, 16, 12


class Regression(nn.Module):
    """A model with the groups of parameters that the optimizer has, and enough weights to share out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh())
        self.queries = nn.Embedding(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, batch: list[Tensor]) -> Any:
        if not self.training:
            return []
        return {"loss": self.head(self.backbone(torch.stack(batch)) @ self.queries.weight).square().mean()}


class InterruptedEvaluation:
    """The second one gets SIGTERM; the main process first, while the other goes on with its pictures."""

    def __init__(self, first_has_left: Path) -> None:
        self._evaluations = 0
        self._first_has_left = first_has_left

    def reset(self) -> None: ...

    def process(self, inputs: Any, outputs: Any) -> None: ...

    def evaluate(self) -> dict[str, Any]:
        self._evaluations += 1
        if self._evaluations == 2:
            while not (comm.is_main_process() or self._first_has_left.exists()):
                time.sleep(0.05)
            signal.raise_signal(signal.SIGTERM)
        return {}


def recipe_in(folder: str, *, shard: bool, steps: int, evaluator: Any = None) -> Recipe:
    """Every process trains on its share of the same pictures in each step."""
    options = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", folder, "MODEL.WEIGHTS", "", "SOLVER.SHARD_OPTIMIZER", str(shard)]
    recipe = load_recipe(str(CONFIGS / "quick" / "nuclei.yaml"), options)
    pictures = torch.randn(PICTURES, WIDTH, generator=torch.Generator().manual_seed(1))

    def batches() -> Iterator[list[Tensor]]:
        while True:
            yield list(pictures.chunk(comm.get_world_size())[comm.get_rank()])

    return replace(
        recipe,
        max_iter=steps,
        eval_period=2,
        checkpoint_period=100,
        build_model=Regression,
        build_train_loader=batches,
        test_sets=[EvaluatedSet("set", lambda: [[{}]], lambda: evaluator)] if evaluator else [],
    )


def trained(folder: Path, *, shard: bool, steps: int, after: str) -> None:
    """Train in this process and its peers, from what another run left if there is one."""
    if comm.get_rank() == 0:
        shutil.copytree(folder.parent / after, folder) if after else folder.mkdir()
    comm.synchronize()
    train(recipe_in(str(folder), shard=shard, steps=steps), resume=bool(after))


# Runs by name: processes, whether they shard, steps, and the run that they go on from.
RUNS: dict[str, tuple[int, bool, int, str]] = {
    "one": (1, False, STEPS, ""),
    "one, half": (1, False, HALF, ""),
    "two": (2, False, STEPS, ""),
    "two, sharded": (2, True, STEPS, ""),
    "two, sharded, half": (2, True, HALF, ""),
    "one after two, sharded": (1, False, STEPS, "two, sharded, half"),
    "two after two, sharded": (2, False, STEPS, "two, sharded, half"),
    "two, sharded, after two, sharded": (2, True, STEPS, "two, sharded, half"),
    "three, sharded, after two, sharded": (3, True, STEPS, "two, sharded, half"),
    "two, sharded, after one": (2, True, STEPS, "one, half"),
}


def _all_runs(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    folder = Path(root)
    for name, (world_size, shard, steps, after) in RUNS.items():
        if rank < world_size:
            with _group(rank, world_size, folder / f"meeting of {name}"):
                trained(folder / name, shard=shard, steps=steps, after=after)
    if rank < 2:
        with _group(rank, 2, folder / "meeting of the real model"):
            _steps_of_the_real_model(folder)
        with _group(rank, 2, folder / "meeting of the interrupted"):
            _be_interrupted(folder / "interrupted")


class _group:
    """In the block, processes are those of a run."""

    def __init__(self, rank: int, world_size: int, meeting: Path) -> None:
        self._rank, self._world_size, self._meeting = rank, world_size, meeting

    def __enter__(self) -> None:
        comm._get_global_gloo_group.cache_clear()  # of the run before
        if self._world_size > 1:
            address = f"file://{self._meeting}"
            distributed.init_process_group("gloo", init_method=address, rank=self._rank, world_size=self._world_size)

    def __exit__(self, *error: Any) -> None:
        if self._world_size > 1 and not error[0]:
            distributed.barrier()
            distributed.destroy_process_group()


def _steps_of_the_real_model(folder: Path) -> None:
    """Weights after three steps, and the bytes of each process's state of the optimizer.

    Plain; and sharded, with activation checkpointing.
    """
    half = batch()[2 * comm.get_rank() : 2 * comm.get_rank() + 2]
    found = {}
    for shard in (False, True):
        model = build(MODEL__MASK_FORMER__ACTIVATION_CHECKPOINTING=list(PARTS) if shard else [])
        optimizer = build_optimizer(config(SOLVER__SHARD_OPTIMIZER=shard, SOLVER__BASE_LR=0.01), model)
        parallel_model = for_all_ranks(model)
        scaler = torch.amp.GradScaler("cpu")
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            scaler.scale(sum(parallel_model(half).values())).backward()
            scaler.step(optimizer)
            scaler.update()
        found[shard] = model.state_dict()
        inside = optimizer.optim if isinstance(optimizer, ShardedOptimizer) else optimizer
        found["bytes", shard] = sum(value.nbytes for state in inside.state.values() for value in state.values())
    torch.save(found, folder / f"real model {comm.get_rank()}.pth")


def _be_interrupted(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    evaluator = InterruptedEvaluation(folder / "exit code 0")
    try:
        train(recipe_in(str(folder), shard=True, steps=STEPS, evaluator=evaluator))
    except SystemExit as end:
        (folder / f"exit code {comm.get_rank()}").write_text(str(end.code))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: one start of processes for all of them, which takes most of the time."""
    root = tmp_path_factory.mktemp("runs")
    multiprocessing.spawn(_all_runs, (str(root),), nprocs=3)
    return root


def checkpoint(runs: Path, name: str) -> dict[str, Any]:
    return torch.load(runs / name / "model_final.pth", weights_only=True)


def test_three_steps_are_the_same_to_the_bit(runs: Path) -> None:
    for rank in range(2):
        found = torch.load(runs / f"real model {rank}.pth")
        torch.testing.assert_close(found[True], found[False], rtol=0, atol=0)
        assert found["bytes", True] == pytest.approx(found["bytes", False] / 2, rel=0.05)


def test_checkpoints_are_the_same_to_the_bit(runs: Path) -> None:
    sharded, plain = checkpoint(runs, "two, sharded"), checkpoint(runs, "two")
    assert len(plain["trainer"]["optimizer"]["state"]) == 7
    for part in ("model", "iteration"):
        torch.testing.assert_close(sharded[part], plain[part], rtol=0, atol=0)
    ours, theirs = (content["trainer"]["optimizer"] for content in (sharded, plain))
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in theirs["param_groups"]]


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[3]])
def test_a_run_goes_on_with_other_processes(runs: Path, name: str) -> None:
    processes, _, _, after = RUNS[name]
    exact = processes == RUNS[after][0]  # else gradients are sums in another order
    whole, resumed = checkpoint(runs, "two" if exact else "one"), checkpoint(runs, name)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(resumed["model"], whole["model"], **tolerance)
    states = [content["trainer"]["optimizer"]["state"] for content in (resumed, whole)]
    assert {state["step"].item() for state in states[0].values()} == {STEPS}
    torch.testing.assert_close(*states, **tolerance)
    before = checkpoint(runs, after)["model"]
    assert not torch.allclose(before["head.weight"], resumed["model"]["head.weight"], atol=1e-6)


def test_a_signal_to_one_process_in_an_evaluation(runs: Path) -> None:
    """It saves alone, what all had sent before."""
    folder = runs / "interrupted"
    assert [(folder / f"exit code {rank}").read_text() for rank in range(2)] == [str(PREEMPTED)] * 2
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"
    state = torch.load(folder / "model_0000003.pth", weights_only=True)["trainer"]["optimizer"]["state"]
    assert len(state) == 7 and {value["step"].item() for value in state.values()} == {4}
