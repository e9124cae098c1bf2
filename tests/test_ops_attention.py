"""Masked attention of kernels against torch's own, in float64."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mask2former.modeling.attention import MultiheadAttention
from mask2former.ops import attention, extension, masked_attention

pytestmark = pytest.mark.skipif("cpu" not in extension.KERNELS, reason=f"no CPU kernels: {extension.reason('cpu')}")

# Pictures, heads, queries, keys, channels: around the numbers of keys that kernels take together, and of vectors.
SIZES = [(1, 8, 100, 2000, 32), (2, 3, 7, 1023, 20), (1, 4, 33, 1024, 16), (3, 2, 1, 1025, 5), (1, 7, 20, 256, 64)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def arguments(batch: int, heads: int, queries: int, keys: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value, with gradients, and a bias that leaves each query half of the keys."""
    made = [torch.randn(batch, rows, heads, channels).transpose(1, 2) for rows in (queries, keys, keys)]
    query, key, value = (x.requires_grad_() for x in made)
    blocked = torch.rand(batch, 1, queries, keys) < 0.5
    return query, key, value, torch.zeros(blocked.shape).masked_fill_(blocked, float("-inf"))


def uses_kernels(*args: Tensor, **options: float) -> bool:
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as plain:
        masked_attention(*args, **options)
    return not plain.called


def assert_same(given: tuple[Tensor, Tensor, Tensor, Tensor], grad: Tensor | None = None) -> None:
    """Results and gradients are those of float64, within 1e-5 of the largest number."""
    assert uses_kernels(*given)
    *inputs, bias = given
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = F.scaled_dot_product_attention(*exact_inputs, attn_mask=bias.double())
    result = masked_attention(*given)
    grad = torch.randn(result.shape) if grad is None else grad
    grads = torch.autograd.grad(result, inputs, grad)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    for ours, right in zip((result, *grads), (exact, *exact_grads), strict=True):
        assert ours.shape == right.shape
        assert (ours - right).abs().max() <= 1e-5 * right.abs().max()
    with torch.inference_mode():
        torch.testing.assert_close(masked_attention(*given), result.detach(), atol=0, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_results_and_gradients_are_those_of_torch(size: tuple[int, ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(arguments(*size))
    finally:
        torch.set_num_threads(before)


def test_large_logits_and_any_bias() -> None:
    """Largest logits change from one part of the keys to the next; whole parts are blocked."""
    query, key, value, _ = arguments(2, 4, 9, 3000, 32)
    bias = 10 * torch.randn(2, 1, 9, 3000)
    bias[:, :, 1, :2500] = float("-inf")
    bias[:, :, 2, 500:] = float("-inf")
    assert_same((query, key, value, bias))
    assert_same((query, key, value, bias[:1]))  # the same for all pictures


def test_any_layout() -> None:
    query, key, value, bias = arguments(1, 4, 10, 600, 32)
    contiguous = tuple(x.detach().contiguous().requires_grad_() for x in (query, key, value))
    parts = tuple(F.pad(x.detach(), (2, 1))[..., 2:-1].requires_grad_() for x in (query, key, value))
    assert_same((*contiguous, bias), grad=torch.randn(1, 10, 4, 32).transpose(1, 2))
    assert_same((*parts, bias.transpose(2, 3).contiguous().transpose(2, 3)))


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    query, key, value, bias = arguments(1, 2, 3, 1500, 8)
    bias[:, :, 1] = float("-inf")
    result = masked_attention(query, key, value, bias)
    assert not result[:, :, 1].any() and result[:, :, 0].all()
    grads = torch.autograd.grad(result.sum(), (query, key, value))
    assert not grads[0][:, :, 1].any() and all(grad.isfinite().all() for grad in grads)


def test_what_is_not_a_number_spreads() -> None:
    query, key, value, bias = (x.detach() for x in arguments(1, 2, 3, 300, 8))
    bias.zero_()
    value[0, 0, 7, 3] = torch.nan
    result = masked_attention(query, key, value, bias)
    assert result[0, 0, :, 3].isnan().all() and result[0, 1].isfinite().all()
    query[0, 1, 2] = torch.nan
    assert masked_attention(query, key, value, bias)[0, 1, 2].isnan().all()


def test_others_are_torchs_own() -> None:
    query, key, value, bias = (x.detach() for x in arguments(1, 8, 10, 512, 16))
    assert uses_kernels(query, key, value, bias)
    assert not uses_kernels(query, key, value)
    assert not uses_kernels(query, key, value, bias, dropout=0.1)
    assert not uses_kernels(query, key, value, bias.expand(1, 8, 10, 512))
    assert not uses_kernels(query, key, value, bias[..., :1, :])
    assert not uses_kernels(query, key, value, torch.zeros_like(bias).requires_grad_())
    assert not uses_kernels(query.double(), key.double(), value.double(), bias.double())
    assert not uses_kernels(query, key[:, :, :64], value[:, :, :64], bias[..., :64])
    for name, instead in (("KERNELS", frozenset()), ("FEWEST_KEYS", 1000)):
        with mock.patch.object(attention, name, instead):
            assert not uses_kernels(query, key, value, bias)
    with mock.patch.object(torch, "get_num_threads", lambda: 9):  # more than heads
        assert not uses_kernels(query, key, value, bias)


def test_the_layer_is_that_of_torch() -> None:
    """With the parameters of ``nn.MultiheadAttention``, and its gradients."""
    ours, theirs = MultiheadAttention(64, 8), torch.nn.MultiheadAttention(64, 8, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(1, 10, 64), torch.randn(1, 700, 64), torch.randn(1, 700, 64)
    bias = arguments(1, 1, 10, 700, 1)[-1]
    with mock.patch.object(F, "scaled_dot_product_attention") as plain:
        result = ours(query, key, value, bias)
    assert not plain.called
    expected, _ = theirs(query, key, value, attn_mask=bias[0, 0])
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    for output in (result, expected):
        output.square().sum().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def test_what_is_known_to_torch() -> None:
    given = tuple(x.detach() for x in arguments(2, 3, 4, 5, 6))
    operators, tests = torch.ops.mask2former, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.masked_attention.default, given, test_utils=tests)
    results = operators.masked_attention(*given)
    backward = (torch.randn(results[0].shape), *given, *results)
    torch.library.opcheck(operators.masked_attention_backward.default, backward, test_utils=tests)
    given = arguments(1, 2, 10, 300, 8)
    with FlopCounterMode(display=False) as counter:
        result = masked_attention(*given)
        assert counter.get_total_flops() == 2 * 2 * 2 * 10 * 300 * 8
        result.sum().backward()
    assert counter.get_total_flops() == (2 + 4) * 2 * 2 * 10 * 300 * 8


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 3, 4), (1, 2, 5, 3), (1, 2, 5, 4), (1, 1, 3, 5)], r"key must be Float .* shape \[1, 2, 5, 4\]"),
        ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 6, 4), (1, 1, 3, 5)], r"value must be Float .* shape \[1, 2, 5, 4\]"),
        ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 3, 5)], r"bias must be Float .* shape \[1, 1, 3, 5\]"),
        ([(4, 2, 3, 4), (4, 2, 5, 4), (4, 2, 5, 4), (2, 1, 3, 5)], r"bias must be \(B or 1, 1, Q, S\) with B 4"),
        ([(2, 3, 4), (2, 5, 4), (2, 5, 4), (1, 3, 5)], r"query and key must be \(B, M, Q or S, D\)"),
    ],
)
def test_wrong_shapes(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mask2former.masked_attention(*map(torch.randn, shapes))
