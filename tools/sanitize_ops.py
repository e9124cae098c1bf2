#!/usr/bin/env python
"""Run the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, which end the program at the first mistake.

Builds them with GCC's sanitizers in a temporary folder, about a minute; what is installed stays as it is. Then every
capability of this CPU goes through the operators. Deformable attention, forward and backward, plain and fused, in all
four dtypes: usual and odd sizes, none at all, places far outside, NaN and infinity, parts of larger tensors, more
threads than heads. Results of masks: sizes around that of a tile, none at all, NaN and infinity, parts of larger
tensors. Position-wise layers, forward and backward: numbers of positions around that of a block, widths around that
of a vector. Masks at points: numbers of points around those that kernels take together, far outside, NaN and infinity.
Convolutions: sizes around that of a tile, widths around that of a vector. Masked attention: numbers of keys around that
of a block and that of a vector. Products of matrices: sizes around those of tiles and panels, rows or columns side by
side.

Exits with 1 where something was found, and shows it.

examples:
  python tools/sanitize_ops.py
  python tools/sanitize_ops.py --capabilities default avx2
"""

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# By its path: the package imports other compiled libraries, and those are not what is to be looked at.
specification = importlib.util.spec_from_file_location(
    "mask2former_build", Path(__file__).resolve().parent.parent / "mask2former" / "ops" / "build.py"
)
build = importlib.util.module_from_spec(specification)
specification.loader.exec_module(build)

CAPABILITIES = ("default", "avx2", "avx512")  # as in ATEN_CPU_CAPABILITY
# Numbers that the integer they are cast to can't hold count as mistakes, too.
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
COMPILER_FLAGS = f"{SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer"
REPORT_LINES = 60  # after the place in the kernels come hundreds of calls inside of Python

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
THREADS = (1, 3, 16)
# What differs from two pictures, 19 queries, 3 heads, 8 channels, 3 levels and 2 points.
SIZES: tuple[dict, ...] = (
    *({"channels": channels} for channels in (1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 100)),
    {"batch": 1, "heads": 1, "queries": 1, "points": 1, "channels": 1, "shapes": ((1, 1),)},
    {"batch": 1, "heads": 8, "queries": 100, "points": 4, "channels": 32, "shapes": ((8, 8), (4, 4), (2, 2))},
    {"batch": 1, "queries": 700, "channels": 100, "shapes": ((64, 65), (9, 8))},
    {"shapes": ((1, 2),) * 9, "points": 9},
    {"shapes": ((0, 3), (2, 2), (4, 0))},
    {"shapes": ((0, 0),)},
    *({name: 0} for name in ("batch", "queries", "heads", "channels", "points")),
    {"shapes": ()},
)
# Pictures, positions, channels, hidden features.
POSITION_WISE_SIZES = ((2, 3, 1, 1), (1, 255, 16, 33), (2, 257, 15, 17), (1, 600, 64, 100), (0, 5, 8, 8), (1, 0, 8, 8))
# Of convolutions: pictures, channels in and out, height, width.
CONVOLUTION_SIZES = ((1, 1, 1, 1, 1), (2, 3, 17, 4, 5), (1, 15, 33, 9, 3), (1, 64, 16, 37, 41), (0, 3, 3, 8, 8))
# Of masked attention: pictures, heads, queries, keys, channels.
ATTENTION_SIZES = ((1, 1, 1, 1, 1), (2, 3, 5, 1023, 17), (1, 2, 3, 1024, 16), (1, 2, 4, 2049, 15), (0, 2, 3, 4, 5))
# Of products: rows, depth, columns.
PRODUCT_SIZES = (
    (1, 1, 1),
    (13, 257, 33),
    (253, 3, 513),
    (12, 256, 16),
    (25, 600, 100),
    (0, 2, 3),
    (3, 0, 2),
    (3, 2, 0),
)
# Of strips: masks, rows, columns.
STRIP_SIZES = ((1, 1, 1), (3, 8, 64), (5, 9, 65), (2, 17, 63), (100, 20, 200), (4, 0, 5), (4, 5, 0))
# For masks at points; kernels take 256 points at a time, and 16 numbers.
MAP_SIZES = ((2, 2), (3, 7), (20, 33))
POINT_COUNTS = (0, 1, 15, 16, 17, 255, 256, 257, 3000)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=CAPABILITIES, help="default: all")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)  # for the processes that the command starts
    args = parser.parse_args(arguments)
    if args.library:
        passes = go_through_operators(args.library)
        print(f"{passes} passes in the kernels for {torch.backends.cpu.get_cpu_capability()}", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="mask2former-sanitize-") as folder:
        library = build_sanitized(Path(folder))
        for capability in args.capabilities:
            print(f"{run_sanitized(library, capability)}: nothing found", flush=True)


