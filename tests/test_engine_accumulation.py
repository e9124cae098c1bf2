"""Parts of a batch, one after the other or on several processes: the gradients are those of the whole batch."""

from typing import Any

import pytest
import torch
from config_keys import config
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, distributed, multiprocessing, nn

from mask2former.engine.accumulation import AccumulatingTrainer
from mask2former.engine.parallel import for_all_ranks
from mask2former.errors import UserError
from mask2former.modeling import matcher as matcher_module
from mask2former.modeling import points as points_module

SIDE = 64
# In the pictures of a batch: one has more than there are queries; of two processes, the second has none at all.
OBJECTS = (3, 12, 0, 0)
MASK_LOSSES, CLASS_LOSS = ("loss_mask", "loss_dice"), ("loss_ce",)


def same_points(*shape: int, device: torch.device) -> Tensor:
    """In the place of ``random_points``: the same ones for each mask, whichever masks are beside it."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(shape[-1], 2, generator=generator) * 2 - 1
    return points.expand(*shape, 2)


def use_same_points() -> None:
    points_module.random_points = matcher_module.random_points = same_points


@pytest.fixture(autouse=True)
def repeatable(one_thread_and_seed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (points_module, matcher_module):
        monkeypatch.setattr(module, "random_points", same_points)


def build(**values: Any) -> nn.Module:
    """A small model with the same random weights at every call.

    No points are chosen by uncertainty, where rounding could turn one into another.
    """
    torch.manual_seed(0)
    fixed = {"TRAIN_NUM_POINTS": 64, "IMPORTANCE_SAMPLE_RATIO": 0.0, "DROPOUT": 0.0}
    fixed = {f"MODEL__MASK_FORMER__{key}": value for key, value in fixed.items()}
    return build_model(config(**{**fixed, **values})).train()


def batch() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for count in OBJECTS:
        instances = Instances((SIDE, SIDE))
        instances.gt_classes = torch.randint(0, 2, (count,), generator=generator)
        corners = torch.randint(0, SIDE // 2, (count, 2), generator=generator)
        rows = torch.arange(SIDE)
        inside = [(rows >= corners[:, axis, None]) & (rows < corners[:, axis, None] + 20) for axis in range(2)]
        instances.gt_masks = inside[0][:, :, None] & inside[1][:, None, :]
        image = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        samples.append({"image": image, "instances": instances})
    return samples


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_gradients(
    model: nn.Module, samples: list[dict[str, Any]], of: tuple[str, ...] = (*MASK_LOSSES, *CLASS_LOSS, "loss_sem_seg")
) -> dict[str, Tensor]:
    """Of those losses whose names start so."""
    model.zero_grad()
    sum(loss for name, loss in model(samples).items() if name.startswith(of)).backward()
    return gradients(model)


def accumulated_gradients(model: nn.Module, samples: list[dict[str, Any]], parts: int) -> dict[str, Tensor]:
    """After a step of ``AccumulatingTrainer`` that changes nothing."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = AccumulatingTrainer(model, [samples], torch.optim.SGD(parameters, lr=0.0), parts=parts)
    trainer.iter = 0
    with EventStorage():
        trainer.run_step()
    return gradients(getattr(model, "module", model))


