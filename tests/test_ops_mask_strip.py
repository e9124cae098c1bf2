"""The compiled kernels that make results of masks, against plain PyTorch."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mask2former.ops import MaskStrip, extension

pytestmark = pytest.mark.skipif("cpu" not in extension.KERNELS, reason=f"no CPU kernels: {extension.reason('cpu')}")

problems = st.fixed_dictionaries(
    {
        "masks": st.integers(1, 12),
        "map_rows": st.integers(1, 6),
        "rows": st.integers(1, 20),
        "columns": st.integers(1, 140) | st.sampled_from([63, 64, 65, 128]),
        "classes": st.integers(1, 14),
        "instances": st.integers(0, 15),
        "seed": st.integers(0, 1 << 20),
    }
)


class Problem:
    """A strip at random, some of whose masks are nearly all outside, and what is asked of it.

    Logits are odd multiples of 1/32: none is so near to 0 that rounding decides what is inside.
    """

    def __init__(
        self, masks: int, map_rows: int, rows: int, columns: int, classes: int, instances: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        maps = 4 * torch.randn(masks, map_rows, columns, generator=generator)
        maps -= 9 * torch.rand(masks, 1, 1, generator=generator)
        self.maps = (4 * maps).round() / 4 + 1 / 32
        self.low, self.high = torch.randint(map_rows, (2, rows), generator=generator)
        self.share = torch.randint(4, (rows,), generator=generator) / 4
        # Nearly the same for all classes, or of few classes that kernels take apart from those that can't be the best.
        self.class_probabilities = torch.rand(classes, masks, generator=generator) ** (40 if seed % 2 else 1)
        self.rivals = torch.randperm(masks, generator=generator)[: (masks + 1) // 2]
        self.scores = torch.rand(len(self.rivals), generator=generator)
        self.instances = torch.randint(masks, (instances,), generator=generator)

    @property
    def strip(self) -> MaskStrip:
        """The masks, of which nothing is made yet."""
        return MaskStrip(self.maps, self.low, self.high, self.share)

    def results(self) -> dict[str, Tensor]:
        """Everything that a strip gives, by name."""
        strip, size = self.strip, (len(self.low), self.maps.shape[2])
        scores = torch.full((len(self.class_probabilities), size[0] + 2, size[1]), 7.0)
        strip.write_class_scores(self.class_probabilities, scores[:, 1:-1])
        binary = torch.ones(len(self.instances), *size, dtype=torch.bool)
        inside = strip.write_binary_masks(self.instances, binary)
        asked = self.instances.unique()  # of the others, no one asked
        return {
            "class_scores": scores,
            "class_labels": strip.class_labels(self.class_probabilities),
            "binary": binary,
            **{name: x[asked] for name, x in inside._asdict().items()},
            **strip.winners(self.rivals, self.scores)._asdict(),
        }

    def close_pixels(self) -> dict[str, int]:
        """Of results that are the best of several, for how many pixels rounding may decide."""
        probabilities = self.strip.logits.sigmoid()
        return {
            "class_labels": _close(torch.einsum("kn,nrw->krw", self.class_probabilities, probabilities)),
            **dict.fromkeys(
                ("winner", "visible", "remaining"), _close(self.scores[:, None, None] * probabilities[self.rivals])
            ),
        }


def _close(values: Tensor) -> int:
    """In how many pixels the best two of values (N, R, W) are the same within rounding."""
    if len(values) < 2:
        return 0
    best, second = values.topk(2, dim=0).values
    return int((best - second < 1e-5).sum())


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """No kernels in the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "KERNELS", frozenset())
        yield


def assert_equals_plain(problem: Problem) -> None:
    """All results but for rounding."""
    results = problem.results()
    with plain_pytorch():
        expected = problem.results()
    close = problem.close_pixels()
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        ours = results[name]
        assert ours.dtype == x.dtype and ours.shape == x.shape, name
        if x.is_floating_point():
            torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        elif name in ("visible", "remaining"):  # a pixel that one loses another one gets
            assert (ours - x).abs().sum() <= 2 * close[name], name
        else:
            assert (ours != x).sum() <= close.get(name, 0), name


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems)
def test_results_equal_plain_pytorch(sizes: dict[str, int]) -> None:
    assert_equals_plain(Problem(**sizes))


