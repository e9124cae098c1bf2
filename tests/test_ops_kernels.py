"""The compiled kernels on a CPU: against plain PyTorch and its gradients, and with torch's compiler and transforms."""

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deformable_inputs import CELLS, SHAPES, FusedInputs, Inputs, random_fused_inputs, random_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mask2former.ops import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused
from mask2former.ops.extension import KERNELS, reason
from mask2former.ops.reference import ms_deform_attn_fused_reference, ms_deform_attn_reference

SIZES = list(itertools.chain.from_iterable(SHAPES))
HALF_TYPES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif("cpu" not in KERNELS, reason=f"no CPU kernels: {reason('cpu')}")

Shapes = list[tuple[int, int]]


def output_and_grads(operator: Callable[..., Tensor], shapes: Shapes, inputs: Inputs | FusedInputs) -> list[Tensor]:
    """Result of ``operator``, and gradients of all inputs of its sum weighted at random."""
    value, *others = (x.detach().requires_grad_() for x in inputs)
    output = operator(value, shapes, *others)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, (value, *others), weights.to(output.dtype))]


def assert_equals_reference(shapes: Shapes, inputs: Inputs | FusedInputs, tolerance: float) -> None:
    """Kernels in the inputs' type against plain PyTorch in float64."""
    fused = isinstance(inputs, FusedInputs)
    results = output_and_grads(ms_deform_attn_fused if fused else ms_deform_attn, shapes, inputs)
    reference = ms_deform_attn_fused_reference if fused else ms_deform_attn_reference
    expected = output_and_grads(reference, shapes, type(inputs)(*(x.double() for x in inputs)))
    for name, ours, theirs in zip(("output", *inputs._fields), results, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours.double(), theirs, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


sides = st.integers(1, 7)
problems = st.fixed_dictionaries(
    {
        "batch": st.integers(0, 3),
        "queries": st.integers(0, 9),
        "heads": st.integers(1, 4),
        "channels": st.integers(1, 70) | st.sampled_from([8, 16, 32, 64]),
        "points": st.integers(1, 5),
        "shapes": st.lists(st.tuples(sides, sides), min_size=1, max_size=4),
        "seed": st.integers(0, 1000),
    }
)
# Examples are the same in every run: a test that fails once fails again.
thorough = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(problems)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("make_inputs", [random_inputs, random_fused_inputs])
def test_equal_the_reference(
    make_inputs: Callable[..., Any], dtype: torch.dtype, tolerance: float, problem: dict[str, Any]
) -> None:
    assert_equals_reference(problem["shapes"], make_inputs(dtype=dtype, **problem), tolerance)


@thorough
@given(problems)
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_types_equal_the_reference(dtype: torch.dtype, problem: dict[str, Any]) -> None:
    """Values are rounded when they are given, results and their gradients once at the end, and nothing in between."""
    inputs = random_fused_inputs(dtype=torch.float32, **problem)
    inputs = inputs._replace(value=inputs.value.to(dtype))
    assert_equals_reference(problem["shapes"], inputs, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_sampling_tensors_of_half_types(dtype: torch.dtype) -> None:
    """They are read as float32, and gradients come back in the types of what was given."""
    inputs = FusedInputs(*(x.to(dtype) for x in random_fused_inputs(queries=50, channels=16)))
    results = output_and_grads(ms_deform_attn_fused, SHAPES, inputs)
    wide = inputs._replace(**{name: getattr(inputs, name).float() for name in inputs._fields[1:]})
    for result, expected in zip(results, output_and_grads(ms_deform_attn_fused, SHAPES, wide), strict=True):
        assert result.dtype == dtype
        # gradients of reference points are sums of offsets' gradients, which were rounded
        torch.testing.assert_close(result.float(), expected.float(), rtol=0.05, atol=0.05)


def test_many_levels_and_points() -> None:
    shapes = [(2, 3)] * 40
    assert_equals_reference(shapes, random_fused_inputs(points=30, channels=5, shapes=shapes), 2e-5)


def test_levels_without_cells() -> None:
    shapes = [(0, 3), (2, 2), (4, 0)]
    inputs = random_fused_inputs(channels=8, shapes=shapes)
    one = slice(1, 2)
    kept = FusedInputs(
        inputs.value, inputs.reference_points[:, :, one], inputs.sampling_offsets[:, :, :, one], inputs.attention_logits
    )
    output = ms_deform_attn_fused(inputs[0], shapes, *inputs[1:])
    weights = inputs.attention_logits.flatten(3).softmax(-1).view(inputs.attention_logits.shape)[:, :, :, one]
    locations = kept.reference_points[:, :, None, :, None] + kept.sampling_offsets / 2
    torch.testing.assert_close(output, ms_deform_attn_reference(inputs.value, [(2, 2)], locations, weights))


@pytest.mark.parametrize("make_inputs", [random_inputs, random_fused_inputs])
def test_strides_do_not_matter(make_inputs: Callable[..., Any]) -> None:
    """Slices, expanded and transposed tensors, as the module's own and others."""
    inputs = make_inputs(queries=6, channels=8)
    operator = ms_deform_attn_fused if isinstance(inputs, FusedInputs) else ms_deform_attn
    expected = output_and_grads(operator, SHAPES, inputs)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(-1, 1).contiguous().transpose(-1, 1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    ]
    for way in ways:
        strided = type(inputs)(*map(way, inputs))
        assert not strided[0].is_contiguous() and torch.equal(strided[0], inputs[0])
        for ours, theirs in zip(output_and_grads(operator, SHAPES, strided), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_stay_where_they_are(bad: float) -> None:
    """A cell beside the map's border is read by samples near it, and not by those that are clamped to it."""
    value = torch.zeros(1, 6, 1, 4)
    value[0, 0] = bad  # the corner cell
    outside = torch.tensor([(-0.9, 0.1), (0.1, -0.9), (-5.0, -5.0), (2.0, 0.1)]).view(1, 4, 1, 1, 1, 2)
    weights = torch.ones(1, 4, 1, 1, 1)
    for result in output_and_grads(ms_deform_attn, [(2, 3)], Inputs(value, outside, weights)):
        assert result.isfinite().all()
    near = ms_deform_attn(value, [(2, 3)], torch.full((1, 1, 1, 1, 1, 2), 0.1), weights[:, :1])
    assert not near.isfinite().any()


@pytest.mark.parametrize("place", [float("inf"), -float("inf"), 1e30, -1e30])
def test_locations_far_away_read_nothing(place: float) -> None:
    value, locations, weights = random_inputs(channels=8)
    output, grad_value, *_ = output_and_grads(ms_deform_attn, SHAPES, Inputs(value, locations * 0 + place, weights))
    assert not output.any() and not grad_value.any()


@functools.cache
def has_second_derivatives() -> bool:
    """Whether torch's own grid_sample has them, of which those of the operators are made."""
    cells, places = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.zeros(1, 1, 1, 2, requires_grad=True)
    output = torch.nn.functional.grid_sample(cells, places, align_corners=False)
    (grad,) = torch.autograd.grad(output.sum(), places, create_graph=True)
    try:
        torch.autograd.grad(grad.sum(), cells)
    except RuntimeError:
        return False
    return True


def test_second_derivatives() -> None:
    if not has_second_derivatives():
        pytest.skip("this torch's own grid_sample has no second derivative")
    tiny = {"batch": 1, "queries": 2, "heads": 1, "channels": 2, "points": 1, "shapes": [(2, 3), (1, 2)]}
    inputs = [x.requires_grad_() for x in random_fused_inputs(dtype=torch.float64, **tiny)]
    assert torch.autograd.gradgradcheck(lambda *x: ms_deform_attn_fused(x[0], tiny["shapes"], *x[1:]), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES])
def test_backward_is_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs = random_fused_inputs(queries=61, heads=3, channels=32, dtype=torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = FusedInputs(inputs.value.to(dtype), *(x.to(wide) for x in inputs[1:]))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 5, 16, 100):
            torch.set_num_threads(count)
            results.append(output_and_grads(ms_deform_attn_fused, SHAPES, inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_opcheck(fused: bool) -> None:
    operators = torch.ops.mask2former
    tensors = random_fused_inputs() if fused else random_inputs()
    forward = operators.ms_deform_attn_fused if fused else operators.ms_deform_attn
    backward = operators.ms_deform_attn_fused_backward if fused else operators.ms_deform_attn_backward
    for dtype in (torch.float32, torch.bfloat16):
        value, *inputs = (tensors[0].to(dtype), *tensors[1:])
        for operator, grad in ((forward, ()), (backward, (torch.randn(2, 4, 6, dtype=dtype),))):
            differentiable = operator is forward or has_second_derivatives()
            for x in (value, *inputs):
                x.requires_grad_(differentiable)
            torch.library.opcheck(operator.default, (*grad, value, SIZES, *inputs))


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    inputs = random_fused_inputs(channels=8)
    expected = output_and_grads(ms_deform_attn_fused, SHAPES, inputs)
    with torch.autocast("cpu", dtype):
        results = output_and_grads(ms_deform_attn_fused, SHAPES, inputs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


def test_module_under_autocast() -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(16, len(SHAPES), 2, 2)
    queries, references = torch.randn(2, CELLS, 16), torch.rand(1, CELLS, len(SHAPES), 2)
    expected = module(queries, references, queries, SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(queries, references, queries, SHAPES)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------- compile, export, func


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """Torch's compiler with nothing compiled before."""
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def test_compiled_module_has_one_graph_for_all_sizes(dynamo: Any) -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(16, 2, 2, 2)
    torch.nn.init.normal_(module.sampling_offsets.weight)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    compiler = dynamo.utils.counters
    compiler.clear()
    for height, width, batch in ((4, 7, 5), (6, 3, 3), (7, 9, 8)):
        shapes = [(height, width), (height + 2, width + 1)]
        queries = torch.randn(batch, sum(h * w for h, w in shapes), 16, requires_grad=True)
        references = torch.rand(1, queries.shape[1], 2, 2)
        expected = module(queries, references, queries, shapes)
        output = compiled(queries, references, queries, shapes)
        torch.testing.assert_close(output, expected)
        grads = [torch.autograd.grad(x.square().sum(), (queries, *module.parameters())) for x in (output, expected)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert compiler["stats"]["unique_graphs"] == 1
    assert not compiler["graph_break"]


@pytest.mark.slow
def test_compiled_by_inductor(dynamo: Any) -> None:
    inputs = random_fused_inputs(channels=8)
    operator = torch.compile(ms_deform_attn_fused, fullgraph=True)
    results = output_and_grads(operator, SHAPES, inputs)
    for ours, theirs in zip(results, output_and_grads(ms_deform_attn_fused, SHAPES, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exported_module_calls_the_operator(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = MSDeformAttn(16, len(SHAPES), 2, 2)

        def forward(self, queries: Tensor, references: Tensor) -> Tensor:
            return self.attention(queries, references, queries, SHAPES)

    module = Fixed()
    inputs = (torch.randn(2, CELLS, 16), torch.rand(1, CELLS, len(SHAPES), 2))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, inputs, dynamic_shapes={"queries": {0: batch}, "references": None})
    assert any(node.target is torch.ops.mask2former.ms_deform_attn_fused.default for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    more = torch.randn(5, CELLS, 16)
    torch.testing.assert_close(loaded(more, inputs[1]), module(more, inputs[1]))


def test_traces_hold_only_operators_of_torch() -> None:
    """What reads a trace, such as fvcore's flop counter, knows no others."""
    value, *inputs = random_fused_inputs()
    traced = torch.jit.trace(lambda *x: ms_deform_attn_fused(x[0], SHAPES, *x[1:]), (value, *inputs))
    assert "aten::grid_sampler" in str(traced.graph) and "mask2former::" not in str(traced.graph)
    torch.testing.assert_close(traced(value, *inputs), ms_deform_attn_fused(value, SHAPES, *inputs))


class TestFunc:
    """torch.func's transforms against one call after the other."""

    COUNT = 3

    @staticmethod
    def loss(*inputs: Tensor) -> Tensor:
        operator = ms_deform_attn_fused if len(inputs) == 4 else ms_deform_attn
        return operator(inputs[0], SHAPES, *inputs[1:]).square().sum()

    @pytest.fixture(params=[random_inputs, random_fused_inputs])
    def stacked(self, request: pytest.FixtureRequest) -> list[Tensor]:
        """Inputs of COUNT calls."""
        calls = [request.param(dtype=torch.float64, seed=seed) for seed in range(self.COUNT)]
        return [torch.stack(x) for x in zip(*calls, strict=True)]

    def expected(self, stacked: list[Tensor]) -> list[Tensor]:
        """Gradients of the loss of each call."""
        inputs = [x.detach().requires_grad_() for x in stacked]
        total = sum(self.loss(*call) for call in zip(*inputs, strict=True))
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, inputs))

    def test_grad(self, stacked: list[Tensor]) -> None:
        grad = torch.func.grad(self.loss, argnums=tuple(range(len(stacked))))
        for call in range(self.COUNT):
            for ours, theirs in zip(grad(*(x[call] for x in stacked)), self.expected(stacked), strict=True):
                torch.testing.assert_close(ours, theirs[call])

    def test_vmap_of_grad(self, stacked: list[Tensor]) -> None:
        grad = torch.func.vmap(torch.func.grad(self.loss, argnums=tuple(range(len(stacked)))))
        for ours, theirs in zip(grad(*stacked), self.expected(stacked), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_grad_of_vmap(self, stacked: list[Tensor]) -> None:
        def total(*inputs: Tensor) -> Tensor:
            return torch.func.vmap(self.loss)(*inputs).sum()

        grads = torch.func.grad(total, argnums=tuple(range(len(stacked))))(*stacked)
        for ours, theirs in zip(grads, self.expected(stacked), strict=True):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("shared", [0, 1, 2])
    def test_vmap_over_some_inputs_and_other_dimensions(self, stacked: list[Tensor], shared: int) -> None:
        dims = [None if i == shared else (i + 1) % 3 for i in range(len(stacked))]
        inputs = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(stacked, dims, strict=True)]
        losses = torch.func.vmap(self.loss, in_dims=tuple(dims))(*inputs)
        for call, loss in enumerate(losses):
            one = [x if dim is None else x.select(dim, call) for x, dim in zip(inputs, dims, strict=True)]
            torch.testing.assert_close(loss, self.loss(*one))

    def test_compiled(self, stacked: list[Tensor], dynamo: Any) -> None:
        grad = torch.func.vmap(torch.func.grad(self.loss, argnums=tuple(range(len(stacked)))))
        compiled = torch.compile(grad, backend="aot_eager", fullgraph=True)
        for ours, theirs in zip(compiled(*stacked), self.expected(stacked), strict=True):
            torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------- memory, capabilities


MEASURE_MEMORY = """
import sys, torch
from mask2former.ops import ms_deform_attn_fused
from mask2former.ops.extension import KERNELS
assert "cpu" in KERNELS
def bytes_of(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
shapes = [(64, 64), (32, 32), (16, 16)]
cells = sum(h * w for h, w in shapes)
torch.set_num_threads(int(sys.argv[2]))
def run(queries):
    value = torch.randn(1, cells, 8, 32).to(getattr(torch, sys.argv[1])).requires_grad_()
    references = torch.rand(1, queries, 3, 2)
    offsets = torch.randn(1, queries, 8, 3, 4, 2, requires_grad=True)
    logits = torch.randn(1, queries, 8, 3, 4, requires_grad=True)
    grad = torch.randn(1, queries, 256).to(value.dtype)
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = bytes_of("VmRSS")
    output = ms_deform_attn_fused(value, shapes, references, offsets, logits)
    results = [output, *torch.autograd.grad(output, (value, offsets, logits), grad)]
    return bytes_of("VmHWM") - before - sum(x.numel() * x.element_size() for x in results)
run(4)
print(run(cells))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak of a process' memory")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_results_and_a_buffer_a_thread(dtype: str, threads: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", MEASURE_MEMORY, dtype, str(threads)]
    added = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert added < threads * 2**20


CAPABILITIES = ["default", "avx2", "avx512"]  # each CPU that has one has those before it, too


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_everything_under_each_capability(capability: str) -> None:
    """These tests again, with the kernels of another capability of the CPU."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here == capability:
        pytest.skip("all other tests run with it")
    if here not in CAPABILITIES[CAPABILITIES.index(capability) :]:
        pytest.skip(f"the CPU has no {capability}")
    names = ("ops_kernels", "ops", "ops_points", "ops_convolution", "ops_attention", "modeling_position_wise")
    files = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *map(str, files)]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
