"""Pyramids that keep few maps for gradients, against those whose norms have hooks, which use plain modules alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from detectron2.layers import ShapeSpec
from test_modeling_fpn import SHAPES, C, features
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mask2former.modeling import BasePixelDecoder, MSDeformAttnPixelDecoder
from mask2former.modeling.pixel_decoder.fpn import add_lateral, lateral_conv, output_conv
from mask2former.modeling.pixel_decoder.group_norm import is_plain_group_norm


def base() -> nn.Module:
    return BasePixelDecoder(SHAPES, conv_dim=C, mask_dim=20)


def deformable() -> nn.Module:
    layer = {"transformer_enc_layers": 1, "transformer_dim_feedforward": 48}
    return MSDeformAttnPixelDecoder(SHAPES, conv_dim=C, mask_dim=20, **layer)


DECODERS = pytest.mark.parametrize("make", [base, deformable])


def with_random_norms(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    decoder = make()
    for part in decoder.modules():
        if isinstance(part, nn.GroupNorm):
            nn.init.normal_(part.weight, 0.5)
            nn.init.normal_(part.bias)
    return decoder


def plain_copy(decoder: nn.Module) -> nn.Module:
    decoder = copy.deepcopy(decoder)
    for part in decoder.modules():
        if isinstance(part, nn.GroupNorm):
            part.register_forward_hook(lambda *_: None)
    return decoder


def given(batch: int = 2, size: tuple[int, int] = (36, 44)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    maps = features(*size, batch=batch)
    return {name: x.contiguous(memory_format=torch.channels_last).requires_grad_() for name, x in maps.items()}


def results_and_gradients(decoder: nn.Module, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    maps = given()
    inputs = (*maps.values(), *decoder.parameters())

    def features_and_coarse(*maps_: Tensor) -> tuple[Tensor, ...]:
        mask_features, _, coarse = decoder.forward_features(dict(zip(maps, maps_, strict=True)))
        return mask_features, *coarse

    outputs = run(features_and_coarse, *maps.values()) if run else features_and_coarse(*maps.values())
    torch.manual_seed(2)
    total = sum((x * torch.randn_like(x)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(total, inputs, allow_unused=True)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for x, expected in zip(ours, theirs, strict=True):
        if expected is None:
            assert x is None
            continue
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        assert x.stride() == expected.stride()


@DECODERS
def test_results_and_gradients_are_the_same(make: Callable[[], nn.Module]) -> None:
    decoder = with_random_norms(make)
    ours, theirs = map(results_and_gradients, (decoder, plain_copy(decoder)))
    same(ours, theirs)


@DECODERS
def test_within_a_checkpoint(make: Callable[[], nn.Module]) -> None:
    decoder = with_random_norms(make)
    inside = results_and_gradients(decoder, lambda *arguments: checkpoint(*arguments, use_reentrant=False))
    same(inside, results_and_gradients(plain_copy(decoder)))


@DECODERS
def test_frozen_parts_have_no_gradients(make: Callable[[], nn.Module]) -> None:
    """Those of the backbone, of norms, of all: other gradients stay."""
    decoder = with_random_norms(make)
    for norm in (part for part in decoder.modules() if isinstance(part, nn.GroupNorm)):
        norm.requires_grad_(False)
    maps = {name: x.detach() for name, x in given().items()}
    gradients = []
    for each in (decoder, plain_copy(decoder)):
        each.forward_features(maps)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0] and list(gradients[0]) == list(gradients[1])
    same(*(list(found.values()) for found in gradients))
    assert not decoder.requires_grad_(False).forward_features(maps)[0].requires_grad


def step() -> tuple[nn.Module, nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The convolutions of a pyramid's step in float64, and the step."""
    torch.manual_seed(0)
    lateral, output = (make(*widths, "GN").double() for make, widths in ((lateral_conv, (3, C)), (output_conv, (C, C))))

    def run(feature: Tensor, coarse: Tensor) -> Tensor:
        return output(add_lateral(lateral, feature, coarse, "bilinear", keep=False))

    return lateral, output, run


