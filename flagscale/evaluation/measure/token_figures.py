"""The figures of single tokens, from logits over a vocabulary that ranks may share.

With logits shifted by their maximum, KL = sum(p_t * (z_t - z_s)) - lse_t + lse_s. Only the
elementwise work is in float32: the sums and their logarithms are in float64, because rounded
logsumexps would drown a small KL. Relative error: 1e-9 at a KL of 3, 1e-5 at 3e-6.

Where tensor-parallel ranks hold slices of the vocabulary, each sums up its own, shifted by its own
maximum. Ten numbers a token are exchanged and put together in float64.
"""

from __future__ import annotations

import torch

# Vocabulary-sized buffers stay in a core's cache on a CPU; a GPU wants large launches.
_CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}
BLOCK = 64  # logits


def token_figures(
    teacher_nv: torch.Tensor,
    student_nv: torch.Tensor,
    labels_n: torch.Tensor,
    first_token: int = 0,
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """`FIGURES` of n tokens, float64 [2, 4, n], in nats and ones: the teacher's, the student's.

    The teacher's are those of a student that is its teacher: no divergence, full agreement.

    Args:
        teacher_nv: logits of this rank's slice of the vocabulary, any float dtype.
        student_nv: the same.
        labels_n: tokens that come, int64.
        first_token: of the slice.
        group: the ranks that share the vocabulary, all of which call this; None: it is whole.
    """
    sums_10n = slice_sums(teacher_nv, student_nv, labels_n, first_token)
    return merge(gathered(sums_10n, group), labels_n)


def gathered(slice_xn: torch.Tensor, group: torch.distributed.ProcessGroup | None) -> torch.Tensor:
    """What all slices of the vocabulary say, [slices, ...], in order; all ranks call it."""
    if group is None or group.size() == 1:
        return slice_xn.unsqueeze(0)
    parts = [torch.empty_like(slice_xn) for _ in range(group.size())]
    torch.distributed.all_gather(parts, slice_xn, group=group)
    return torch.stack(parts)


def chunk_rows(logits_nv: torch.Tensor, *, closely: bool = False) -> int:
    """How many tokens are worked on at a time; half as many where twice the buffers are needed."""
    elements = _CHUNK_ELEMENTS[logits_nv.device.type] // (2 if closely else 1)
    return max(1, elements // logits_nv.shape[-1])


def slice_sums(
    teacher_nv: torch.Tensor,
    student_nv: torch.Tensor,
    labels_n: torch.Tensor,
    first_token: int,
    *,
    closely: bool = False,
) -> torch.Tensor:
    """What a slice of the vocabulary says of n tokens, float64 [10, n], for `merge`.

    Of the teacher and of the student the largest logit, its token, and the mass, that is the sum of
    exp(z); then sum(exp(z_t) * (z_t - z_s)); and whether the label is in the slice, with the
    teacher's and the student's z of it. z are logits less the slice's largest. `closely` adds two
    rows: sum(exp(z_s) * (z_t - z_s)) and sum(exp(z_t) * z_t).
    """
    rows = chunk_rows(teacher_nv, closely=closely)
    chunks = (x.split(rows) for x in (teacher_nv, student_nv, labels_n - first_token))
    sums_xn = torch.cat(
        [_slice_sums(*chunk, closely=closely) for chunk in zip(*chunks, strict=True)], dim=1
    )
    sums_xn[[1, 4]] += first_token
    return sums_xn


def merge(sums_s10n: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
    """`token_figures` from the `slice_sums` of all s slices, in order."""
    top_t, token_t, mass_t, top_s, token_s, mass_s, products, is_here, label_t, label_s = (
        sums_s10n.unbind(1)[:10]
    )
    # The slices' z become those of the whole vocabulary.
    lower_t, lower_s = top_t - top_t.amax(0), top_s - top_s.amax(0)
    mass_t, mass_s = mass_t * lower_t.exp(), mass_s * lower_s.exp()
    products = products * lower_t.exp() + mass_t * (lower_t - lower_s)
    log_mass_t, log_mass_s = mass_t.sum(0).log(), mass_s.sum(0).log()
    guess_t, guess_s = (
        token.gather(0, top.argmax(0, keepdim=True)).squeeze(0)
        for token, top in ((token_t, top_t), (token_s, top_s))
    )
    teacher = (
        log_mass_t - (is_here * (label_t + lower_t)).sum(0),
        torch.zeros_like(log_mass_t),
        torch.ones_like(log_mass_t),
        guess_t == labels_n,
    )
    student = (
        log_mass_s - (is_here * (label_s + lower_s)).sum(0),
        products.sum(0) / mass_t.sum(0) - log_mass_t + log_mass_s,
        guess_t == guess_s,
        guess_s == labels_n,
    )
    return torch.stack([torch.stack([x.double() for x in model]) for model in (teacher, student)])


def _slice_sums(
    teacher_rv: torch.Tensor, student_rv: torch.Tensor, labels_r: torch.Tensor, *, closely: bool
) -> torch.Tensor:
    """`slice_sums` of a chunk; labels count from the slice's first token."""
    teacher_rv, student_rv = teacher_rv.float(), student_rv.float()
    top_t, token_t = largest(teacher_rv)
    top_s, token_s = largest(student_rv)
    z_t, z_s = teacher_rv - top_t, student_rv - top_s
    is_here_r = (labels_r >= 0) & (labels_r < z_s.size(-1))
    label_t, label_s = (z.gather(-1, labels_r.where(is_here_r, 0)[:, None]) for z in (z_t, z_s))
    difference_rv = z_t - z_s
    p_t = z_t.exp() if closely else z_t.exp_()
    p_s = z_s.exp_()
    masses = _sum(p_t), _sum(p_s)
    more = (_sum(p_s.mul_(difference_rv)), _sum(z_t.mul_(p_t))) if closely else ()
    products = _sum(p_t.mul_(difference_rv))
    sums = (top_t, token_t, masses[0], top_s, token_s, masses[1], products)
    sums = (*sums, is_here_r, label_t, label_s, *more)
    return torch.stack([x.reshape(-1).double() for x in sums])


def _sum(values_rv: torch.Tensor) -> torch.Tensor:
    return values_rv.sum(dim=-1, dtype=torch.float64)


def largest(logits_rv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit [r, 1] and its token, of equal ones the first.

    As `max(dim=-1)`, which on a CPU takes 5 times as long as a maximum that does not say where it
    is: so blocks are searched first, and then one of them.
    """
    if logits_rv.is_cuda or logits_rv.size(-1) % BLOCK:
        return logits_rv.max(dim=-1, keepdim=True)
    blocks_rbe = logits_rv.unflatten(-1, (-1, BLOCK))
    top_r1, block_r1 = blocks_rbe.amax(dim=-1).max(dim=-1, keepdim=True)
    rows = torch.arange(len(logits_rv), device=logits_rv.device)
    token_r = blocks_rbe[rows, block_r1.squeeze(1)].argmax(dim=-1)
    return top_r1, block_r1 * BLOCK + token_r[:, None]
