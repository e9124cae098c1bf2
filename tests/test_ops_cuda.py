"""The CUDA kernels against the PyTorch reference: their source run by the host, compiled for GPUs, and run on one.

Letters are those of ``mask2former.ops.reference``.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mask2former.ops.reference import ms_deform_attn_reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "mask2former" / "ops" / "csrc" / "cuda"
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # in the order of the C++ enumeration
SHAPES = [(9, 5), (2, 3), (1, 4)]


def computing_type(value_type: torch.dtype) -> torch.dtype:
    """The type of what kernels read and write besides the value, the output and their gradients."""
    return torch.float64 if value_type == torch.float64 else torch.float32


Gradients = tuple[Tensor, Tensor, Tensor]


# --- inputs and what is expected ---------------------------------------------------------------------------------


class Inputs:
    """Random arguments of the operators; some places lie outside of the maps, a few far outside."""

    def __init__(
        self,
        value_type: torch.dtype = torch.float32,
        sampling_type: torch.dtype | None = None,
        *,
        fused: bool = False,
        shapes: list[tuple[int, int]] = SHAPES,
        batch: int = 2,
        queries: int = 5,
        heads: int = 2,
        channels: int = 16,
        points: int = 2,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        positions = sum(height * width for height, width in shapes)
        samples = (batch, queries, heads, len(shapes), points)
        sampling_type = sampling_type or computing_type(value_type)
        self.shapes = shapes
        self.fused = fused
        self.value = torch.randn(batch, positions, heads, channels, generator=generator).to(value_type)
        self.reference_points = torch.rand(batch, queries, len(shapes), 2, generator=generator).to(sampling_type)
        sampling = torch.randn(*samples, 2, generator=generator) * 2
        if not fused:
            sampling = torch.rand(*samples, 2, generator=generator) * 1.6 - 0.3
        far = torch.rand(sampling.shape, generator=generator) < 0.03
        self.sampling = torch.where(far, sampling * 1e4, sampling).to(sampling_type)
        self.attention = torch.randn(samples, generator=generator).to(sampling_type)
        self.grad_output = torch.randn(batch, queries, heads * channels, generator=generator).to(value_type)

    def expected(self) -> tuple[Tensor, Gradients]:
        """Output and gradients by the reference, in float64 (of the same, already rounded, inputs)."""
        value, sampling, attention = (
            x.detach().double().requires_grad_() for x in (self.value, self.sampling, self.attention)
        )
        locations, weights = sampling, attention
        if self.fused:
            sizes = torch.tensor([(width, height) for height, width in self.shapes], dtype=torch.float64)
            locations = self.reference_points.double()[:, :, None, :, None] + sampling / sizes[:, None]
            weights = attention.flatten(3).softmax(-1).view(attention.shape)
        output = ms_deform_attn_reference(value, self.shapes, locations, weights)
        grads = torch.autograd.grad(output, (value, sampling, attention), self.grad_output.double())
        return output.detach(), (grads[0], grads[1], grads[2])

    def check(self, output: Tensor, grads: Gradients) -> None:
        """Compare with :meth:`expected`: what is stored is rounded once, and what is computed in float32 often."""
        expected_output, expected_grads = self.expected()
        assert output.dtype == self.value.dtype
        close(output, expected_output, self.value.dtype)
        for grad, expected, like in zip(
            grads, expected_grads, (self.value, self.sampling, self.attention), strict=True
        ):
            assert grad.shape == like.shape and grad.dtype == like.dtype
            close(grad, expected, self.value.dtype)


def close(actual: Tensor, expected: Tensor, value_type: torch.dtype) -> None:
    computed = 1e-11 if value_type == torch.float64 else 1e-5
    stored = torch.finfo(actual.dtype).eps / 2
    bound = computed * expected.abs().max().clamp(min=1) + stored * expected.abs()
    error = (actual.double().cpu() - expected).abs()
    assert (error <= bound).all(), f"off by {float((error - bound).max()):.3g} more than {float(bound.max()):.3g}"


# --- the kernels' source, run by the host ------------------------------------------------------------------------


class GradientsArguments(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("output", "value", "fixed", "poison", "bound", "sampling", "attention")
    ]


class Call(ctypes.Structure):
    """``Call`` of cuda_on_host/run_kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("value_type", "batch", "positions", "queries")),
        *((name, ctypes.c_int64) for name in ("heads", "channels", "levels", "points")),
        ("level", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("value_stride", ctypes.c_int64 * 3),
        ("reference_points", ctypes.c_void_p),
        ("reference_stride", ctypes.c_int64 * 2),
        ("sampling", ctypes.c_void_p),
        ("sampling_stride", ctypes.c_int64 * 3),
        ("attention", ctypes.c_void_p),
        ("attention_stride", ctypes.c_int64 * 3),
        ("output", ctypes.c_void_p),
        ("gradients", GradientsArguments),
        ("grad_value", ctypes.c_void_p),
    ]


