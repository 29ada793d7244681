"""Cross entropy of rows of logits, its gradient written over them.

Megatron-Core's wants an autograd graph, and one [rows, vocabulary] buffer more; here value and
gradient are made in one go, in blocks of rows that stay in the cache.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of one fp32 buffer: 1 MiB, 256 MiB

_SMALLEST = torch.finfo(torch.float32).min


def cross_entropy_and_gradient(
    logits_nv: torch.Tensor,
    labels_n: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    with_gradient: bool = True,
) -> torch.Tensor:
    """`-log softmax(logits)[label]` of every row.

    Args:
        logits_nv: float32 [N, V], this rank's slice of the vocabulary; overwritten by the gradient
            of each row's loss, or by nothing of use.
        labels_n: int64 [N], of the whole vocabulary; of any other a row's loss is 0, as masked
            tokens have it.
        group: the ranks that share the vocabulary, in the order of their slices; None: no others.
        with_gradient: make the gradient.

    Returns:
        float32 [N], nats, the same on every rank of `group`.
    """
    width = logits_nv.size(1)
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    column_n = labels_n - rank * width
    mine_n = (column_n >= 0) & (column_n < width)
    column_n1 = column_n.clamp(0, width - 1).unsqueeze(1)
    # [3, N]: the largest logit, the log of the shifted sum of exponentials, the label's logit.
    figures = torch.empty(3, len(logits_nv), device=logits_nv.device)
    figures[2] = logits_nv.gather(1, column_n1).squeeze(1).masked_fill_(~mine_n, -torch.inf)
    step = max(1, _BLOCK_ELEMENTS.get(logits_nv.device.type, 2**18) // width)
    for block, logits in zip(figures.split(step, dim=1), logits_nv.split(step), strict=True):
        torch.amax(logits, 1, out=block[0])
        block[0].clamp_(min=_SMALLEST)  # a slice may hold nothing but -inf: what is no token
        logits.sub_(block[0, :, None]).exp_()
        torch.sum(logits, 1, out=block[1])
    own_largest_n = figures[0]
    figures[1].log_()
    if group is not None and ranks > 1:
        figures = _merged(figures, group)
    largest_n, log_sum_n, label_n = figures
    if with_gradient:
        scale_n = (own_largest_n - largest_n - log_sum_n).exp_()
        logits_nv.mul_(scale_n.unsqueeze(1))
        logits_nv.scatter_add_(1, column_n1, -mine_n.unsqueeze(1).to(logits_nv.dtype))
    known_n = (labels_n >= 0) & (labels_n < ranks * width)
    return (largest_n - label_n + log_sum_n).masked_fill_(~known_n, 0.0)


def _merged(figures: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Those of the whole vocabulary, from each rank's [3, N]."""
    parts = [torch.empty_like(figures) for _ in range(group.size())]
    dist.all_gather(parts, figures, group=group)
    largest, log_sums, labels = torch.stack(parts).unbind(1)
    top = largest.amax(0)
    return torch.stack([top, torch.logsumexp(log_sums + largest - top, 0), labels.amax(0)])