def test_gradients_of_gradients() -> None:
    lateral, output, run = step()
    for conv in (lateral, output):
        nn.init.normal_(conv.norm.bias)
    feature, coarse = (torch.randn(1, width, *size).double() for width, size in ((3, (4, 4)), (C, (2, 2))))
    inputs = (feature.requires_grad_(), coarse.requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: run(*x).square(), inputs, fast_mode=True)


@DECODERS
def test_finest_maps_are_made_again(make: Callable[[], nn.Module]) -> None:
    """What two convolutions take is kept by plain modules alone."""

    def kept(decoder: nn.Module) -> list[bool]:
        storages = []
        for conv in (decoder.layer_1, decoder.mask_features):
            conv.register_forward_pre_hook(lambda _, x: storages.append(StorageWeakRef(x[0].untyped_storage())))
        output = decoder.forward_features(given())[0]
        assert output.requires_grad and len(storages) == 2
        return [not storage.expired() for storage in storages]

    decoder = with_random_norms(make)
    assert kept(plain_copy(decoder)) == [True, True]
    assert kept(decoder) == [False, False]


def test_what_was_changed_since_is_kept() -> None:
    """By a hook in place, where plain modules allow none."""
    decoder = with_random_norms(deformable)
    plain = plain_copy(decoder)
    decoder.layer_1.register_forward_hook(lambda _, inputs, output: output.mul_(2))
    plain.layer_1.register_forward_hook(lambda _, inputs, output: output * 2)
    same(*map(results_and_gradients, (decoder, plain)))


def test_hooks_on_layers_see_what_they_make() -> None:
    decoder = with_random_norms(deformable)
    seen = []
    for part in (decoder.adapter_1, decoder.adapter_1.norm, decoder.layer_1.norm, decoder.layer_1):
        part.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    decoder.forward_features(given())
    adapter_norm, adapter, norm, layer = seen
    assert torch.equal(adapter_norm, adapter)
    assert torch.equal(norm.relu(), layer)


def test_transforms_of_torch_func() -> None:
    _, output, run = step()
    feature, coarse = torch.randn(2, 1, 3, 8, 8).double(), torch.randn(2, 1, C, 4, 4).double()

    def total(weight: Tensor, feature: Tensor, coarse: Tensor) -> Tensor:
        again = torch.func.functional_call(output, {"weight": weight}, (run(feature, coarse),))
        return again.square().sum()

    found = torch.vmap(torch.func.grad(total), (None, 0, 0))(output.weight.detach(), feature, coarse)
    for index in range(2):
        weight = output.weight.detach().clone().requires_grad_()
        expected = torch.autograd.grad(total(weight, feature[index], coarse[index]), weight)[0]
        torch.testing.assert_close(found[index], expected)


def test_norms_that_are_not_plain() -> None:
    class Own(nn.GroupNorm):
        pass

    x = torch.randn(1, C, 4, 4)
    assert is_plain_group_norm(nn.GroupNorm(8, C), x)
    assert not is_plain_group_norm(Own(8, C), x)
    assert not is_plain_group_norm(nn.GroupNorm(8, C, affine=False), x)
    assert not is_plain_group_norm(nn.GroupNorm(8, C).double(), x)
    assert not is_plain_group_norm(nn.BatchNorm2d(C), x)
    assert not is_plain_group_norm(None, x)
    assert not is_plain_group_norm(nn.GroupNorm(8, C), x[..., ::2])
    with torch.no_grad():
        assert not is_plain_group_norm(nn.GroupNorm(8, C), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain_group_norm(nn.GroupNorm(8, C), x)


def test_shapes_of_any_backbone() -> None:
    """Without norms there is nothing to make again."""
    shapes = {"a": ShapeSpec(channels=4, stride=4), "b": ShapeSpec(channels=6, stride=8)}
    decoder = BasePixelDecoder(shapes, conv_dim=C, mask_dim=4, norm="")
    maps = {"a": torch.randn(1, 4, 9, 7), "b": torch.randn(1, 6, 5, 4)}
    mask_features, _, coarse = decoder.forward_features(maps)
    mask_features.sum().backward()
    assert [tuple(x.shape[-2:]) for x in coarse] == [(5, 4), (9, 7)]