class Emulation:
    """The kernels as functions of CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.size_of_call.restype = ctypes.c_int64
        assert self.library.size_of_call() == ctypes.sizeof(Call)

    @staticmethod
    def call(inputs: Inputs) -> tuple[Call, Tensor]:
        value, sampling, attention = inputs.value, inputs.sampling, inputs.attention
        starts = [sum(h * w for h, w in inputs.shapes[:i]) for i in range(len(inputs.shapes))]
        levels = torch.tensor([(*shape, start) for shape, start in zip(inputs.shapes, starts, strict=True)])
        levels = levels.int().contiguous()
        call = Call(TYPES.index(value.dtype), value.shape[0], value.shape[1], sampling.shape[1])
        call.heads, call.channels, call.levels, call.points = *value.shape[2:], *attention.shape[3:]
        call.level = levels.data_ptr()
        for name, tensor in (("value", value), ("sampling", sampling), ("attention", attention)):
            setattr(call, name, tensor.data_ptr())
            getattr(call, f"{name}_stride")[:] = tensor.stride()[:3]
        if inputs.fused:
            points = inputs.reference_points
            call.reference_points = points.data_ptr()
            call.reference_stride[:] = (0 if len(points) == 1 else points.stride(0), points.stride(1))
        return call, levels

    def forward(self, inputs: Inputs) -> Tensor:
        call, _levels = self.call(inputs)
        output = torch.full_like(inputs.grad_output, torch.nan, memory_format=torch.contiguous_format)
        call.output = output.data_ptr()
        self.library.forward(ctypes.byref(call))
        return output

    def backward(self, inputs: Inputs, deterministic: bool) -> Gradients:
        call, _levels = self.call(inputs)
        value, attention = inputs.value, inputs.attention
        wide = computing_type(value.dtype)
        grad_sampling = torch.full(inputs.sampling.shape, torch.nan, dtype=attention.dtype)
        grad_attention = torch.full(attention.shape, torch.nan, dtype=attention.dtype)
        grad_output = inputs.grad_output.contiguous()
        gradients = call.gradients
        gradients.output = grad_output.data_ptr()
        gradients.sampling = grad_sampling.data_ptr()
        gradients.attention = grad_attention.data_ptr()
        grad_value = torch.zeros(value.shape, dtype=value.dtype if deterministic else wide)
        if deterministic:
            fixed = torch.zeros(value.shape, dtype=torch.int64)
            poison = torch.zeros(*value.shape[:3], (value.shape[3] + 31) // 32, dtype=torch.int32)
            weight = 1.0 if inputs.fused else finite_maximum(attention)
            samples = attention.shape[1] * attention.shape[4]
            bound = torch.tensor(finite_maximum(grad_output) * weight * samples * 1.001, dtype=torch.float64)
            gradients.fixed, gradients.poison = fixed.data_ptr(), poison.data_ptr()
            gradients.bound = bound.data_ptr()
            call.grad_value = grad_value.data_ptr()
        else:
            gradients.value = grad_value.data_ptr()
        self.library.backward(ctypes.byref(call))
        return grad_value.to(value.dtype), grad_sampling, grad_attention


def finite_maximum(tensor: Tensor) -> float:
    return float(torch.nan_to_num(tensor.double().abs(), 0, 0, 0).max())


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler or os.name != "posix":
        pytest.skip("there is no C++ compiler, or no ucontext.h")
    library = tmp_path_factory.mktemp("cuda_on_host") / "run_kernels.so"
    source = ROOT / "tests" / "cuda_on_host" / "run_kernels.cpp"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([*compiler.split(), *flags, f"-I{SOURCES}", str(source), "-o", str(library)], check=True)
    return Emulation(library)


def check_emulated(emulation: Emulation, inputs: Inputs) -> None:
    output = emulation.forward(inputs)
    for deterministic in (False, True):
        inputs.check(output, emulation.backward(inputs, deterministic))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("channels", [16, 32, 64, 1, 5, 24])
@pytest.mark.parametrize("value_type", TYPES)
def test_emulated(emulation: Emulation, value_type: torch.dtype, channels: int, fused: bool) -> None:
    check_emulated(emulation, Inputs(value_type, channels=channels, fused=fused))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 55, "channels": 32, "points": 4},  # as many as positions: in tiles, of which most are cut
        {"queries": 150, "batch": 1, "heads": 3, "channels": 16},  # several blocks, the last one not full
        {"points": 9, "channels": 16},  # more samples than lanes, and no multiple of them
        {"shapes": [(1, 2)] * 9, "points": 1},  # more levels than a kernel's parameters hold
        {"channels": 100, "heads": 1},
    ],
)
def test_emulated_sizes(emulation: Emulation, sizes: dict, fused: bool) -> None:
    check_emulated(emulation, Inputs(fused=fused, **sizes))


@pytest.mark.parametrize("fused", [False, True])
def test_emulated_strides(emulation: Emulation, fused: bool) -> None:
    """Parts of larger tensors, as the products of one matrix are, and reference points that all pictures share."""
    for padding in (4, 1):  # 128-bit loads possible, and not
        inputs = Inputs(fused=fused)
        inputs.reference_points = inputs.reference_points[:1]
        for name, dimension in (("value", 3), ("sampling", 2), ("attention", 2)):
            tensor = getattr(inputs, name)
            beside = torch.full_like(tensor.narrow(dimension, 0, 1), torch.nan).repeat_interleave(padding, dimension)
            part = torch.cat([beside, tensor, beside], dimension).narrow(dimension, padding, tensor.shape[dimension])
            setattr(inputs, name, part)
        check_emulated(emulation, inputs)


def test_emulated_not_finite(emulation: Emulation) -> None:
    """What isn't finite spreads to where it is read or added, and nowhere else."""
    inputs = Inputs(shapes=[(4, 4)], batch=1, queries=2, heads=1, points=1, channels=40)
    inputs.sampling[0, 0] = 0.0  # a corner: reads the first cell and three outside
    inputs.sampling[0, 1] = torch.tensor([torch.nan, torch.inf])
    inputs.value[0, 1:] = torch.nan
    inputs.attention.fill_(1.0)
    output = emulation.forward(inputs)
    torch.testing.assert_close(output[0, 0], inputs.value[0, 0, 0] / 4)
    assert (output[0, 1] == 0).all()
    inputs.grad_output[0, 0, 3] = torch.inf
    inputs.grad_output[0, 0, 35] = torch.nan
    for deterministic in (False, True):
        grad_value, grad_sampling, grad_attention = emulation.backward(inputs, deterministic)
        finite = grad_value[0, :, 0].isfinite()
        assert (~finite).nonzero().tolist() == [[0, 3], [0, 35]]
        assert torch.equal(grad_value[0, 0, 0, :3], inputs.grad_output[0, 0, :3] / 4)
        assert (grad_value[0, 1:] == 0).all()
        assert (grad_sampling[0, 1] == 0).all() and (grad_attention[0, 1] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_emulated_fixed_point(emulation: Emulation, scale: float) -> None:
    """The deterministic sums are exact to 2^-40 of the largest, whatever its size."""
    inputs = Inputs(torch.float64, queries=40)
    inputs.grad_output *= scale
    expected = inputs.expected()[1][0]
    actual = emulation.backward(inputs, deterministic=True)[0]
    assert float((actual - expected).abs().max()) <= 2.0**-40 * float(expected.abs().max())


# --- compiled for GPUs -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiles_without_warnings(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("nvcc is not at hand")
    source = tmp_path / "all_kernels.cu"
    source.write_text("""
#include "kernels.cuh"
using namespace mask2former::cuda;
struct Launch {
  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), int64_t blocks, A... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), threads_per_block>>>(arguments...);
  }
};
void all(mask2former::Type value, const Problem& problem, const Gradients& gradients, void* output) {
  with_type(value, [&](auto kernels) {
    kernels.forward(Launch(), problem, output);
    kernels.backward(Launch(), problem, 1, gradients);
    kernels.finish(Launch(), problem, 1, gradients, output);
  });
}
""")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (75, 80, 90, 100)]
    flags = ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-Wall,-Wextra", f"-I{SOURCES}", "-c"]
    command = [nvcc, *flags, *targets, str(source), "-o", str(tmp_path / "all_kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu() -> Iterator[Callable[[Inputs, int], tuple[Tensor, Gradients]]]:
    """Output and gradients of the operators on the GPU of a number."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    from mask2former.ops.extension import KERNELS, reason

    if "cuda" not in KERNELS:
        pytest.skip(f"there are no CUDA kernels: {reason('cuda')}")

    def run(inputs: Inputs, device: int = 0) -> tuple[Tensor, Gradients]:
        sampling = [inputs.sampling, inputs.attention]
        if inputs.fused:
            sampling.insert(0, inputs.reference_points)
        grad_output, value, *sampling = (x.to(f"cuda:{device}") for x in (inputs.grad_output, inputs.value, *sampling))
        sizes = [number for shape in inputs.shapes for number in shape]
        name = "ms_deform_attn_fused" if inputs.fused else "ms_deform_attn"
        output = getattr(torch.ops.mask2former, name)(value, sizes, *sampling)
        grads = getattr(torch.ops.mask2former, f"{name}_backward")(grad_output, value, sizes, *sampling)
        return output, grads

    yield run
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("channels", [16, 32, 64, 5, 100])
@pytest.mark.parametrize(
    ("value_type", "sampling_type"),
    [
        *((dtype, dtype) for dtype in TYPES),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_on_gpu(
    on_gpu: Callable[..., tuple[Tensor, Gradients]],
    value_type: torch.dtype,
    sampling_type: torch.dtype,
    channels: int,
    fused: bool,
    deterministic: bool,
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    for sizes in ({}, {"queries": 1000, "heads": 8}, {"shapes": [(2, 2)] * 9}, {"queries": 0}, {"batch": 0}):
        inputs = Inputs(value_type, sampling_type, channels=channels, fused=fused, **sizes)
        if inputs.grad_output.numel():
            inputs.check(*on_gpu(inputs))
        else:
            assert on_gpu(inputs)[0].shape == inputs.grad_output.shape


def test_deterministic_on_gpu(on_gpu: Callable[..., tuple[Tensor, Gradients]]) -> None:
    torch.use_deterministic_algorithms(True)
    inputs = Inputs(shapes=[(4, 4)], queries=5000, heads=8, channels=32, points=4)
    first = on_gpu(inputs)[1]
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(first, on_gpu(inputs)[1], strict=True))


def test_on_second_gpu(on_gpu: Callable[..., tuple[Tensor, Gradients]]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    inputs = Inputs(channels=32, fused=True)
    inputs.check(*on_gpu(inputs, 1))