def build_sanitized(folder: Path) -> Path:
    """Build the CPU kernels with sanitizers into a folder; -> the library."""
    os.environ.update(CFLAGS=COMPILER_FLAGS, LDFLAGS=SANITIZERS)
    record = build.build("cpu", folder, say=lambda line: print(line, flush=True))
    if "library" not in record:
        sys.exit(f"error: there is no library to run: {record['reason']}")
    library = folder / record["library"]
    contents = library.read_bytes()
    if b"__asan_report" not in contents or b"__ubsan_handle" not in contents:
        sys.exit("error: the compiler left the sanitizers out")
    return library


def run_sanitized(library: Path, capability: str) -> str:
    """Go through the operators in a process that has the sanitizers from its start; -> what it says it did."""
    compiler = os.environ.get("CXX", "c++").split()
    runtime = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ATEN_CPU_CAPABILITY": capability,
    }
    outcome = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--library", str(library)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if outcome.returncode != 0:
        report = "\n".join(f"{outcome.stdout}{outcome.stderr}".splitlines()[:REPORT_LINES])
        sys.exit(f"error: {capability}: something was found\n{report}")
    return outcome.stdout.strip()


def go_through_operators(library: Path) -> int:
    """Call the operators of a library with all that is meant to be tried; -> number of forward and backward passes."""
    torch.ops.load_library(str(library))
    passes = 0
    for threads, sizes, dtype, parts in itertools.product(THREADS, SIZES, DTYPES, (False, True)):
        torch.set_num_threads(threads)
        value, spatial_shapes, references, sampling, attention = random_arguments(dtype, parts, **sizes)
        for name, points in (("ms_deform_attn", ()), ("ms_deform_attn_fused", (references,))):
            arguments = (value, spatial_shapes, *points, sampling, attention)
            output = getattr(torch.ops.mask2former, name)(*arguments)
            getattr(torch.ops.mask2former, f"{name}_backward")(torch.ones_like(output), *arguments)
            passes += 2
    for threads, size, parts in itertools.product(THREADS, STRIP_SIZES, (False, True)):
        torch.set_num_threads(threads)
        passes += go_through_strip(*size, parts)
    for threads, sizes in itertools.product(THREADS, POSITION_WISE_SIZES):
        torch.set_num_threads(threads)
        passes += go_through_position_wise(*sizes)
    for threads, sizes in itertools.product(THREADS, CONVOLUTION_SIZES):
        torch.set_num_threads(threads)
        passes += go_through_convolution(*sizes)
    for threads, sizes in itertools.product(THREADS, ATTENTION_SIZES):
        torch.set_num_threads(threads)
        passes += go_through_attention(*sizes)
    for threads, sizes in itertools.product(THREADS, PRODUCT_SIZES):
        torch.set_num_threads(threads)
        passes += go_through_products(*sizes)
    return passes + go_through_point_operators()


def go_through_products(rows: int, depth: int, columns: int) -> int:
    """Multiply matrices of every layout that ends where memory does."""

    def matrix(*size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size), torch.randn(size[::-1]).T

    sides = (matrix(rows, depth), matrix(depth, columns), matrix(rows, columns), (False, True))
    return sum(torch.ops.mask2former.multiply(*call) is None for call in itertools.product(*sides))


def go_through_point_operators() -> int:
    """Call those for masks at points, likewise."""
    operators, passes = torch.ops.mask2former, 0
    for threads, size, rows, count in itertools.product(THREADS, MAP_SIZES, (0, 1, 5), POINT_COUNTS):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        # Parts of larger memory, each with its end at the end of it.
        memory = torch.randn(rows, 3 + size[0] * size[1])
        maps = memory[:, 3:].unflatten(1, size)
        points = operators.random_points((rows, count, 2), 7) * 1.5
        for extreme in (1e30, torch.inf, -torch.inf, torch.nan):
            points.masked_fill_(torch.rand(points.shape) < 0.02, extreme)
            maps.masked_fill_(torch.rand(maps.shape) < 0.01, extreme)
        index = torch.arange(rows).flip(0)
        operators.sample_points(maps > 0, points, index)
        values = operators.sample_points(maps, points, None)
        grad = operators.loss_sums_backward(operators.loss_sums(values, points[..., 0].contiguous()), values, values)
        operators.to_probabilities(values.clone())
        for kept in (0, 1, count):
            operators.draw_nearest_to_zero(maps, 2 * count + 1, 7, points[:, :kept], values[:, :kept])
        operators.spread_points(grad, points, maps)
        passes += 1
    return passes


