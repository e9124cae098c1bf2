"""Deformable attention against a slow loop, numerical gradients and Hugging Face's function."""

import itertools
import math
from types import ModuleType

import pytest
import torch
from deformable_inputs import CELLS, SHAPES, random_fused_inputs, random_inputs
from torch import Tensor, nn

from mask2former.ops import MSDeformAttn, extension, functional, ms_deform_attn, ms_deform_attn_fused


def sample(level: Tensor, x: float, y: float) -> Tensor:
    """Value (D) of ``level`` (H, W, D) at normalised (x, y): bilinear between cell centres, zeros outside."""
    height, width, _ = level.shape
    column, row = x * width - 0.5, y * height - 0.5
    result = torch.zeros_like(level[0, 0])
    for i, j in itertools.product((math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)):
        if 0 <= i < height and 0 <= j < width:
            result += level[i, j] * (1 - abs(row - i)) * (1 - abs(column - j))
    return result


def slow_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = torch.zeros(batch, queries, heads, channels, dtype=value.dtype)
    for b, q, m in itertools.product(range(batch), range(queries), range(heads)):
        start = 0
        for level, (height, width) in enumerate(shapes):
            cells = value[b, start : start + height * width, m].view(height, width, channels)
            start += height * width
            for p in range(points):
                x, y = locations[b, q, m, level, p].tolist()
                output[b, q, m] += weights[b, q, m, level, p] * sample(cells, x, y)
    return output.flatten(2)