def usual(**others: int) -> Problem:
    sizes = {"masks": 100, "map_rows": 7, "rows": 19, "columns": 301, "classes": 133, "instances": 100, "seed": 0}
    return Problem(**{**sizes, **others})


@pytest.mark.parametrize("seed", [0, 1])
def test_usual_sizes(seed: int) -> None:
    assert_equals_plain(usual(seed=seed))


def test_a_class_may_be_the_best_in_one_pixel_of_a_thousand() -> None:
    """Though another one is nearly everywhere, and more are nowhere."""
    logits = torch.full((3, 20, 50), -9.0)
    logits[0] = 9
    logits[:2, 7, 31] = logits.new_tensor([-9, 9])
    probabilities = torch.tensor([[0, 0, 0.9], [0.9, 0, 0], [0, 0.5, 0], [0.1, 0.4, 0.1]])
    labels = MaskStrip.whole(logits).class_labels(probabilities)
    expected = torch.ones_like(labels)
    expected[7, 31] = 2
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_capabilities(capability: str) -> None:
    """In a process that torch tells another CPU."""
    program = "import test_ops_mask_strip as test; test.assert_equals_plain(test.usual())"
    program += "; import torch; print(torch.backends.cpu.get_cpu_capability())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.strip() in {"default": ("DEFAULT", "NO AVX"), "avx2": ("AVX2",)}[capability]  # as torch is old


