"""Points of maps: compiled kernels, and what stands in for them, against torch's own operators and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.ops import extension
from mask2former.ops.points import (
    draw_nearest_to_zero,
    loss_sums,
    loss_sums_backward,
    random_points,
    sample_points,
    spread_points,
    to_probabilities,
)

SIZES = [(2, 2), (7, 5), (16, 33), (1, 6), (5, 1)]  # the last two have no kernels
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=["kernels", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each test runs with kernels and without."""
    torch.manual_seed(0)
    if request.param == "plain":
        monkeypatch.setattr(extension, "KERNELS", frozenset())
    elif "cpu" not in extension.KERNELS:
        pytest.skip(f"no CPU kernels: {extension.reason('cpu')}")
    return request.param == "kernels"


def some_points(rows: int, count: int = 700) -> Tensor:
    """Points inside and outside of maps, at edges and far away, more than kernels take at a time."""
    points = torch.rand(rows, count, 2) * 2.6 - 1.3
    points[:, :8] = torch.tensor([[-1, -1], [1, 1], [-1, 1], [0, 0], [1e9, 0], [0, -1e9], [3, 0], [0, -3]])
    return points


def grid_sample(maps: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(maps[:, None], points[:, None], align_corners=False)[:, 0, 0]


@pytest.mark.parametrize("size", SIZES)
def test_values_are_those_of_grid_sample(size: tuple[int, int]) -> None:
    maps, points = torch.randn(3, *size), some_points(3)
    torch.testing.assert_close(sample_points(maps, points), grid_sample(maps, points))
    masks = maps > 0
    torch.testing.assert_close(sample_points(masks, points), grid_sample(masks.float(), points))
    index = torch.tensor([2, 0, 0, 1, 2])
    points = some_points(5)
    torch.testing.assert_close(sample_points(maps, points, index), grid_sample(maps[index], points))
    apart = torch.randn(3, size[0] * size[1] + 4)[:, : size[0] * size[1]].unflatten(1, size)
    torch.testing.assert_close(sample_points(apart, points[:3]), grid_sample(apart.contiguous(), points[:3]))
    assert sample_points(maps[:0], points[:0]).shape == (0, 700)
    part = torch.zeros(0, 9, 9)[:, :7, :7]  # of a larger picture's none
    assert sample_points(part, points[:0]).shape == (0, 700)
    assert sample_points(part > 0, points[:0], index[:0]).shape == (0, 700)


def test_an_index_beyond_the_maps_is_an_error() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        sample_points(torch.zeros(2, 4, 4), some_points(1), torch.tensor([2]))


@pytest.mark.parametrize("size", SIZES)
def test_spreading_is_the_gradient_of_sampling(size: tuple[int, int]) -> None:
    maps, points, grad = torch.randn(3, *size, requires_grad=True), some_points(3), torch.randn(3, 700)
    (expected,) = torch.autograd.grad(grid_sample(maps, points), maps, grad)
    result = torch.full((3, size[0] * size[1] + 4), math.nan)
    spread_points(grad, points, result[:, :-4].unflatten(1, size))
    torch.testing.assert_close(result[:, :-4].unflatten(1, size), expected, atol=1e-5, rtol=1e-5)
    assert result[:, -4:].isnan().all()


@pytest.mark.parametrize("kept", [0, 1, 333, 2999, 3000])
@pytest.mark.parametrize("size", SIZES)
def test_the_drawn_points_nearest_to_zero(size: tuple[int, int], kept: int) -> None:
    maps = torch.randn(3, *size)
    maps[1] = 0  # all are equal
    maps[2, 0, 0] = math.nan
    points, values = torch.full((3, kept + 2, 2), -2.0), torch.full((3, kept + 2), -2.0)
    torch.manual_seed(1)
    drawn = random_points(3, 3000, device=CPU)
    torch.manual_seed(1)
    draw_nearest_to_zero(maps, 3000, points[:, :kept], values[:, :kept])
    at_drawn = sample_points(maps, drawn)
    for row in range(3):
        place = {tuple(point): index for index, point in enumerate(drawn[row].tolist())}
        indices = [place[tuple(point)] for point in points[row, :kept].tolist()]
        assert len(set(indices)) == kept
        torch.testing.assert_close(values[row, :kept], at_drawn[row, indices], equal_nan=True, atol=0, rtol=0)
        nearest = at_drawn[row].abs().sort().values[:kept]  # NaN last
        torch.testing.assert_close(values[row, :kept].abs().sort().values, nearest, equal_nan=True, atol=0, rtol=0)
    assert (points[:, kept:] == -2).all() and (values[:, kept:] == -2).all()


def test_random_points_are_uniform_and_follow_the_seed() -> None:
    points = random_points(5, 20000, device=CPU)
    assert points.shape == (5, 20000, 2) and points.dtype == torch.float32
    assert points.min() >= -1 and points.max() < 1
    cells = ((points.flatten(0, 1) + 1) * 8).long()  # of 16 x 16
    counts = torch.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256).double()
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert 160 < chi_squared < 370  # of 255 degrees of freedom; five standard deviations
    assert len(points[..., 0].unique()) > 0.98 * 100000
    another = random_points(5, 20000, device=CPU)
    assert abs((points * another).mean()) < 0.004 and abs((points[:, 1:] * points[:, :-1]).mean()) < 0.004
    torch.manual_seed(0)
    assert torch.equal(random_points(5, 20000, device=CPU), points)
    assert random_points(0, 3, device=CPU).shape == (0, 3, 2)


