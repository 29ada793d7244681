import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data.borders import pieces, starts_after


@settings(max_examples=200)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda b: st.integers(1, 12).flatmap(
            lambda s: st.lists(
                st.lists(st.integers(0, 2), min_size=s, max_size=s), min_size=b, max_size=b
            )
        )
    )
)
def test_pieces_of_text(rows: list[list[int]]) -> None:
    """Against a walk over the tokens, one by one."""
    tokens = np.array(rows)
    batch_size, seq_length = tokens.shape
    found = pieces([starts_after(row, 0) for row in tokens], seq_length)
    borders, positions = [], []
    for number, row in enumerate(rows):
        position = 0
        for place in range(len(row)):
            if place == 0 or row[place - 1] == 0:
                position = 0
                borders.append(number * seq_length + place)
            positions.append(position)
            position += 1
    borders.append(batch_size * seq_length)
    assert found.cu_seqlens.dtype == np.int32
    assert found.cu_seqlens.tolist() == borders
    assert found.position_ids.flatten().tolist() == positions
    assert found.max_seqlen == max(positions) + 1
