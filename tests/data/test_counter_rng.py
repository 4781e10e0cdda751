import numpy as np
import pytest
import torch
from scipy import stats

from spice_dist.data.counter_rng import uniform

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """The next output of the published generator in this state, in Python's unbounded integers."""
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def expected(key: tuple[int, ...], index: int, draw: int) -> float:
    state = 0
    for part in key:
        state = splitmix64(state + part)
    row = splitmix64(state + (index - 1) * GOLDEN)
    return (splitmix64(row + draw * GOLDEN) >> 40) / 2**24


def test_the_oracle_is_the_published_splitmix64():
    outputs = [splitmix64(1234567 + step * GOLDEN) for step in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", [(), (0,), (7, 3, 2, 1), (-1, 5), (2**63 - 1, 2**40), (0, 0, 0)])
def test_numbers_equal_splitmix64_in_unbounded_integers(key: tuple[int, ...]):
    index = [0, 1, 2, 59_999, 2**31, 2**40 + 1]
    numbers = uniform(key, torch.tensor(index), 5)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [[expected(key, i, draw) for draw in range(5)] for i in index]


def test_numbers_of_an_index_do_not_depend_on_its_batch():
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    together = uniform((1, 2, 3), index, 4)
    for place in range(0, 1000, 97):
        assert torch.equal(uniform((1, 2, 3), index[place : place + 1], 4), together[place : place + 1])
    assert torch.equal(uniform((1, 2, 3), index.flip(0), 4), together.flip(0))
    assert torch.equal(uniform((1, 2, 3), index, 2), together[:, :2])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_numbers_do_not_depend_on_the_integer_type_of_the_index(dtype: torch.dtype):
    index = torch.arange(100)
    assert torch.equal(uniform((1, 2), index.to(dtype), 3), uniform((1, 2), index, 3))


def test_neighbouring_seeds_epochs_streams_indices_and_draws_are_uncorrelated():
    n = 20_000
    index = torch.arange(n)
    base = uniform((5, 6, 7), index, 2)
    others = {
        "seed": uniform((6, 6, 7), index, 1)[:, 0],
        "epoch": uniform((5, 7, 7), index, 1)[:, 0],
        "stream": uniform((5, 6, 8), index, 1)[:, 0],
        "order of the key": uniform((6, 5, 7), index, 1)[:, 0],
        "one part more": uniform((5, 6, 7, 0), index, 1)[:, 0],
        "index": uniform((5, 6, 7), index + 1, 1)[:, 0],
        "draw": base[:, 1],
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base[:, 0], other)[0, 1]) < 4 / n**0.5, name
        assert (base[:, 0] == other).sum() <= 3, name


@pytest.mark.parametrize("along", ["index", "draws", "epochs"])
def test_numbers_are_uniform_in_zero_to_one(along: str):
    if along == "index":
        numbers = uniform((0, 0, 0), torch.arange(100_000), 1).flatten()
    elif along == "draws":
        numbers = uniform((0, 0, 0), torch.tensor([0]), 100_000).flatten()
    else:
        numbers = torch.cat([uniform((0, epoch, 0), torch.arange(1000), 1)[:, 0] for epoch in range(100)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.chisquare(np.bincount((numbers * 256).long(), minlength=256)).pvalue > 1e-3
    pairs = (numbers[::2] * 16).long() * 16 + (numbers[1::2] * 16).long()  # neighbours fill the square evenly
    assert stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-3
    assert abs(numbers.double().mean() - 1 / 2) < 4 / (12 * 1e5) ** 0.5
    assert abs(numbers.double().var() - 1 / 12) < 4 / (180 * 1e5) ** 0.5