def go_through_strip(masks: int, rows: int, columns: int, parts: bool) -> int:
    """Make all results of random masks; with ``parts``, from and in parts of larger tensors; -> number of passes."""
    torch.manual_seed(0)
    beside = 1 if parts else 0
    maps = 9 * torch.randn(masks, 4 + beside, columns + beside)
    for extreme in (1e30, torch.inf, -torch.inf, torch.nan):
        maps.masked_fill_(torch.rand(maps.shape) < 0.02, extreme)
    strip = (maps[:, beside:, beside:], torch.randint(4, (rows,)), torch.randint(4, (rows,)), torch.rand(rows))
    probabilities, chosen = torch.rand(13, masks), torch.randint(masks, (2 * masks,))
    operators = torch.ops.mask2former
    operators.class_labels(*strip, probabilities)
    operators.class_scores(*strip, probabilities, torch.empty(13, rows + beside, columns + beside)[:, beside:, beside:])
    operators.mask_winners(*strip, chosen, torch.rand(2 * masks))
    binary = torch.empty(2 * masks, rows + beside, columns + beside, dtype=torch.bool)
    operators.binary_masks(*strip, chosen, binary[:, beside:, beside:])
    return 4


def go_through_position_wise(batch: int, positions: int, channels: int, hidden: int) -> int:
    """The operators on random numbers; -> number of passes."""
    torch.manual_seed(0)
    x, position = torch.randn(batch, positions, channels), torch.randn(1, positions, channels)
    operators = torch.ops.mask2former
    widths = (channels, 3, 2 * channels)
    weights, biases = [torch.randn(m, channels) for m in widths], [torch.randn(m) for m in widths]
    results = operators.project_positions(x, position, weights, biases)
    square, row = (channels, channels), (channels,)
    shapes = (square, row, row, row, (hidden, channels), (hidden,), (channels, hidden), row, row, row)
    parameters = [torch.randn(shape) for shape in shapes]
    operators.add_and_feed_forward(x, x, parameters, 1e-5, 1e-5, False)
    result, *sums = operators.add_and_feed_forward(x, x, parameters, 1e-5, 1e-5, True)
    for needed in (True, False):
        operators.project_positions_backward(results, x, position, weights, [needed] * 8)
        operators.add_and_feed_forward_backward(result, *sums, x, parameters, 1e-5, 1e-5, [needed] * 12)
    return 7


def go_through_convolution(batch: int, channels: int, outputs: int, height: int, width: int) -> int:
    """The three operators on random numbers; -> number of passes."""
    torch.manual_seed(0)
    x, weight = torch.randn(batch, channels, height, width), torch.randn(outputs, channels, 3, 3)
    operators = torch.ops.mask2former
    grad = operators.conv3x3(x, weight, torch.randn(outputs))
    operators.conv3x3_backward_input(grad, weight)
    operators.conv3x3_backward_weight(grad, x)
    return 3


def go_through_attention(batch: int, heads: int, queries: int, keys: int, channels: int) -> int:
    """Both operators on random numbers, with queries that may attend to nothing; -> number of passes."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, heads, rows, channels) for rows in (queries, keys, keys))
    bias = torch.zeros(batch, 1, queries, keys).masked_fill_(torch.rand(batch, 1, queries, keys) < 0.5, -torch.inf)
    bias[:, :, -1] = -torch.inf
    operators = torch.ops.mask2former
    results = operators.masked_attention(query, key, value, bias)
    operators.masked_attention_backward(results[0], query, key, value, bias, *results)
    return 2


def random_arguments(
    dtype: torch.dtype,
    parts: bool,
    *,
    batch: int = 2,
    queries: int = 19,
    heads: int = 3,
    channels: int = 8,
    points: int = 2,
    shapes: Sequence[tuple[int, int]] = ((3, 5), (2, 2), (1, 4)),
) -> tuple[Tensor, list[int], Tensor, Tensor, Tensor]:
    """-> value, spatial shapes, reference points, offsets, logits; with ``parts``, parts of larger tensors."""
    torch.manual_seed(0)
    levels, positions = len(shapes), sum(height * width for height, width in shapes)
    samples = levels * points
    value = torch.randn(batch, positions, heads, channels + 1).to(dtype)[..., 1:]
    # Offsets and logits of one product, as the module makes them.
    product = torch.randn(batch, queries, heads * samples * 3, dtype=torch.promote_types(dtype, torch.float32))
    sampling = product[..., : heads * samples * 2].view(batch, queries, heads, levels, points, 2)
    attention = product[..., heads * samples * 2 :].view(batch, queries, heads, levels, points)
    for extreme in (1e4, -1e4, torch.finfo(torch.float16).max, torch.inf, -torch.inf, torch.nan):
        sampling.masked_fill_(torch.rand(sampling.shape) < 0.02, extreme)
    for extreme in (torch.inf, torch.nan):
        value.masked_fill_(torch.rand(value.shape) < 0.01, extreme)
        attention.masked_fill_(torch.rand(attention.shape) < 0.01, extreme)
    references = torch.rand(1, queries, 1, 2).expand(-1, -1, levels, -1)
    if not parts:
        value, references, sampling, attention = (x.contiguous() for x in (value, references, sampling, attention))
    return value, [size for shape in shapes for size in shape], references, sampling, attention


if __name__ == "__main__":
    main()