def test_results_are_the_same_for_any_number_of_threads() -> None:
    maps, grad = torch.randn(5, 20, 30), torch.randn(5, 9000)

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        points, gradient = random_points(5, 9000, device=CPU), torch.empty(5, 20, 30)
        values = sample_points(maps, points)
        spread_points(grad, points, gradient)
        kept, at_kept = torch.empty(5, 50, 2), torch.empty(5, 50)
        draw_nearest_to_zero(maps, 3000, kept, at_kept)
        return [points, values, gradient, loss_sums(values, grad.sigmoid()), kept, at_kept]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results()
        torch.set_num_threads(3)
        assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_num_threads(threads)


def test_sums_of_losses_and_their_gradient() -> None:
    logits, labels, grad = torch.randn(4, 600) * 6, torch.rand(4, 600), torch.randn(4, 4)
    logits[:, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 30.0, -30.0])
    labels[:, 100:400] = labels[:, 100:400].round()
    exact = logits.double().requires_grad_()
    cross_entropy = F.binary_cross_entropy_with_logits(exact, labels.double(), reduction="none")
    parts = (cross_entropy, exact.sigmoid(), labels.double(), exact.sigmoid() * labels)
    expected = torch.stack([part.sum(1) for part in parts], dim=1)
    (gradient,) = torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(loss_sums(logits, labels).double(), expected, atol=1e-4, rtol=2e-6)
    torch.testing.assert_close(loss_sums_backward(grad, logits, labels).double(), gradient, atol=1e-6, rtol=1e-5)
    assert loss_sums(logits.index_fill(1, torch.tensor([5]), math.nan), labels)[:, :2].isnan().all()


def test_probabilities_of_logits_and_their_sums() -> None:
    logits = torch.randn(4, 700) * 6
    logits[:, :6] = torch.tensor([0.0, -0.0, 100.0, -100.0, 30.0, -30.0])
    for changed in (logits.clone(), torch.cat([logits, logits])[::2, 50:650], logits[:0], logits[:, :0]):
        expected = changed.double()
        sums = to_probabilities(changed).double()
        torch.testing.assert_close(changed.double(), expected.sigmoid(), atol=1e-7, rtol=1e-6)
        expected_sums = torch.stack([F.softplus(expected, threshold=1000).sum(1), expected.sigmoid().sum(1)], dim=1)
        torch.testing.assert_close(sums, expected_sums, atol=1e-4, rtol=2e-6)
    assert to_probabilities(logits.index_fill(1, torch.tensor([5]), math.nan)).isnan().all()


def test_other_types_than_float32_are_computed_too() -> None:
    maps, points, labels = (
        torch.randn(2, 6, 6, dtype=torch.float64),
        some_points(2).double(),
        torch.rand(2, 700).double(),
    )
    values = sample_points(maps, points)
    torch.testing.assert_close(values, grid_sample(maps, points))
    assert to_probabilities(values.clone()).dtype == torch.float64
    assert loss_sums(values, labels).dtype == loss_sums_backward(torch.ones(2, 4).double(), values, labels).dtype
    points, values = points.new_empty(2, 5, 2), points.new_empty(2, 5)
    draw_nearest_to_zero(maps, 300, points, values)
    torch.testing.assert_close(values, sample_points(maps, points))