@pytest.fixture(params=["kernels", "plain PyTorch"], autouse=True)
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with both."""
    if request.param == "plain PyTorch":
        monkeypatch.setattr(functional, "_has_kernel", lambda device: False)
    elif "cpu" not in extension.KERNELS:
        pytest.skip(f"no CPU kernels: {extension.reason('cpu')}")
    return request.param


def test_equals_a_loop() -> None:
    value, locations, weights = random_inputs(dtype=torch.float64)
    output = ms_deform_attn(value, SHAPES, locations, weights)
    torch.testing.assert_close(output, slow_attention(value, SHAPES, locations, weights), atol=1e-12, rtol=0)


def test_equals_hugging_face(hugging_face: ModuleType) -> None:
    value, locations, weights = random_inputs(queries=50, heads=8, channels=16, points=4)
    theirs = hugging_face.multi_scale_deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(ms_deform_attn(value, SHAPES, locations, weights), theirs, atol=1e-5, rtol=0)


def test_fused_makes_locations_and_weights() -> None:
    value, references, offsets, logits = random_fused_inputs(queries=9, dtype=torch.float64)
    sizes = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float64)
    locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    weights = logits.exp() / logits.exp().sum((3, 4), keepdim=True)
    output = ms_deform_attn_fused(value, SHAPES, references, offsets, logits)
    torch.testing.assert_close(output, slow_attention(value, SHAPES, locations, weights), atol=1e-12, rtol=0)
    each = references.repeat(2, 1, 1, 1)  # a picture's own reference points
    assert torch.equal(ms_deform_attn_fused(value, SHAPES, each, offsets, logits), output)


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in random_inputs(queries=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: ms_deform_attn(x[0], SHAPES, *x[1:]), inputs)
    inputs = [x.requires_grad_() for x in random_fused_inputs(queries=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: ms_deform_attn_fused(x[0], SHAPES, *x[1:]), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights_dtype", ["of value", torch.float32])
def test_half_precision(dtype: torch.dtype, weights_dtype: torch.dtype | str) -> None:
    value, locations, weights = random_inputs(queries=30, channels=8)
    expected = ms_deform_attn(value, SHAPES, locations, weights)
    weights = weights.to(dtype if weights_dtype == "of value" else weights_dtype)
    output = ms_deform_attn(value.to(dtype), SHAPES, locations, weights)
    assert output.dtype == dtype
    step = torch.finfo(dtype).eps  # value, weights and result are rounded once each, and nothing in between
    torch.testing.assert_close(output.float(), expected, atol=3 * step * value.abs().max().item(), rtol=0)


def test_locations_are_exact_where_values_are_half() -> None:
    """On a wide level float16 locations would be off by whole cells."""
    width = 4096
    value = torch.zeros(1, width, 1, 1, dtype=torch.float16)
    value[0, 3001] = 1
    locations = torch.tensor([(3001.5 / width, 0.5)]).view(1, 1, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(1, width)], locations, torch.ones(1, 1, 1, 1, 1))
    assert output.item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("place", [-0.5, 1.5, -1e6, 1e6])
def test_locations_outside_read_zeros(place: float) -> None:
    value, locations, weights = random_inputs()
    for axis in range(2):
        outside = locations.clone()
        outside[..., axis] = place
        if abs(place) < 2:  # half a picture outside: further than half a cell on every level but the one-cell row
            outside[:, :, :, 2, :, 0] = 2 * place
            outside[..., 1] = 2 * place
        assert ms_deform_attn(value, SHAPES, outside, weights).abs().max() == 0


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_empty_input(batch: int, queries: int) -> None:
    value, locations, weights = (x.requires_grad_() for x in random_inputs(batch=batch, queries=queries))
    output = ms_deform_attn(value, SHAPES, locations, weights)
    assert output.shape == (batch, queries, 6)
    output.sum().backward()
    assert value.grad is not None and not value.grad.any()


def test_memory_layout_does_not_matter() -> None:
    value, locations, weights = random_inputs()
    expected = ms_deform_attn(value, SHAPES, locations, weights)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, locations, weights)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(ms_deform_attn(strided[0], SHAPES, *strided[1:]), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, x, w: (v[0], SHAPES, x, w), r"value .*\(B, S, M, D\).*\(23, 2, 3\)"),
        (lambda v, x, w: (v, [(3, 5), (2, 2)], x, w), r"\[\(3, 5\), \(2, 2\)\] have 19 cells, .* 23 positions"),
        (lambda v, x, w: (v, SHAPES, x[..., 0], w), r"sampling_locations .*\(2, 4, 2, 3, 2\)"),
        (lambda v, x, w: (v, SHAPES, x[:, :, :1], w), r"B, M, L = 2, 2, 3, .*\(2, 4, 1, 3, 2, 2\)"),
        (lambda v, x, w: (v, SHAPES, x[:, :, :, :2], w), r"sampling_locations .*\(2, 4, 2, 2, 2, 2\)"),
        (lambda v, x, w: (v, SHAPES, x[0, 0, 0, 0, 0, 0].view(1), w), r"sampling_locations .*\(1,\)"),
        (lambda v, x, w: (v, SHAPES, x, w[:, 1:]), r"attention_weights .*\(2, 4, 2, 3, 2\).*\(2, 3, 2, 3, 2\)"),
    ],
)
def test_shape_errors_say_what_came(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(*random_inputs()))


def test_shape_errors_of_the_fused_form() -> None:
    value, references, offsets, logits = random_fused_inputs()
    with pytest.raises(ValueError, match=r"reference_points .* B, Q, L = 2, 4, 3, .*\(1, 4, 3, 1\)"):
        ms_deform_attn_fused(value, SHAPES, references[..., :1], offsets, logits)
    with pytest.raises(ValueError, match=r"sampling_offsets .*\(2, 4, 2, 2, 2, 2\)"):
        ms_deform_attn_fused(value, SHAPES, references, offsets[:, :, :, 1:], logits)
    with pytest.raises(ValueError, match=r"attention_logits .*\(2, 4, 2, 3, 1\)"):
        ms_deform_attn_fused(value, SHAPES, references, offsets, logits[..., 1:])


def test_says_once_why_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.undo()  # also of what computed_by replaced
    monkeypatch.setattr(extension, "KERNELS", frozenset())
    monkeypatch.setitem(extension._REASONS, "cpu", "no compiler")
    functional._say_that_there_is_no_kernel.cache_clear()
    value, *inputs = random_inputs()
    for _ in range(2):
        ms_deform_attn(value, SHAPES, *inputs)
    assert [record.getMessage() for record in caplog.records] == [
        "Deformable attention runs in plain PyTorch on cpu, which is slower than compiled kernels: no compiler"
    ]
    functional._say_that_there_is_no_kernel.cache_clear()


class TestModule:
    def test_published_names_and_shapes(self) -> None:
        module = MSDeformAttn(d_model=32, n_levels=3, n_heads=8, n_points=4)
        assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
            "sampling_offsets.weight": (8 * 3 * 4 * 2, 32),
            "sampling_offsets.bias": (8 * 3 * 4 * 2,),
            "attention_weights.weight": (8 * 3 * 4, 32),
            "attention_weights.bias": (8 * 3 * 4,),
            "value_proj.weight": (32, 32),
            "value_proj.bias": (32,),
            "output_proj.weight": (32, 32),
            "output_proj.bias": (32,),
        }

    def test_published_initialisation(self) -> None:
        module = MSDeformAttn(d_model=256, n_levels=3, n_heads=8, n_points=4)
        # Eight heads look to the eight neighbours of a cell, and its points that many cells further.
        neighbours = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
        bias = module.sampling_offsets.bias.view(8, 3, 4, 2)
        for (head, (x, y)), level, point in itertools.product(enumerate(neighbours), range(3), range(4)):
            expected = torch.tensor([x, y]) * float(point + 1)
            torch.testing.assert_close(bias[head, level, point].detach(), expected, atol=1e-5, rtol=0)
        for zero in (module.sampling_offsets.weight, *module.attention_weights.parameters()):
            assert not zero.any()
        limit = math.sqrt(6 / (256 + 256))  # Xavier's
        for projection in (module.value_proj, module.output_proj):
            assert not projection.bias.any()
            assert 0.99 * limit < projection.weight.abs().max() <= limit
            assert projection.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)

    @pytest.mark.parametrize("padded", [False, True])
    def test_equals_hugging_face(self, hugging_face: ModuleType, padded: bool) -> None:
        torch.manual_seed(0)
        theirs = hugging_face.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(32, 4, 3, 2)
        ours = MSDeformAttn(32, 3, 4, 2)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.3)
        ours.load_state_dict(theirs.state_dict())
        queries = torch.randn(2, CELLS, 32)
        references = torch.rand(2, CELLS, 3, 2)
        padding = torch.rand(2, CELLS) < 0.3 if padded else None
        theirs_output, _ = theirs(
            queries,
            attention_mask=padding,
            encoder_hidden_states=queries,
            reference_points=references,
            spatial_shapes_list=SHAPES,
        )
        output = ours(queries, references, queries, SHAPES, padding)
        torch.testing.assert_close(output, theirs_output, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
    def test_empty_input(self, batch: int, queries: int) -> None:
        module = MSDeformAttn(8, len(SHAPES), 2, 2)
        references = torch.rand(batch, queries, len(SHAPES), 2)
        output = module(torch.rand(batch, queries, 8), references, torch.rand(batch, CELLS, 8), SHAPES)
        assert output.shape == (batch, queries, 8)

    def test_width_must_divide_into_heads(self) -> None:
        with pytest.raises(ValueError, match="30 and 8"):
            MSDeformAttn(d_model=30, n_heads=8)