def test_results_are_the_same_whatever_the_threads() -> None:
    """But for the sum of probabilities, whose parts are added in another order."""
    problem, before = usual(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = problem.results()
        torch.set_num_threads(5)
        results = [problem.results() for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for name, x in expected.items():
        assert torch.equal(results[0][name], results[1][name]), name
        torch.testing.assert_close(results[0][name], x, atol=0, rtol=1e-5 if name == "above_half" else 0)


def test_the_first_of_equal_masks_and_classes_wins() -> None:
    strip = MaskStrip.whole(torch.ones(9, 2, 70))
    assert not strip.class_labels(torch.ones(20, 9)).any()
    found = strip.winners(torch.tensor([3, 1, 2]), torch.tensor([0.5, 0.7, 0.7]))
    assert (found.winner == 1).all()
    assert found.visible.tolist() == found.remaining.tolist() == [0, 140, 0]
    assert found.whole.tolist() == [140, 140, 140]


def test_extreme_logits() -> None:
    """Probabilities of 0 and 1; what is not a number belongs to no mask and is inside of none."""
    strip = MaskStrip.whole(torch.tensor([[[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, torch.nan]]]))
    scores, binary = torch.empty(1, 1, 8), torch.zeros(1, 1, 8, dtype=torch.bool)
    strip.write_class_scores(torch.ones(1, 1), scores)
    torch.testing.assert_close(scores[0, 0, :7], torch.tensor([0, 0, 0, 0.5, 1, 1, 1]))
    assert scores[0, 0, 7].isnan()
    strip.write_binary_masks(torch.tensor([0]), binary)
    assert binary[0, 0].tolist() == [False] * 4 + [True] * 3 + [False]
    found = strip.winners(torch.tensor([0]), torch.ones(1))
    assert found.winner[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 1]


def test_strips_of_nothing() -> None:
    for size in ((3, 0, 5), (3, 5, 0)):
        strip = MaskStrip.whole(torch.zeros(size))
        assert strip.class_labels(torch.ones(4, 3)).shape == size[1:]
        assert strip.winners(torch.tensor([1]), torch.ones(1)).visible.tolist() == [0]
        inside = strip.write_binary_masks(torch.tensor([0]), torch.zeros(1, *size[1:], dtype=torch.bool))
        assert inside.area.tolist() == [0, 0, 0]


def test_operators_keep_to_their_schemas() -> None:
    """They write what they say, and torch's fake tensors know the shapes of their results."""
    problem = usual(masks=5, columns=70)
    strip = (problem.maps, problem.low, problem.high, problem.share)
    binary = torch.zeros(100, 19, 70, dtype=torch.bool)
    operators = torch.ops.mask2former
    for operator, arguments in (
        (operators.class_labels, (problem.class_probabilities,)),
        (operators.class_scores, (problem.class_probabilities, torch.zeros(133, 19, 70))),
        (operators.mask_winners, (problem.rivals, problem.scores)),
        (operators.binary_masks, (problem.instances, binary)),
    ):
        torch.library.opcheck(operator, (*strip, *arguments), test_utils=("test_schema", "test_faketensor"))


def test_gradients_take_plain_pytorch() -> None:
    problem = usual(rows=3, columns=9)
    problem.class_probabilities.requires_grad_()
    scores = torch.zeros(133, 3, 9)
    problem.strip.write_class_scores(problem.class_probabilities, scores)
    (grad,) = torch.autograd.grad(scores.sum(), problem.class_probabilities)
    torch.testing.assert_close(grad, problem.strip.probabilities.sum((1, 2)).expand(133, 100))
    with torch.no_grad():
        assert torch.equal(problem.strip.class_labels(problem.class_probabilities), scores.argmax(0).int())


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a row that there isn't": (
        lambda o: o.class_labels(maps(), rows(2), rows(), share(), torch.ones(4, 3)),
        "low must be from 0 to 1, but has 2",
    ),
    "a row before the first": (
        lambda o: o.class_labels(maps(), rows(), rows(-1), share(), torch.ones(4, 3)),
        "high must be from 0 to 1, but has -1",
    ),
    "another number of rows": (
        lambda o: o.class_labels(maps(), rows(), rows()[:2], share(), torch.ones(4, 3)),
        "one number a row",
    ),
    "float64": (
        lambda o: o.class_labels(maps().double(), rows(), rows(), share(), torch.ones(4, 3)),
        "maps must be Float",
    ),
    "classes of other masks": (
        lambda o: o.class_labels(maps(), rows(), rows(), share(), torch.ones(4, 2)),
        r"class_probabilities must be \(K, N\) with N 3",
    ),
    "classes less likely than not at all": (
        lambda o: o.class_labels(maps(), rows(), rows(), share(), -torch.ones(4, 3)),
        "class_probabilities must be 0 or more, but has -1",
    ),
    "scores of another size": (
        lambda o: o.class_scores(maps(), rows(), rows(), share(), torch.ones(4, 3), torch.ones(4, 2, 5)),
        r"scores must be \(K, R, W\)",
    ),
    "scores with columns apart": (
        lambda o: o.class_scores(maps(), rows(), rows(), share(), torch.ones(4, 3), torch.ones(4, 5, 3).mT),
        "contiguous rows",
    ),
    "a mask that there isn't": (
        lambda o: o.mask_winners(maps(), rows(), rows(), share(), rows(3), torch.ones(3)),
        "rivals must be from 0 to 2, but has 3",
    ),
    "no masks at all": (
        lambda o: o.mask_winners(maps(), rows(), rows(), share(), rows()[:0], torch.ones(0)),
        "at least one",
    ),
    "an instance of no mask": (
        lambda o: o.binary_masks(maps(), rows(), rows(), share(), rows(-1), torch.zeros(3, 3, 5, dtype=torch.bool)),
        "places must be from 0 to 2, but has -1",
    ),
    "too few places for instances": (
        lambda o: o.binary_masks(maps(), rows(), rows(), share(), rows(), torch.zeros(2, 3, 5, dtype=torch.bool)),
        r"binary must be \(M, R, W\)",
    ),
    "bytes for instances": (
        lambda o: o.binary_masks(maps(), rows(), rows(), share(), rows(), torch.zeros(3, 3, 5, dtype=torch.uint8)),
        "binary must be Bool",
    ),
}


def maps() -> Tensor:
    return torch.zeros(3, 2, 5)


def rows(last: int = 0) -> Tensor:
    return torch.tensor([0, 1, last])


def share() -> Tensor:
    return torch.zeros(3)


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit(name: str) -> None:
    """The operators say so, and reach nowhere."""
    call, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.mask2former)
