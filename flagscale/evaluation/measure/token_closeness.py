"""A closer look at single tokens than `token_figures` takes: what a report is made of.

The divergences that tell how a student errs (Gu et al., 2024, MiniLLM): forward KL grows where it
misses what the teacher holds likely, reverse KL where it holds likely what the teacher does not,
and Jensen-Shannon is symmetric and at most log 2. Beside them, how sure both are.

With d the difference of both log-probabilities and m the mean of the probabilities,
JS = sum(m * h(d)), h(d) = log 2 - H(sigmoid(d)): not negative term by term, and written with expm1
and log1p so that a small one keeps its digits.
"""

from __future__ import annotations

import torch

from flagscale.evaluation.measure.token_figures import (
    BLOCK,
    chunk_rows,
    gathered,
    merge,
    slice_sums,
)

TOP = 5  # tokens, of the top-5 agreement
DETAILS = ("teacher_entropy", "teacher_confidence", "confidence", "teacher_guess", "guess")


def token_closeness(
    teacher_nv: torch.Tensor,
    student_nv: torch.Tensor,
    labels_n: torch.Tensor,
    first_token: int = 0,
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Everything that a report says of n tokens; arguments as of `token_figures`.

    Returns:
        float64 [2 * 7 + 5, n]: `fidelity.ALL_FIGURES`, in nats and ones, the teacher's and then the
        student's, where the teacher's are those of a student that is its teacher; and `DETAILS`,
        the entropy of the teacher's distribution in nats, the largest probability that teacher and
        student give, and the token that each gives it to.
    """
    mine = slice_sums(teacher_nv, student_nv, labels_n, first_token, closely=True)
    sums_s12n = gathered(mine, group)
    figures_m4n = merge(sums_s12n, labels_n)
    top_t, token_t, mass_t, top_s, token_s, mass_s = sums_s12n.unbind(1)[:6]
    log_z_t, log_z_s = _log_partition(top_t, mass_t), _log_partition(top_s, mass_s)
    reverse_n, entropy_n = _reverse_and_entropy(sums_s12n, log_z_t, log_z_s)
    js_n = gathered(_js(teacher_nv, student_nv, log_z_t, log_z_s), group).sum(0)
    overlap_n = _overlap(teacher_nv, student_nv, first_token, group)
    same_n = torch.ones_like(js_n)
    more_m3n = torch.stack(
        [
            torch.stack([torch.zeros_like(js_n), torch.zeros_like(js_n), same_n]),
            torch.stack([reverse_n, js_n, overlap_n]),
        ]
    )
    guess_t, guess_s = (
        token.gather(0, top.argmax(0, keepdim=True)).squeeze(0)
        for token, top in ((token_t, top_t), (token_s, top_s))
    )
    confidence_t, confidence_s = (
        (top.amax(0) - log_z).exp() for top, log_z in ((top_t, log_z_t), (top_s, log_z_s))
    )
    details = (entropy_n, confidence_t, confidence_s, guess_t, guess_s)
    figures_m7n = torch.cat([figures_m4n, more_m3n], dim=1)
    return torch.cat([figures_m7n.flatten(0, 1), torch.stack(details)])


def _log_partition(top_sn: torch.Tensor, mass_sn: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))) over all slices, float64 [n]."""
    return torch.logsumexp(top_sn + mass_sn.log(), dim=0)


def _reverse_and_entropy(
    sums_s12n: torch.Tensor, log_z_t: torch.Tensor, log_z_s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse KL and the teacher's entropy [n], from the `slice_sums` of all slices."""
    top_t, top_s = sums_s12n[:, 0], sums_s12n[:, 3]
    mass_t, mass_s = sums_s12n[:, 2], sums_s12n[:, 5]
    products, z_sums = sums_s12n[:, 10], sums_s12n[:, 11]
    # Of the whole vocabulary, each slice has these shares of the two distributions.
    share_t = (top_t + mass_t.log() - log_z_t).exp()
    share_s = (top_s + mass_s.log() - log_z_s).exp()
    # A slice's mean log-probabilities and their difference, under its own share.
    difference = products / mass_s + (top_t - log_z_t) - (top_s - log_z_s)
    log_p = z_sums / mass_t + top_t - log_z_t
    return -(share_s * difference).sum(0), -(share_t * log_p).sum(0)


def _js(
    teacher_nv: torch.Tensor, student_nv: torch.Tensor, log_z_t: torch.Tensor, log_z_s: torch.Tensor
) -> torch.Tensor:
    """This slice's share of the Jensen-Shannon divergence, float64 [n]."""
    rows = chunk_rows(teacher_nv, closely=True)
    chunks = (x.split(rows) for x in (teacher_nv, student_nv, log_z_t, log_z_s))
    return torch.cat([_chunk_js(*chunk) for chunk in zip(*chunks, strict=True)])


def _chunk_js(
    teacher_rv: torch.Tensor, student_rv: torch.Tensor, log_z_t: torch.Tensor, log_z_s: torch.Tensor
) -> torch.Tensor:
    """2 m h(d) = p_max ((1 + e) (log 2 - log(1 + e)) - |d| e), e = exp(-|d|), p_max the larger."""
    d = teacher_rv.float() - student_rv.float()
    d -= (log_z_t - log_z_s).float()[:, None]
    p_max = teacher_rv.float() - log_z_t.float()[:, None]
    p_max.sub_(d.clamp(max=0)).exp_()
    d.abs_()
    less = d.neg().expm1_()  # e - 1
    half = (less * 0.5).log1p_()  # log((1 + e) / 2)
    d += half
    # (1 + e) half + |d| e = 2 half + |d| + (e - 1) (half + |d|)
    less.mul_(d).add_(d).add_(half)
    return p_max.mul_(less).sum(dim=-1, dtype=torch.float64) / -2


def _overlap(
    teacher_nv: torch.Tensor,
    student_nv: torch.Tensor,
    first_token: int,
    group: torch.distributed.ProcessGroup | None,
) -> torch.Tensor:
    """Share of the teacher's `TOP` most probable tokens that are the student's too, [n]."""
    tokens_t, tokens_s = (_top_tokens(x, first_token, group) for x in (teacher_nv, student_nv))
    shared_nk = (tokens_t[:, :, None] == tokens_s[:, None, :]).any(dim=-1)
    return shared_nk.double().mean(dim=-1)


def _top_tokens(
    logits_nv: torch.Tensor, first_token: int, group: torch.distributed.ProcessGroup | None
) -> torch.Tensor:
    """int64 [n, TOP], of the whole vocabulary, in no order."""
    found = [_top(chunk) for chunk in logits_nv.split(chunk_rows(logits_nv))]
    values, tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
    whole = gathered(torch.stack([values.double(), (tokens + first_token).double()]), group)
    values_nk, tokens_nk = (part.transpose(0, 1).flatten(1) for part in whole.unbind(1))
    kept = values_nk.topk(min(TOP, values_nk.size(1))).indices
    return tokens_nk.gather(1, kept).long()


def _top(logits_rv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `TOP` largest logits and where they are; they lie in the `TOP` blocks of largest tops."""
    vocabulary = logits_rv.size(-1)
    if logits_rv.is_cuda or vocabulary % BLOCK or vocabulary <= TOP * BLOCK:
        top = logits_rv.topk(min(TOP, vocabulary))
        return top.values, top.indices
    blocks_rbe = logits_rv.unflatten(-1, (-1, BLOCK))
    chosen_rk = blocks_rbe.amax(dim=-1).topk(TOP).indices
    within = chosen_rk[:, :, None].expand(-1, -1, BLOCK)
    top = blocks_rbe.gather(1, within).flatten(1).topk(TOP)
    return top.values, chosen_rk.gather(1, top.indices // BLOCK) * BLOCK + top.indices % BLOCK
