"""Gradients of several processes."""

import copy
from pathlib import Path

import torch
from detectron2.utils import comm
from torch import distributed, multiprocessing, nn

from mask2former.engine.parallel import for_all_ranks

RANKS = 3  # the sum of two numbers doesn't depend on their order
SIZE = 64


class Layers(nn.Module):
    """Its gradients come in another order than that of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(values))


def _steps(rank: int, folder: str) -> None:
    """The second of two steps, and the same one in a resumed run."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    comm.create_local_process_group(RANKS)
    torch.manual_seed(0)
    model = Layers()
    resumed = copy.deepcopy(model)
    torch.manual_seed(rank)
    values = torch.randn(2, SIZE)
    parallel_model, parallel_resumed = for_all_ranks(model), for_all_ranks(resumed)
    parallel_model(values).sum().backward()
    model.zero_grad()
    for each in (parallel_model, parallel_resumed):
        each(values).square().sum().backward()
    if rank == 0:
        torch.save([[p.grad for p in each.parameters()] for each in (model, resumed)], f"{folder}/gradients.pth")
    distributed.barrier()
    distributed.destroy_process_group()


def test_a_resumed_runs_gradients_have_an_uninterrupted_ones_bits(tmp_path: Path) -> None:
    multiprocessing.spawn(_steps, (str(tmp_path),), nprocs=RANKS)
    whole, resumed = torch.load(tmp_path / "gradients.pth")
    for first, second in zip(whole, resumed, strict=True):
        assert torch.equal(first, second)
