"""The compiled CPU kernels against the PyTorch reference and its autograd."""

import pytest
import torch
from torch import Tensor

from mask2former.ops.extension import KERNELS, reason
from mask2former.ops.reference import ms_deform_attn_reference

SHAPES = [(3, 5), (2, 2), (1, 4)]
SIZES = [size for shape in SHAPES for size in shape]
THREADS = (1, 2, 3, 5, 16, 100)

pytestmark = pytest.mark.skipif("cpu" not in KERNELS, reason=f"no CPU kernels: {reason('cpu')}")


def fused_reference(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    sizes = torch.tensor([(width, height) for height, width in SHAPES], dtype=offsets.dtype)
    locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    return ms_deform_attn_reference(value, SHAPES, locations, logits.flatten(3).softmax(-1).view(logits.shape))


def random_input(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    value = torch.randn(2, 23, 3, channels, generator=generator, dtype=dtype)
    references = torch.rand(1, 19, 3, 2, generator=generator, dtype=dtype)
    offsets = torch.randn(2, 19, 3, 3, 2, 2, generator=generator, dtype=dtype) * 2
    logits = torch.randn(2, 19, 3, 3, 2, generator=generator, dtype=dtype)
    return value, references, offsets, logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 17, 32, 33, 64])
def test_fused_equals_the_reference(channels: int, dtype: torch.dtype, tolerance: float) -> None:
    value, references, offsets, logits = random_input(channels, dtype)
    inputs = [x.clone().requires_grad_() for x in (value, offsets, logits)]
    expected = fused_reference(inputs[0], references, inputs[1], inputs[2])
    grad = torch.randn_like(expected)
    output = torch.ops.mask2former.ms_deform_attn_fused(value, SIZES, references, offsets, logits)
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    grads = torch.ops.mask2former.ms_deform_attn_fused_backward(grad, value, SIZES, references, offsets, logits)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_backward_is_equal_for_any_number_of_threads() -> None:
    inputs = random_input(32, torch.float32)
    value, references, offsets, logits = inputs
    grad = torch.randn(2, 19, 96)
    threads, results = torch.get_num_threads(), []
    try:
        for count in THREADS:
            torch.set_num_threads(count)
            operator = torch.ops.mask2former.ms_deform_attn_fused_backward
            results.append(operator(grad, value, SIZES, references, offsets, logits))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(results[0], result, strict=True))
