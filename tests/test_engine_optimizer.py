"""Learning rates, decays and clipping of the optimizer, and the schedules."""

from typing import Any

import pytest
import torch
from recipe_parts import load, schedule
from tiny_nuclei_model import build_tiny_model
from torch import nn

from mask2former.engine import build_optimizer
from mask2former.errors import UserError

LR, DECAY, NORM_DECAY, EMBED_DECAY, MULTIPLIER = 1e-3, 0.05, 0.01, 0.02, 0.1


class SwinLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, 4, 2, 2))
        self.attn = nn.Linear(4, 4)
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


class StandIn(nn.Module):
    """One module of every kind that a rule is about."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SwinLike()
        self.head = nn.ModuleDict(
            {
                "conv": nn.Conv2d(4, 4, 1),
                "group_norm": nn.GroupNorm(2, 4),
                "batch_norm": nn.BatchNorm2d(4),
                "query_embed": nn.Embedding(3, 4),
                "attention": nn.MultiheadAttention(4, 2),
            }
        )
        self.head["tied"] = self.head["conv"]
        self.level_embed = nn.Parameter(torch.zeros(3, 4))


EXPECTED = {
    "backbone.absolute_pos_embed": (LR * MULTIPLIER, 0.0),
    "backbone.attn.relative_position_bias_table": (LR * MULTIPLIER, 0.0),
    "backbone.attn.weight": (LR * MULTIPLIER, DECAY),
    "backbone.attn.bias": (LR * MULTIPLIER, DECAY),
    "backbone.norm.weight": (LR * MULTIPLIER, NORM_DECAY),
    "backbone.norm.bias": (LR * MULTIPLIER, NORM_DECAY),
    "head.conv.weight": (LR, DECAY),
    "head.conv.bias": (LR, DECAY),
    "head.group_norm.weight": (LR, NORM_DECAY),
    "head.group_norm.bias": (LR, NORM_DECAY),
    "head.batch_norm.weight": (LR, NORM_DECAY),
    "head.batch_norm.bias": (LR, NORM_DECAY),
    "head.query_embed.weight": (LR, EMBED_DECAY),
    "head.attention.in_proj_weight": (LR, DECAY),
    "head.attention.in_proj_bias": (LR, DECAY),
    "head.attention.out_proj.weight": (LR, DECAY),
    "head.attention.out_proj.bias": (LR, DECAY),
    "level_embed": (LR, DECAY),
}


def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    rates = {
        "base_lr": LR,
        "weight_decay": DECAY,
        "weight_decay_norm": NORM_DECAY,
        "weight_decay_embed": EMBED_DECAY,
        "backbone_multiplier": MULTIPLIER,
    }
    return build_optimizer(model, **{**rates, **options})


def rates_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [(p, group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len({p for p, _, _ in groups}) == len(groups), "a parameter is optimized twice"
    return {names[p]: (lr, decay) for p, lr, decay in groups}


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_rates_of_every_kind_of_parameter(name: str) -> None:
    model = StandIn()
    optimizer = build(model, name=name, momentum=0.8)
    assert rates_by_name(model, optimizer) == EXPECTED
    assert type(optimizer) is {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name]
    if name == "SGD":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def test_rates_of_a_real_model() -> None:
    model = build_tiny_model()
    expected = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        decay = DECAY
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            decay = NORM_DECAY
        if isinstance(module, nn.Embedding):
            decay = EMBED_DECAY
        if parameter.requires_grad:
            expected[name] = (LR * MULTIPLIER if name.startswith("backbone.") else LR, decay)
    assert rates_by_name(model, build(model)) == expected
    assert {decay for _, decay in expected.values()} == {DECAY, NORM_DECAY, EMBED_DECAY}


def gradients(model: nn.Module, scale: float = 1.0) -> list[torch.Tensor]:
    """Random gradients of very different sizes, set on the trained parameters; copies of them."""
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for index, parameter in enumerate(trained):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.5**index * scale
    return [parameter.grad.clone() for parameter in trained]


def clipped(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def clipped_by_torch(grads: list[torch.Tensor], max_norm: float) -> list[torch.Tensor]:
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    return [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("max_norm", [0.01, 1e4])
def test_full_model_clipping(max_norm: float) -> None:
    model = StandIn()
    optimizer = build(model, clip_type="full_model", clip_value=max_norm)
    expected = clipped_by_torch(gradients(model), max_norm)
    optimizer.step()
    torch.testing.assert_close(clipped(model), expected, rtol=1e-6, atol=0)
    norm = torch.cat([grad.flatten() for grad in clipped(model)]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3) if max_norm == 0.01 else norm > 1


def test_full_model_clipping_sees_unscaled_gradients() -> None:
    """With a GradScaler the norm is that of the true gradients, and a step with an infinite one is left out."""
    model = StandIn()
    optimizer = build(model, clip_type="full_model", clip_value=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    expected = clipped_by_torch(gradients(model), 0.01)
    gradients(model, scale=1024.0)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(clipped(model), expected, rtol=1e-5, atol=0)

    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients(model)[0].fill_(torch.inf)
    clipped(model)[0].fill_(torch.inf)
    scaler.step(optimizer)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


def test_clipping_by_value_and_by_norm_of_each_parameter() -> None:
    model = StandIn()
    original = gradients(model)
    build(model, clip_type="value", clip_value=0.1).step()
    torch.testing.assert_close(clipped(model), [grad.clamp(-0.1, 0.1) for grad in original], rtol=0, atol=0)
    gradients(model)
    build(model, clip_type="norm", clip_value=0.1, clip_norm_type=1.0).step()
    expected = [grad * min(1.0, 0.1 / grad.abs().sum().item()) for grad in original]
    torch.testing.assert_close(clipped(model), expected, rtol=1e-4, atol=1e-8)


def test_steps_of_adamw_are_those_without_its_compiled_kernel() -> None:
    models = [StandIn(), StandIn()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build(model, clip_type=None) for model in models]
    for group in optimizers[1].param_groups:
        assert group["fused"]
        group["fused"] = False
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients(model)
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
    state, plain_state = (optimizer.state_dict()["state"] for optimizer in optimizers)
    torch.testing.assert_close(state, plain_state)


def test_no_clipping() -> None:
    model = StandIn()
    original = gradients(model)
    build(model, clip_type=None).step()
    torch.testing.assert_close(clipped(model), original, rtol=0, atol=0)


@pytest.mark.parametrize(("option", "value"), [("name", "ADAM"), ("clip_type", "model")])
def test_unknown_names(option: str, value: str) -> None:
    with pytest.raises(UserError, match=f"SOLVER.*must be.*but is '{value}'"):
        build(StandIn(), **{option: value})


def linear_warmup(step: int, factor: float, length: int) -> float:
    return factor + (1 - factor) * step / length if step < length else 1.0


def test_polynomial_schedule() -> None:
    steps = [*range(0, 2000, 111), 1900, 1995, 1999]
    options = "SOLVER.MAX_ITER 2000 SOLVER.WARMUP_ITERS 300 SOLVER.WARMUP_FACTOR 0.01 SOLVER.POLY_LR_POWER 0.9"
    options += " SOLVER.POLY_LR_CONSTANT_ENDING 0.02"
    rates = schedule(load("quick/nuclei.yaml", *options.split()), steps)
    expected = [max((1 - step / 2000) ** 0.9, 0.02) * linear_warmup(step, 0.01, 300) for step in steps]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert rates[-1] == pytest.approx(0.02)


def test_multi_step_schedule() -> None:
    recipe = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
    steps = [*range(0, 368750, 21000), 327777, 327778, 355091, 355092, 368749]
    expected = [0.1 ** sum(step >= milestone for milestone in (327778, 355092)) for step in steps]
    assert schedule(load(recipe), steps) == pytest.approx(expected, rel=1e-6)
    warm = schedule(load(recipe, "SOLVER.WARMUP_FACTOR", "0.1", "SOLVER.WARMUP_ITERS", "1000"), [0, 250, 999])
    assert warm == pytest.approx([linear_warmup(step, 0.1, 1000) for step in (0, 250, 999)], rel=1e-6)
