import numpy as np
import pytest
import torch

from flagscale.errors import UserError
from flagscale.teacher_outputs import Hidden, OutputsFacts, SparseTargets, codec_of
from flagscale.teacher_outputs.bits import pack, packed_bytes, unpack, width_of
from tests.flagscale.teacher_outputs.outputs import CODECS, S, V, answers, encoded, facts


def decoded(of: OutputsFacts, samples: list[int]) -> SparseTargets:
    found = codec_of(of).decode(encoded(of, "train", samples))
    assert isinstance(found, SparseTargets)
    return found


def log_p(of: OutputsFacts, samples: list[int]) -> torch.Tensor:
    """float64 [b, s, V], the true one."""
    logits_bsv = torch.stack([answers(of, sample) for sample in samples]).double()
    return (logits_bsv / of.codec["temperature"]).log_softmax(-1)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_hidden_states_are_kept_to_the_bit(codec: str) -> None:
    of = facts(codec)
    found = codec_of(of).decode(encoded(of, "train", [3, 1]))
    assert isinstance(found, Hidden)
    kept = torch.stack([answers(of, 3), answers(of, 1)])
    assert torch.equal(found.hidden_bsh, kept if codec == "fp32" else kept.bfloat16())


@pytest.mark.parametrize(("vocab_size", "top_k"), [(V, 16), (V, V), (40, 64), (2**17 + 9, 8)])
def test_top_k_keeps_the_likeliest_tokens_and_the_mass_of_the_rest(
    vocab_size: int, top_k: int
) -> None:
    of = facts(CODECS["topk"] | {"top_k": top_k}, vocab_size=vocab_size)
    found, true = decoded(of, [3, 1]), log_p(of, [3, 1])
    likeliest = true.topk(min(top_k, vocab_size))
    assert torch.equal(found.tokens_bsk, likeliest.indices)
    # float16 of a log probability: 11 bits, of numbers up to 16.
    torch.testing.assert_close(found.shares_bsk.double(), likeliest.values.exp(), rtol=8e-3, atol=0)
    tail = 1 - likeliest.values.exp().sum(-1)
    assert found.tail_bs is not None
    torch.testing.assert_close(found.tail_bs.double(), tail, rtol=0, atol=3e-7)
    torch.testing.assert_close(found.shares_bsk.sum(-1) + found.tail_bs, torch.ones(2, S))
    entropy = -(true.exp() * true).sum(-1)
    torch.testing.assert_close(found.entropy_bs.double(), entropy, rtol=1e-6, atol=0)


def test_among_equally_likely_tokens_the_first_ones_are_kept() -> None:
    of = facts("topk")
    logits = torch.zeros(1, S, V)
    logits[..., 200:] = -0.0  # which is no less than 0
    logits[..., 250] = 1
    found = codec_of(of).decode(codec_of(of).encode(logits, "train", [0]))
    assert isinstance(found, SparseTargets)
    assert found.tokens_bsk[0, 0].tolist() == [250, *range(15)]


def test_ties_over_the_whole_vocabulary_fall_to_the_first_tokens() -> None:
    """Of a vocabulary of far more blocks than are looked into, with few different logits."""
    of = facts(CODECS["topk"] | {"temperature": 1.0}, vocab_size=5000)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 9, (1, S, 5000), generator=generator).float()
    found = codec_of(of).decode(codec_of(of).encode(logits, "train", [0]))
    assert isinstance(found, SparseTargets)
    in_order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert found.tokens_bsk.equal(in_order[..., :16])


def test_padding_of_the_vocabulary_is_never_kept() -> None:
    logits = torch.zeros(1, S, V + 84)
    logits[..., V:] = 9.0
    for codec in ("topk", "sampled"):
        of = facts(codec)
        (padded,) = codec_of(of).encode(logits, "train", [0])
        assert [padded] == codec_of(of).encode(logits[..., :V], "train", [0])


def test_shares_are_of_draws_and_come_with_the_whole_entropy() -> None:
    of = facts("sampled")
    found, true = decoded(of, [3, 1]), log_p(of, [3, 1])
    draws = found.shares_bsk * 12
    torch.testing.assert_close(draws, draws.round())
    assert draws.sum(-1).tolist() == [[12.0] * S] * 2
    assert found.tail_bs is None
    for tokens, shares in zip(found.tokens_bsk.view(-1, 12), draws.view(-1, 12), strict=False):
        there = tokens[shares > 0].tolist()
        assert len(set(there)) == len(there)
        assert tokens[shares == 0].sum() == 0
    entropy = -(true.exp() * true).sum(-1)
    torch.testing.assert_close(found.entropy_bs.double(), entropy, rtol=1e-6, atol=0)


def test_draws_follow_from_seed_split_and_sample() -> None:
    of = facts("sampled")
    codec, logits = codec_of(of), answers(of, 0)[None]
    other_seed = codec_of(facts(CODECS["sampled"] | {"seed": 4}))
    records = [
        codec.encode(logits, "train", [0])[0],
        codec.encode(logits, "train", [1])[0],
        codec.encode(logits, "validation", [0])[0],
        other_seed.encode(logits, "train", [0])[0],
    ]
    assert len(set(records)) == 4
    in_a_batch = codec.encode(logits.expand(2, -1, -1), "train", [1, 0])
    assert in_a_batch == [records[1], records[0]]


