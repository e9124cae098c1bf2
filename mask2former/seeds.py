"""Random generators seeded by a key, such as (seed, number of the step), so that their state need not be kept."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["SAMPLE", "SAMPLER", "STEP", "seed_generators", "seeded"]

# What a key begins with says what it is for: the same numbers behind it are then another key.
SAMPLE, SAMPLER, STEP = 1, 2, 3


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of all devices, by ``key``: integers of at least 0."""
    _seed_on_cpu(key)
    torch.manual_seed(torch.default_generator.initial_seed())


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """A block in which the generators on the CPU are seeded by ``key``; behind it they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=()):
        _seed_on_cpu(key)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _seed_on_cpu(key: tuple[int, ...]) -> None:
    words = np.random.SeedSequence(key).generate_state(8)  # 32 bits each
    np.random.seed(words[:4])
    random.seed(words[4:6].tobytes())
    torch.default_generator.manual_seed(int(words[6]) << 32 | int(words[7]))
