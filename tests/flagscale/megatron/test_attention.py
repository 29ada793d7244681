"""The core attention against plain attention in float64, packed documents, two ranks of CP."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale.megatron.attention import SDPACoreAttention

WORKER = Path(__file__).with_name("context_parallel_worker.py")
HEADS, GROUPS, CHANNELS, VALUE_CHANNELS = 4, 2, 8, 6


def make_attention(config: dict | None = None, **changes) -> SDPACoreAttention:
    values = {
        "num_layers": 1,
        "hidden_size": HEADS * CHANNELS,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
    }
    return SDPACoreAttention(
        TransformerConfig(**values | (config or {})),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        **changes,
    )


def inputs(length: int, batch: int = 2, value_channels: int = CHANNELS) -> list[torch.Tensor]:
    """Query, key, value and the output's gradient."""
    draw = torch.Generator().manual_seed(length)
    shapes = ((HEADS, CHANNELS), (GROUPS, CHANNELS), (GROUPS, value_channels))
    made = [torch.randn(length, batch, *shape, generator=draw) for shape in shapes]
    return [*made, torch.randn(length, batch, HEADS * value_channels, generator=draw)]


def reference(query, key, value, allowed) -> torch.Tensor:
    """Softmax attention in float64, written out."""
    query, key, value = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(CHANNELS)
    scores = scores.masked_fill(~allowed, -math.inf)
    context = (scores.softmax(dim=-1) @ value).permute(2, 0, 1, 3)
    return context.reshape(*context.shape[:2], -1)


def with_gradients(function, tensors, gradient) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = function(*leaves)
    output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("value_channels", [CHANNELS, VALUE_CHANNELS])
def test_causal_attention_and_its_gradients(value_channels):
    *tensors, gradient = inputs(12, value_channels=value_channels)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    attention = make_attention()
    found = with_gradients(lambda *x: attention(*x, None), tensors, gradient)
    masked = with_gradients(lambda *x: attention(*x, ~causal[None, None]), tensors, gradient)
    expected = with_gradients(
        lambda *x: reference(*x, causal), [x.double() for x in tensors], gradient.double()
    )
    for ours, with_mask, theirs in zip(found, masked, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-6)
        torch.testing.assert_close(with_mask.double(), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 2, 11])
def test_queries_behind_a_cache_are_the_last_positions(queries):
    query, key, value, _ = inputs(12)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    # Megatron-Core says that one query behind a cache needs no mask.
    found = make_attention()(query[-queries:], key, value, None, AttnMaskType.no_mask)
    expected = reference(query, key, value, causal)[-queries:]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_more_queries_than_keys_are_refused():
    query, key, value, _ = inputs(12)
    with pytest.raises(ValueError, match="12 queries with 11 keys"):
        make_attention()(query, key[1:], value[1:], None)


def packed_params(lengths: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    padded_borders = None if padded is None else torch.tensor([0, *padded]).cumsum(0).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        cu_seqlens_q_padded=padded_borders,
        cu_seqlens_kv_padded=padded_borders,
    )


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_packed_documents_do_not_see_one_another(lengths):
    total = sum(lengths)
    *tensors, gradient = (x.squeeze(1) for x in inputs(total, batch=1))
    attention = make_attention()
    packed = packed_params(lengths)
    found = with_gradients(
        lambda *x: attention(*x, None, packed_seq_params=packed), tensors, gradient
    )
    documents = [n for n in lengths if n]
    expected = [
        with_gradients(
            lambda *x: reference(*x, torch.ones(len(x[0]), len(x[0]), dtype=torch.bool).tril()),
            [x.unsqueeze(1).double() for x in document],
            own_gradient.unsqueeze(1).double(),
        )
        for *document, own_gradient in zip(
            *(x.split(documents) for x in (*tensors, gradient)), strict=True
        )
    ]
    assert found[0].shape == (total, HEADS * CHANNELS)
    for ours, *theirs in zip(found, *expected, strict=True):
        torch.testing.assert_close(ours.double(), torch.cat(theirs).squeeze(1), rtol=0, atol=2e-6)


def test_padding_behind_documents_changes_none_of_them():
    *tensors, _ = (x.squeeze(1) for x in inputs(10, batch=1))
    attention = make_attention()
    padded = attention(*tensors, None, packed_seq_params=packed_params([3, 4], padded=[4, 6]))
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    documents = [x[kept] for x in tensors]
    expected = attention(*documents, None, packed_seq_params=packed_params([3, 4]))
    torch.testing.assert_close(padded[kept], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (packed_params([3, 4]), r"cu_seqlens_q=\[0, 3, 7\]: must rise from 0 to 8 tokens"),
        (packed_params([9, -1]), r"cu_seqlens_q=\[0, 9, 8\]: must rise"),
        (PackedSeqParams(qkv_format="sbhd"), "qkv_format='sbhd'.*must be 'thd'"),
        (
            PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=torch.tensor([0, 8]),
                cu_seqlens_kv=torch.tensor([0, 4, 8]),
            ),
            r"cu_seqlens_kv=\[0, 4, 8\]: must be cu_seqlens_q=\[0, 8\]",
        ),
    ],
)
def test_wrong_borders_are_refused(packed, message):
    *tensors, _ = (x.squeeze(1) for x in inputs(8, batch=1))
    with pytest.raises(ValueError, match=message):
        make_attention()(*tensors, None, packed_seq_params=packed)


def test_a_packed_batch_of_two_is_refused():
    *tensors, _ = inputs(8)
    with pytest.raises(ValueError, match="micro_batch_size=1"):
        make_attention()(*tensors, None, packed_seq_params=packed_params([3, 5]))


def test_what_is_not_honoured_is_refused():
    *tensors, _ = inputs(4)
    with pytest.raises(ValueError, match="attention_bias"):
        make_attention()(*tensors, None, attention_bias=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="attention_mask with packed_seq_params"):
        make_attention()(
            *tensors, torch.zeros(1, 1, 4, 4).bool(), packed_seq_params=packed_params([4])
        )
    with pytest.raises(ValueError, match=r"context_parallel_size=2: pg_collection\.cp"):
        make_attention({"context_parallel_size": 2})
    with pytest.raises(ValueError, match="must be causal"):
        SDPACoreAttention(make_attention().config, 1, AttnMaskType.padding, "self")


def halves(x: torch.Tensor, rank: int, size: int, dim: int = 0) -> torch.Tensor:
    chunks = x.chunk(2 * size, dim=dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=dim)


def document_mask(length: int, border: int) -> torch.Tensor:
    """[1, 1, s, s], True where forbidden: two documents."""
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[border:, :border] = False
    return ~allowed[None, None]


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_compute_what_one_does(torchrun, tmp_path, size):
    torchrun(size, WORKER, tmp_path)
    *tensors, gradient = inputs(24, value_channels=VALUE_CHANNELS)
    alone = make_attention()
    for name, mask in (("causal", None), ("masked", document_mask(24, 10))):
        expected = with_gradients(lambda *x, m=mask: alone(*x, m), tensors, gradient)
        for rank in range(size):
            found = torch.load(tmp_path / f"{rank}.pt")[name]
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, halves(theirs, rank, size), rtol=0, atol=1e-6)
