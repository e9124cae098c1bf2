"""Convolutions of kernels against torch's own, in float64, and its gradients."""

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mask2former.ops import conv2d, extension

SAME_SIZE = {"padding": (1, 1)}
# Pictures, channels in and out, height and width: around the sizes of tiles, and around the widths of vectors.
SIZES = [(1, 32, 32, 32, 32), (2, 33, 47, 25, 41), (1, 64, 100, 4, 300), (3, 128, 32, 29, 31), (1, 40, 256, 125, 7)]

pytestmark = pytest.mark.skipif("cpu" not in extension.KERNELS, reason=f"no CPU kernels: {extension.reason('cpu')}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def arguments(batch: int, channels: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, with gradients; results are as large as numbers of x."""
    x = torch.randn(batch, channels, height, width)
    weight = torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(outputs, requires_grad=True)


def uses_kernels(*args: Tensor, **options: Sequence[int] | int) -> bool:
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as plain:
        conv2d(*args, **options)
    return not plain.called


def close(ours: Tensor, exact: Tensor, share: float = 1e-5) -> bool:
    """Within a share of the largest number."""
    return bool((ours - exact).abs().max() <= share * exact.abs().max())


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("size", SIZES)
def test_results_and_gradients_are_those_of_torch(size: tuple[int, ...], threads: int) -> None:
    given = arguments(*size)
    assert uses_kernels(*given, **SAME_SIZE)
    exact_given = [x.detach().double().requires_grad_() for x in given]
    exact = F.conv2d(*exact_given, padding=1)
    grad = torch.randn(exact.shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = conv2d(*given, **SAME_SIZE)
        grads = torch.autograd.grad(result, given, grad)
    finally:
        torch.set_num_threads(before)
    exact_grads = torch.autograd.grad(exact, exact_given, grad.double())
    for ours, right in zip((result, *grads), (exact, *exact_grads), strict=True):
        assert ours.shape == right.shape
        assert close(ours, right)
    with torch.inference_mode():
        torch.testing.assert_close(conv2d(*given, **SAME_SIZE), result.detach(), atol=0, rtol=0)


def test_errors_are_of_the_size_of_rounding() -> None:
    """Root mean square error, beside that of torch's convolution."""
    x, weight, bias = (x.detach() for x in arguments(1, 256, 256, 48, 48))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)

    def error(result: Tensor) -> float:
        return ((result - exact).square().mean() / exact.square().mean()).sqrt().item()

    assert error(F.conv2d(x, weight, bias, padding=1)) < error(conv2d(x, weight, bias, **SAME_SIZE)) < 2e-6


@pytest.mark.parametrize("layout", ["channels last", "part", "expanded", "transposed"])
def test_any_layout(layout: str) -> None:
    x, weight, _ = (x.detach() for x in arguments(2, 32, 48, 32, 32))
    make = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "part": lambda x: F.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
        "expanded": lambda x: x[:, :1].expand(x.shape),
        "transposed": lambda x: x.transpose(2, 3),
    }[layout]
    given = [make(x), make(weight) if layout != "part" else weight]
    result = conv2d(*(x.requires_grad_() for x in given), **SAME_SIZE)
    exact = F.conv2d(*(x.double() for x in given), padding=1)
    assert close(result, exact)
    grad = make(torch.randn(result.shape))
    grads, exact_grads = torch.autograd.grad(result, given, grad), torch.autograd.grad(exact, given, grad.double())
    assert all(close(*pair) for pair in zip(grads, exact_grads, strict=True))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_gradients_that_nobody_needs_are_not_made(wanted: int) -> None:
    given = [x.requires_grad_(index == wanted) for index, x in enumerate(arguments(1, 32, 32, 32, 32))]
    with FlopCounterMode(display=False) as counter:
        result = conv2d(*given, **SAME_SIZE)
        forward = counter.get_total_flops()
        result.sum().backward()
    assert forward == 2 * 32 * 32 * 32 * 32 * 9
    assert counter.get_total_flops() == forward * (1 if wanted == 2 else 2)
    assert [x.grad is not None for x in given] == [index == wanted for index in range(3)]


def test_gradients_of_gradients() -> None:
    given = arguments(1, 32, 32, 32, 32)
    seconds = []
    for function in (conv2d, F.conv2d):
        first = torch.autograd.grad(function(*given, **SAME_SIZE).square().sum(), given, create_graph=True)
        seconds.append(torch.autograd.grad(sum(x.square().sum() for x in first), given))
    assert all(close(*pair, share=1e-4) for pair in zip(*seconds, strict=True))


def test_others_are_torchs_own() -> None:
    x, weight, bias = (x.detach() for x in arguments(1, 32, 32, 64, 64))
    assert uses_kernels(x, weight, None, **SAME_SIZE)
    assert not uses_kernels(x, weight, bias)  # no padding
    assert not uses_kernels(x, weight, bias, padding=(1, 1), stride=(2, 2))
    assert not uses_kernels(x, weight, bias, padding=(1, 1), dilation=(2, 2))
    assert not uses_kernels(x, weight[:, :8], bias, padding=(1, 1), groups=4)
    assert not uses_kernels(x, weight[..., :1, :1], bias, padding=(1, 1))
    assert not uses_kernels(x.double(), weight.double(), bias.double(), **SAME_SIZE)
    assert not uses_kernels(x[:, :3], weight[:, :3], bias, **SAME_SIZE)
    assert not uses_kernels(x[..., :16, :16], weight, bias, **SAME_SIZE)
    assert not uses_kernels(x[:0], weight, bias, **SAME_SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_kernels(x, weight, bias, **SAME_SIZE)
        assert conv2d(x, weight, bias, **SAME_SIZE).dtype == torch.bfloat16
    with mock.patch.object(extension, "KERNELS", frozenset()):
        assert not uses_kernels(x, weight, bias, **SAME_SIZE)
    traced = torch.jit.trace(lambda x: conv2d(x, weight, bias, **SAME_SIZE), x)
    assert "mask2former::" not in str(traced.graph)


def test_what_is_known_to_torch() -> None:
    x, weight, bias = (x.detach() for x in arguments(1, 3, 5, 7, 9))
    operators, tests = torch.ops.mask2former, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.conv3x3.default, (x, weight, bias), test_utils=tests)
    grad = operators.conv3x3(x, weight, None)
    torch.library.opcheck(operators.conv3x3_backward_input.default, (grad, weight), test_utils=tests)
    torch.library.opcheck(operators.conv3x3_backward_weight.default, (grad, x), test_utils=tests)


@pytest.mark.parametrize(
    ("operator", "shapes", "message"),
    [
        ("conv3x3", [(1, 3, 8, 8), (4, 2, 3, 3), (4,)], r"weight must be \(K, 3, 3, 3\), but has shape \[4, 2, 3, 3\]"),
        ("conv3x3", [(3, 8, 8), (4, 3, 3, 3), (4,)], "x must be Float on a CPU and have four dimensions"),
        ("conv3x3", [(1, 3, 8, 8), (4, 3, 3, 3), (5,)], r"bias must be Float and have shape \[4\]"),
        ("conv3x3_backward_input", [(1, 3, 8, 8), (4, 3, 3, 3)], r"weight must be \(3, C, 3, 3\)"),
        ("conv3x3_backward_weight", [(1, 3, 8, 8), (1, 3, 8, 9)], "must be of the same pictures"),
    ],
)
def test_wrong_shapes(operator: str, shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.mask2former, operator)(*map(torch.randn, shapes))