def relative_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The norm of the difference of all gradients together, as a share of their norm."""
    assert first.keys() == second.keys()
    difference, size = (
        torch.cat([value.flatten() for value in values]).norm()
        for values in ([first[name] - second[name] for name in first], second.values())
    )
    return (difference / size).item()


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_gradients_of_parts_add_up_to_the_batchs(parts: int) -> None:
    model = build()
    whole = plain_gradients(model, batch())
    assert relative_difference(accumulated_gradients(model, batch(), parts), whole) < 1e-5


def test_losses_of_parts_add_up_to_the_batchs() -> None:
    model = build()
    with torch.no_grad():
        whole = model(batch())
    trainer = AccumulatingTrainer(model, [batch()], torch.optim.SGD(model.parameters(), lr=0.0), parts=2)
    trainer.iter = 0
    with EventStorage() as storage:
        trainer.run_step()
        written = {name: storage.history(name).latest() for name in whole}
    assert written == pytest.approx({name: loss.item() for name, loss in whole.items()})
    with torch.no_grad():
        assert model(batch()) == whole  # nothing is left of the parts


def test_per_pixel_losses_of_parts_add_up() -> None:
    """Pictures have different shares of pixels without a class."""
    model = build(
        MODEL__META_ARCHITECTURE="SemanticSegmentor",
        MODEL__SEM_SEG_HEAD__NAME="PerPixelBaselineHead",
        MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME="BasePixelDecoder",
    )
    samples = batch()
    for index, sample in enumerate(samples):
        sample["sem_seg"] = torch.randint(0, 2, (SIDE, SIDE))
        sample["sem_seg"][: 16 * index] = 255
    whole = plain_gradients(model, samples)
    assert relative_difference(accumulated_gradients(model, samples, 2), whole) < 1e-5


def test_mistakes() -> None:
    model, optimizer = build(), torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(UserError, match="ACCUMULATION_STEPS is 0, expected 1 or more"):
        AccumulatingTrainer(model, [], optimizer, parts=0)
    with pytest.raises(UserError, match="needs MaskFormer or a per-pixel head"):
        AccumulatingTrainer(nn.Linear(1, 1), [], optimizer, parts=2)
    with pytest.raises(UserError, match="is 5, but each process has 4 of the SOLVER.IMS_PER_BATCH pictures"):
        AccumulatingTrainer(model, [batch()], optimizer, parts=5).run_step()


# -------------------------------------------------------------------------------------- two processes

NORMALIZE = "MODEL__MASK_FORMER__NORMALIZE_OVER_RANKS"


def _gradients_of_a_rank(rank: int, folder: str) -> None:
    """Each of two processes has half the batch; the first writes the averaged gradients of each case."""
    torch.set_num_threads(1)
    use_same_points()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    half = batch()[2 * rank : 2 * rank + 2]
    cases = {}
    for normalize in (False, True):
        model = build(**{NORMALIZE: normalize})
        parallel_model = for_all_ranks(model)
        losses = parallel_model(half)
        names = comm.all_gather(list(losses))
        assert names[0] == names[1]  # whatever the pictures hold
        sum(losses.values()).backward()
        cases[normalize, 1] = gradients(model)
        cases[normalize, 2] = accumulated_gradients(parallel_model, half, 2)
    if rank == 0:
        torch.save(cases, f"{folder}/gradients.pth")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int], dict[str, Tensor]]:
    """Averaged gradients by NORMALIZE_OVER_RANKS and the number of parts."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_gradients_of_a_rank, (str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pth")


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_have_the_gradients_of_one(
    of_two_processes: dict[tuple[bool, int], dict[str, Tensor]], parts: int
) -> None:
    whole = plain_gradients(build(), batch())
    assert relative_difference(of_two_processes[True, parts], whole) < 1e-5


@pytest.mark.parametrize("parts", [1, 2])
def test_as_published_the_class_loss_is_averaged_by_process(
    of_two_processes: dict[tuple[bool, int], dict[str, Tensor]], parts: int
) -> None:
    model = build()
    halves = [plain_gradients(model, half, CLASS_LOSS) for half in (batch()[:2], batch()[2:])]
    of_masks = plain_gradients(model, batch(), MASK_LOSSES)
    zero = torch.zeros(())
    expected = {
        name: of_masks.get(name, zero) + sum(half.get(name, zero) for half in halves) / 2
        for name in of_two_processes[False, parts]
    }
    assert relative_difference(of_two_processes[False, parts], expected) < 1e-5
    whole = plain_gradients(model, batch())
    assert relative_difference(of_two_processes[False, parts], whole) > 1e-3
