"""Products of kernels against torch's own, in float64, and their gradients."""

import copy
import itertools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mask2former.ops import Linear, extension, linear, multiply, product

# M, K and N: around the sizes of tiles, of panels and of what goes through the caches at a time.
SIZES = [
    (1, 1, 1),
    (12, 7, 32),
    (13, 300, 33),
    (25, 256, 16),
    (255, 257, 513),
    (253, 512, 47),
    (3, 1000, 70),
    (500, 64, 2000),
    (2000, 33, 64),
]
NONE = [(0, 3, 4), (3, 0, 4), (3, 4, 0)]
ON_ALL_THREADS = pytest.mark.skipif(
    "cpu" not in extension.KERNELS or not torch.ops.mask2former.has_faster_products(),
    reason="torch's products are as fast on this CPU",
)


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(rows: int, columns: int, layout: str) -> Tensor:
    if layout == "columns":
        return torch.randn(columns, rows).T
    if layout == "part":
        return torch.randn(rows, columns + 5)[:, 2 : columns + 2]
    if layout == "gaps":
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows, columns)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double()


def close(ours: Tensor, exact: Tensor) -> bool:
    """Within rounding of the largest number."""
    same = (ours - exact).abs() <= 1e-5 * exact.abs().amax() if exact.numel() else torch.ones(())
    return ours.shape == exact.shape and bool(same.all())


@pytest.mark.parametrize("size", SIZES + NONE)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_products_of_any_layout(size: tuple[int, int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    rows, depth, columns = size
    for layouts in itertools.product(("rows", "columns", "part", "gaps"), repeat=2):
        for of_result in ("rows", "columns", "part"):
            a, b = matrix(rows, depth, layouts[0]), matrix(depth, columns, layouts[1])
            out = matrix(rows, columns, of_result)
            before = out.clone()
            multiply(a, b, out, add=True)
            assert close(out, before.double() + exact_product(a, b))
            out.fill_(float("nan"))  # which doesn't count
            multiply(a, b, out)
            assert close(out, exact_product(a, b))


def test_what_is_around_the_result_stays() -> None:
    around = torch.zeros(40, 70)
    multiply(torch.randn(17, 9), torch.randn(9, 41), around[5:22, 3:44])
    assert around[5:22, 3:44].count_nonzero() == 17 * 41
    around[5:22, 3:44] = 0
    assert not around.any()


def test_nan_and_infinity_stay_in_their_rows_and_columns() -> None:
    a, b = torch.randn(30, 40), torch.randn(40, 50)
    a[3, 5], b[7, 11] = float("nan"), float("inf")
    out = torch.empty(30, 50)
    multiply(a, b, out)
    finite = out.isfinite()
    assert not finite[3].any() and not finite[:, 11].any()
    finite[3], finite[:, 11] = True, True
    assert finite.all()


def test_products_of_a_batch() -> None:
    a, b = torch.randn(3, 20, 30), torch.randn(3, 30, 40)
    assert close(product(a, b), exact_product(a, b))


def test_products_under_a_compiler_and_a_transform() -> None:
    a, b = torch.randn(2, 20, 30), torch.randn(2, 30, 40)
    torch.testing.assert_close(torch.compile(product, backend="eager", fullgraph=True)(a, b), a @ b)
    torch.testing.assert_close(torch.vmap(product)(a[None], b[None]), (a @ b)[None])


def test_wrong_shapes_and_dtypes_are_errors() -> None:
    out = torch.empty(2, 4)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        multiply(torch.randn(2, 3), torch.randn(5, 4), out)
    with pytest.raises(RuntimeError, match=r"dtype|Double"):
        multiply(torch.randn(2, 3).double(), torch.randn(3, 4), out)


def test_half_precision_and_doubles_are_torchs() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        a, b, out = torch.randn(8, 9, dtype=dtype), torch.randn(9, 10, dtype=dtype), torch.empty(8, 10, dtype=dtype)
        multiply(a, b, out)
        torch.testing.assert_close(out, a @ b)


# ------------------------------------------------------------------------------------------- linear layers


def uses_kernels(x: Tensor, layer: nn.Module) -> bool:
    with mock.patch.object(F, "linear", wraps=F.linear) as plain:
        layer(x)
    return not plain.called


def layers(channels: int, outputs: int, bias: bool = True) -> tuple[Linear, nn.Linear]:
    ours = Linear(channels, outputs, bias=bias)
    exact = nn.Linear(channels, outputs, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    return ours, exact


@ON_ALL_THREADS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(700, 200), (2, 300, 200), (1, 20, 30, 200)])
def test_results_and_gradients_of_layers(shape: tuple[int, ...], bias: bool) -> None:
    ours, exact = layers(shape[-1], 96, bias)
    x = torch.randn(shape, requires_grad=True)
    x_exact = x.detach().double().requires_grad_()
    assert uses_kernels(x, ours)
    result, right = ours(x), exact(x_exact)
    grad = torch.randn(right.shape)
    grads = torch.autograd.grad(result, (x, *ours.parameters()), grad)
    right_grads = torch.autograd.grad(right, (x_exact, *exact.parameters()), grad.double())
    for one, other in zip((result, *grads), (right, *right_grads), strict=True):
        assert close(one.detach(), other.detach())


@ON_ALL_THREADS
def test_gradients_of_gradients() -> None:
    ours, exact = layers(200, 96)
    seconds = []
    for layer, dtype in ((ours, torch.float32), (exact, torch.float64)):
        x = torch.linspace(-1, 1, 600 * 200, dtype=dtype).view(600, 200).requires_grad_()
        result = layer(x)
        first = torch.autograd.grad(result.square().sum(), (x, layer.weight), create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in first), (x, layer.weight)))
    for one, other in zip(*seconds, strict=True):
        assert close(one, other)


@ON_ALL_THREADS
def test_frozen_layers_ask_for_no_gradient() -> None:
    ours, _ = layers(200, 96)
    ours.requires_grad_(False)
    x = torch.randn(600, 200, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and ours.weight.grad is None and ours.bias.grad is None


@ON_ALL_THREADS
def test_small_and_other_layers_are_torchs() -> None:
    ours, exact = layers(200, 96)
    x = torch.randn(600, 200)
    assert uses_kernels(x, ours)
    assert not uses_kernels(x[:3], ours)
    assert not uses_kernels(x.double(), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    with mock.patch.object(extension, "KERNELS", frozenset()):
        assert not uses_kernels(x, ours)


def test_layers_are_torchs_for_their_users() -> None:
    ours, exact = layers(20, 30)
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == list(exact.state_dict())
    assert copy.deepcopy(ours)(torch.ones(2, 20)).shape == (2, 30)
    no_rows = torch.zeros(2, 0, 20)
    assert ours(no_rows).shape == linear(no_rows, ours.weight).shape == (2, 0, 30)


@pytest.mark.skipif("cpu" not in extension.KERNELS, reason=f"no CPU kernels: {extension.reason('cpu')}")
def test_operations_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        multiply(torch.randn(20, 30), torch.randn(30, 40), torch.empty(20, 40))
    assert counter.get_total_flops() == 2 * 20 * 30 * 40
