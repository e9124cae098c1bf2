"""Convolutions that do their frozen norm's work against Detectron2's, one after the other."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from mask2former.modeling.backbone.frozen_norm import fold_frozen_norms


def convolution(bias: bool = False, activation: bool = True) -> Conv2d:
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    for name, values in norm.named_buffers():
        values.copy_(torch.rand_like(values) + 0.5 if name in ("weight", "running_var") else torch.randn_like(values))
    options = {"stride": 2, "padding": 1, "groups": 2, "activation": torch.relu if activation else None}
    return Conv2d(4, 6, 3, bias=bias, norm=norm, **options)


# Of 4 channels; the convolution's filters have 18 weights each, so that the results of the smaller one are scaled.
SIZES = [(9, 7), (5, 5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [False, True])
def test_results_and_gradients_are_the_same(bias: bool, activation: bool, size: tuple[int, int]) -> None:
    plain = convolution(bias, activation)
    folded = copy.deepcopy(plain)
    fold_frozen_norms(folded)
    assert list(folded.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 4, *size).contiguous(memory_format=torch.channels_last)
    results = []
    for conv in (plain, folded):
        given = x.clone().requires_grad_()
        output = conv(given)
        grads = torch.autograd.grad(output.square().sum(), (given, *conv.parameters()))
        results.append((output, *grads))
        assert output.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_changes_count_at_once() -> None:
    """A training step, and weights that are loaded."""
    conv = convolution()
    fold_frozen_norms(conv)
    x = torch.randn(1, 4, 8, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(2)
        conv.norm.bias.add_(1)
    plain = convolution()
    plain.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x), plain(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, conv(x))


def test_scaled_weights_are_made_again_for_the_backward_pass() -> None:
    conv = convolution(activation=False)
    fold_frozen_norms(conv)
    node = conv(torch.randn(2, 4, 8, 8)).grad_fn
    scaled, again = node._saved_weight, node._saved_weight
    assert scaled.data_ptr() != again.data_ptr()  # each is a new one
    scale = conv.norm.weight * (conv.norm.running_var + conv.norm.eps).rsqrt()
    torch.testing.assert_close(scaled, conv.weight * scale[:, None, None, None])


def test_results_are_scaled_where_weights_are_more() -> None:
    conv = convolution(activation=False)
    fold_frozen_norms(conv)
    kinds = [conv(torch.randn(2, 4, *size)).grad_fn.name() for size in SIZES]
    assert kinds == ["ConvolutionBackward0", "AddcmulBackward0"]


def test_hooks_on_a_norm_see_its_work() -> None:
    conv = convolution()
    fold_frozen_norms(conv)
    seen = []
    conv.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    output = conv(torch.randn(1, 4, 8, 8))
    assert len(seen) == 1 and torch.equal(torch.relu(seen[0]), output)


def test_other_norms_and_classes_stay() -> None:
    class Own(Conv2d):
        pass

    layers = nn.Sequential(
        Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4)), Conv2d(4, 4, 1), Own(4, 4, 1, norm=FrozenBatchNorm2d(4))
    )
    fold_frozen_norms(layers)
    assert [type(layer) for layer in layers] == [Conv2d, Conv2d, Own]
