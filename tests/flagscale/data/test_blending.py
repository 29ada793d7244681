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


def test_an_epoch_is_a_permutation_by_its_number() -> None:
    epochs = Epochs(10, seed=3)
    found = [[epochs[10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert found[0] == list(range(10))
    assert all(sorted(epoch) == list(range(10)) for epoch in found)
    assert found[0] != found[1] != found[2]
    assert [epochs[i] for i in range(12, 15)] == found[1][2:5]  # back again
