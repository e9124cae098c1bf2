"""ResNet's stem, which keeps little for gradients, against Detectron2's."""

import copy

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicStem
from torch import Tensor, nn

from mask2former.modeling.backbone.stem import keep_little_of_stems


def pair(norm: str = "BN") -> tuple[BasicStem, nn.Module]:
    """Detectron2's and ours with the same weights."""
    torch.manual_seed(0)
    plain = BasicStem(3, 8, norm).double()
    ours = copy.deepcopy(plain)
    keep_little_of_stems(ours)
    assert type(ours) is not BasicStem and isinstance(ours, BasicStem)
    return plain, ours


def picture(*size: int, layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(32, 40), (31, 17), (1, 5)])
def test_results_and_gradients_are_the_same(size: tuple[int, int], layout: torch.memory_format) -> None:
    results, stems, given = [], pair(), picture(*size, layout=layout)
    for stem in stems:
        x = given.clone().requires_grad_()
        output = stem(x)
        grads = torch.autograd.grad(output.square().sum(), (x, *stem.parameters()))
        results.append((output, *grads))
    assert results[0][0].stride() == results[1][0].stride()
    torch.testing.assert_close(results[1], results[0])


def test_equal_values_and_those_that_are_not_finite() -> None:
    """The first of equal values has the gradient; what isn't above 0 has none, and NaN goes on."""
    results, stems = [], pair()
    given = torch.randint(-2, 2, (1, 4, 12, 12)).double()
    given[0, 0, 5, 5], given[0, 1, 3, 3], given[0, 2] = float("inf"), float("nan"), -1.0
    for stem in stems:
        stem.conv1 = nn.Identity()
        x = given.clone().requires_grad_()
        output = stem(x + 0)
        results.append((output, *torch.autograd.grad(output.sum(), x)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


def test_gradients_of_gradients() -> None:
    _, stem = pair("")
    stem.conv1 = nn.Identity()
    x = torch.randn(1, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stem, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: stem(x).square(), x, fast_mode=True)


def test_no_map_of_the_first_size_is_kept() -> None:
    def kept(stem: nn.Module) -> list[int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape[-1]) or x, lambda x: x):
            stem(picture(32, 32))
        return sizes

    plain, ours = map(kept, pair(""))
    assert 16 in plain and 16 not in ours


def test_without_gradients_and_under_vmap() -> None:
    plain, ours = pair()
    plain.eval(), ours.eval()
    x = picture(16, 16)
    with torch.inference_mode():
        assert torch.equal(ours(x), plain(x))
    mapped = torch.vmap(ours)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(mapped, torch.stack([plain(x), plain(2 * x)]))


def test_other_classes_stay() -> None:
    class Own(BasicStem):
        pass

    stem = Own()
    keep_little_of_stems(stem)
    assert type(stem) is Own