@pytest.mark.parametrize("vocab_size", [50, 300, 2**16 + 77, 2**17 + 200])
def test_the_mean_over_draws_is_the_true_loss_and_gradient(vocab_size: int) -> None:
    """To 3 standard errors, for a student that is not the teacher."""
    redraws, draws = 300, 12
    of = facts("sampled", vocab_size=vocab_size)
    logits = 4 * torch.randn(1, S, vocab_size, generator=torch.Generator().manual_seed(1))
    codec = codec_of(of)
    found = codec.decode([codec.encode(logits, "train", [n])[0] for n in range(redraws)])
    assert isinstance(found, SparseTargets)
    log_p_sv = (logits[0].double() / 2).log_softmax(-1)
    log_q_sv = (logits[0].double().roll(1, -1) / 4 + logits[0].double() / 3).log_softmax(-1)

    log_q_bsk = log_q_sv[torch.arange(S)[None, :, None], found.tokens_bsk]
    loss_bs = -(found.shares_bsk * log_q_bsk).sum(-1) - found.entropy_bs
    true_s = (log_p_sv.exp() * (log_p_sv - log_q_sv)).sum(-1)
    error_s = loss_bs.std(0) / redraws**0.5
    assert ((loss_bs.mean(0) - true_s).abs() < 3 * error_s).all()

    # The gradient is q - shares: chi-squared of the mean shares, tokens rarely drawn as one.
    p_sv = log_p_sv.exp()
    mean_sv = torch.zeros_like(p_sv)
    for s in range(S):
        mean_sv[s].index_put_(
            (found.tokens_bsk[:, s].flatten(),),
            found.shares_bsk[:, s].double().flatten() / redraws,
            accumulate=True,
        )
    often_sv = p_sv * redraws * draws > 5
    rest = torch.stack([(x * ~often_sv).sum(-1) for x in (mean_sv, p_sv)])
    squares = (mean_sv - p_sv).square() / p_sv * often_sv
    of_rest = ((rest[0] - rest[1]).square() / rest[1]).nan_to_num()
    chi = (squares.sum() + of_rest.sum()) * redraws * draws
    degrees = float(often_sv.sum() + (rest[1] > 0).sum() - S)
    assert abs(float(chi) - degrees) < 3 * (2 * degrees) ** 0.5
    assert found.tokens_bsk.max() < vocab_size
    assert vocab_size < 2**16 or found.tokens_bsk.max() > 2**16


def test_a_distribution_of_one_token_is_drawn_as_it_is() -> None:
    of = facts("sampled")
    logits = torch.full((1, S, V), -torch.inf)
    logits[..., 131] = 5
    found = codec_of(of).decode(codec_of(of).encode(logits, "train", [0]))
    assert isinstance(found, SparseTargets)
    assert found.tokens_bsk.tolist() == [[[131]] * S]
    assert found.entropy_bs.abs().max() < 1e-12


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(codec: str, what: float) -> None:
    of = facts(codec)
    wrong = answers(of, 0)[None].clone()
    wrong[0, 2, 4] = what
    with pytest.raises(UserError, match="not finite"):
        codec_of(of).encode(wrong, "train", [0])


@pytest.mark.parametrize("codec", CODECS)
def test_another_shape_is_refused(codec: str) -> None:
    of = facts(codec)
    with pytest.raises(ValueError, match=r"\(1, 4, \d+\)"):
        codec_of(of).encode(answers(of, 0)[None, :4], "train", [0])
    with pytest.raises(ValueError, match="bytes"):
        codec_of(of).decode([encoded(of, "train", [0])[0][:-1]])


@pytest.mark.parametrize(
    "codec", [{"name": "none"}, {"name": "topk"}, CODECS["fp32"] | {"dtype": "fp8"}]
)
def test_a_codec_that_is_not_known_is_refused(codec: dict) -> None:
    with pytest.raises(UserError, match="this program knows hidden, sampled, topk"):
        codec_of(facts(codec))


@pytest.mark.parametrize("codec", CODECS)
def test_the_options_make_the_same_codec(codec: str) -> None:
    assert codec_of(facts(codec)).options == CODECS[codec]


@pytest.mark.parametrize("width", [0, 1, 6, 8, 13, 16, 17, 18, 31])
def test_integers_take_as_many_bits_as_they_need(width: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**width, 77)
    content = pack(values, width)
    assert len(content) == packed_bytes(77, width) < 77 * width / 8 + 1
    assert unpack(content, 77, width).tolist() == values.tolist()
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.array([2**width]), width)


def test_the_width_is_that_of_the_largest() -> None:
    assert [width_of(n) for n in (1, 2, 3, 256, 257, 2**17)] == [0, 1, 2, 8, 9, 17]
