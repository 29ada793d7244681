import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers

from flagscale.data.blending import Epochs, Interleave

WEIGHTS = st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=6)


@settings(deadline=None, max_examples=200)
@given(weights=WEIGHTS, count=st.integers(1, 3000))
def test_shares_follow_the_weights_at_every_length(weights: list[float], count: int) -> None:
    corpora, numbers = Interleave(weights).span(0, count)
    shares = np.array(weights) / sum(weights)
    for corpus, share in enumerate(shares):
        given_so_far = np.cumsum(corpora == corpus)
        wanted = share * np.arange(1, count + 1)
        assert np.abs(given_so_far - wanted).max() <= 0.5 + share * len(weights) / 2 + 1e-6
        of_it = numbers[corpora == corpus]
        assert np.array_equal(of_it, np.arange(len(of_it)))  # none left out, none twice


@settings(deadline=None, max_examples=200)
@given(weights=WEIGHTS, start=st.integers(0, 10**9), count=st.integers(1, 50))
def test_it_can_be_entered_anywhere(weights: list[float], start: int, count: int) -> None:
    interleave = Interleave(weights)
    whole = list(zip(*interleave.span(start, start + count), strict=True))
    assert [interleave[start + i] for i in range(count)] == whole
    cut = count // 2
    parts = [*zip(*interleave.span(start, start + cut), strict=True)] if cut else []
    parts += zip(*interleave.span(start + cut, start + count), strict=True)
    assert parts == whole


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (5, 3, 1, 1), (0.9, 0.05, 0.05)])
def test_as_even_as_megatrons_own(weights: tuple[float, ...]) -> None:
    count = 2000
    shares = np.array(weights) / sum(weights)
    theirs, inside = np.zeros(count, np.int16), np.zeros(count, np.int64)
    helpers.build_blending_indices(theirs, inside, shares, len(shares), count, False)
    ours, _ = Interleave(weights).span(0, count)
    wanted = np.outer(shares, np.arange(1, count + 1))

    def worst(order: np.ndarray) -> float:
        found = np.stack([np.cumsum(order == corpus) for corpus in range(len(shares))])
        return float(np.abs(found - wanted).max())

    assert worst(ours) <= worst(theirs) + 0.5


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**31), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    epochs = Epochs(count, seed)
    assert sorted(epochs[count * epoch + i] for i in range(count)) == list(range(count))


def test_orders_differ_by_seed_and_epoch_and_can_be_entered_anywhere() -> None:
    epochs = Epochs(10, seed=3)
    found = [[epochs[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    other = [Epochs(10, seed=4)[i] for i in range(10)]
    assert len({tuple(order) for order in [*found, other]}) == 4
    assert [epochs[i] for i in range(12, 15)] == found[1][2:5]  # back again


def test_every_place_is_as_likely_for_every_sample() -> None:
    """Over 6,000 orders of five: chi-squared with 16 degrees of freedom, below its 99.9%."""
    orders, count = 6000, 5
    found = np.zeros((count, count))
    for seed in range(orders):
        epochs = Epochs(count, seed)
        for place in range(count):
            found[place, epochs[place]] += 1
    expected = orders / count
    assert ((found - expected) ** 2 / expected).sum() < 39.25


def test_neighbours_do_not_stay_together() -> None:
    count = 10_000
    order = np.array([Epochs(count, seed=1)[i] for i in range(count)])
    steps = np.diff(order)
    assert len(np.unique(steps)) > 5000
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
