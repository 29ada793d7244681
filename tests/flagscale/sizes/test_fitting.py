"""The smallest layout that has room."""

from dataclasses import replace

import pytest
from shapes import EXPERTS, STUDENT, TEACHER

from flagscale.sizes.fitting import layouts, smallest_for_weights
from flagscale.sizes.parameters import parameters


def sizes(found):
    return (
        found.tensor_model_parallel_size,
        found.pipeline_model_parallel_size,
        found.expert_model_parallel_size,
    )


@pytest.mark.parametrize(("share", "expected"), [(1.0, (1, 1, 1)), (0.55, (2, 1, 1))])
def test_the_fewest_ranks_with_room(share, expected):
    room = share * 4 * (parameters(TEACHER).total + parameters(STUDENT).total)
    assert sizes(smallest_for_weights([TEACHER, STUDENT], 4, room, 8)) == expected


def test_none_where_none_has_room():
    assert smallest_for_weights([TEACHER], 4, 1e6, 8) is None


def test_only_layouts_that_divide_the_models():
    heads = replace(
        TEACHER, num_attention_heads=3, num_query_groups=3, num_layers=2, padded_vocab_size=8193
    )
    assert [sizes(one) for one in layouts([heads], 6, 64)] == [
        (1, 1, 1),
        (1, 2, 1),  # 3 heads on 2 tensor ranks cannot be
        (3, 1, 1),
        (3, 2, 1),
    ]


def test_experts_go_to_expert_ranks():
    mixture = replace(TEACHER, architecture=EXPERTS)
    found = list(layouts([mixture], 4, 64))
    assert {one.tensor_model_parallel_size for one in found} == {1}
    assert (1, 1, 4) in [sizes(one) for one in found]
    assert (1, 2, 2) in [sizes(one) for one in found]
