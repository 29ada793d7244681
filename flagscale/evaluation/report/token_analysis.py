"""Looks where in the text a student disagrees with its teacher.

By position, by the teacher's entropy, by how often a token stands in the training split; how well
the probabilities are calibrated; and the places where teacher and student differ most. All of it
comes from one table with a row for each predicted token. Without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from flagscale.evaluation import bootstrap
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE
from flagscale.evaluation.report.token_findings import (
    CALIBRATION_BINS,
    Calibration,
    Slice,
    TokenFindings,
    TokenTable,
    WorstDocument,
    WorstToken,
)

_MOST_TOKENS = 12  # of the worst; no two of one document stand close together
_MOST_DOCUMENTS = 5
_CONTEXT = 48  # tokens that are shown before one, and of a document
_SLICE_SAMPLES = 1000  # resamples: error bars of a picture need no more
_APART = 16  # tokens between two of the worst
_ENTROPIES = (0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0)  # nats
_COUNTS = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Draws:
    """How intervals are drawn: as those of `metrics.json`."""

    documents: int
    samples: int
    confidence: float
    seed: int


def find(
    table: TokenTable,
    draws: Draws,
    trained_v: np.ndarray,
    documents: Sequence[np.ndarray],
    decode: Callable[[Sequence[int]], str],
) -> TokenFindings:
    """Look at the tokens of an evaluation.

    Args:
        table: of them.
        draws: of the intervals.
        trained_v: how often each token stands in the training split [vocabulary].
        documents: token ids of each, as they were measured.
        decode: ids to text.
    """
    longest = int(table.position_n.max(initial=1))
    positions = [1, *(2**power for power in range(1, longest.bit_length()))]
    count_n = trained_v[table.label_n]
    slices = {
        "position": _slices(table, table.position_n, positions, draws),
        "teacher entropy": _slices(table, table.teacher_entropy_n, (0.0, *_ENTROPIES), draws),
        "token frequency": _slices(table, count_n, _COUNTS, draws),
    }
    models = {TEACHER: (table.teacher_confidence_n, table.teacher_guess_n)}
    models |= {name: (table.confidence_n[name], table.guess_n[name]) for name in table.kl_n}
    return TokenFindings(
        slices={name: found for name, found in slices.items() if len(found) > 1},
        calibration={
            name: calibration(confidence_n, guess_n == table.label_n, table.document_n, draws)
            for name, (confidence_n, guess_n) in models.items()
        },
        worst_tokens=tuple(_worst_tokens(table, documents, decode)),
        worst_documents=tuple(_worst_documents(table, documents, decode)),
    )


def calibration(
    confidence_n: np.ndarray, is_right_n: np.ndarray, document_n: np.ndarray, draws: Draws
) -> Calibration:
    """Compare how sure a model is with how often it is right.

    Args:
        confidence_n: the largest probability at each token.
        is_right_n: whether its token is the text's.
        document_n: of each token.
        draws: of the interval.
    """
    # The bins are (0, 0.1], (0.1, 0.2], ...; a probability of 1 is in the last.
    bin_n = np.clip(np.ceil(confidence_n * CALIBRATION_BINS).astype(int) - 1, 0, None)
    bin_n = np.minimum(bin_n, CALIBRATION_BINS - 1)
    tokens, sure, right = (
        np.bincount(bin_n, weights, CALIBRATION_BINS)
        for weights in (None, confidence_n, is_right_n.astype(float))
    )
    over_d = np.bincount(document_n, confidence_n - is_right_n, draws.documents)
    tokens_d = np.bincount(document_n, minlength=draws.documents)
    over = bootstrap.ratios({"over": over_d}, tokens_d, draws.samples, draws.seed)["over"]
    filled = np.maximum(tokens, 1)
    return Calibration(
        tokens=tuple(int(n) for n in tokens),
        confidence=tuple((sure / filled).tolist()),
        accuracy=tuple((right / filled).tolist()),
        ece=float(np.abs(sure - right).sum() / max(len(bin_n), 1)),
        overconfidence=asdict(over.interval(draws.confidence)),
    )


def _slices(
    table: TokenTable, value_n: np.ndarray, edges: Sequence[float], draws: Draws
) -> tuple[Slice, ...]:
    """The KL of the tokens between two edges, each with an interval; empty ones are left out."""
    place_n = np.searchsorted(np.asarray(edges), value_n, side="right") - 1
    found: list[Slice] = []
    for place in range(len(edges)):
        here_n = place_n == place
        if not here_n.any():
            continue
        kl = _means(table, here_n, draws)
        after = edges[place + 1] if place + 1 < len(edges) else None
        found.append(Slice(_label(edges[place], after), int(here_n.sum()), kl))
    return tuple(found)


def _means(
    table: TokenTable, here_n: np.ndarray, draws: Draws
) -> dict[str, dict[str, float | None]]:
    """The KL of some tokens; without an interval where they are all of one document."""
    # Documents without such tokens say nothing about them, and are not drawn.
    _, document_n = np.unique(table.document_n[here_n], return_inverse=True)
    tokens_d = np.bincount(document_n)
    sums = {name: np.bincount(document_n, kl_n[here_n]) for name, kl_n in table.kl_n.items()}
    if len(tokens_d) == 1:
        means = {name: float(sums_d[0] / tokens_d[0]) for name, sums_d in sums.items()}
        return {name: {"value": mean, "low": None, "high": None} for name, mean in means.items()}
    samples = min(draws.samples, _SLICE_SAMPLES)
    ratios = bootstrap.ratios(sums, tokens_d, samples, draws.seed)
    return {name: asdict(one.interval(draws.confidence)) for name, one in ratios.items()}


def _label(low: float, after: float | None) -> str:
    if after is None:
        return f"{_short(low)} and more"
    if isinstance(low, int):
        last = int(after) - 1
        return _short(low) if last == low else f"{_short(low)} to {_short(last)}"
    return f"{_short(low)} to {_short(after)}"


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _worst_tokens(
    table: TokenTable, documents: Sequence[np.ndarray], decode: Callable[[Sequence[int]], str]
) -> list[WorstToken]:
    kl_n = table.kl_n[AFTER]
    first_d = np.searchsorted(table.document_n, np.arange(len(documents)))
    taken: list[tuple[int, int]] = []
    found: list[WorstToken] = []
    for row in np.argsort(-kl_n, kind="stable"):
        if len(found) == _MOST_TOKENS:
            break
        document = int(table.document_n[row])
        place = int(row - first_d[document]) + 1  # a document's first token is not predicted
        if any(d == document and abs(p - place) < _APART for d, p in taken):
            continue
        taken.append((document, place))
        ids = documents[document]
        found.append(
            WorstToken(
                document=document + 1,
                position=place,
                before=decode(ids[max(0, place - _CONTEXT) : place].tolist()),
                token=decode([int(ids[place])]),
                teacher=(
                    decode([int(table.teacher_guess_n[row])]),
                    float(table.teacher_confidence_n[row]),
                ),
                student=(
                    decode([int(table.guess_n[AFTER][row])]),
                    float(table.confidence_n[AFTER][row]),
                ),
                kl=float(kl_n[row]),
            )
        )
    return found


def _worst_documents(
    table: TokenTable, documents: Sequence[np.ndarray], decode: Callable[[Sequence[int]], str]
) -> list[WorstDocument]:
    tokens_d = np.bincount(table.document_n, minlength=len(documents))
    means = {
        name: np.bincount(table.document_n, kl_n, len(documents)) / np.maximum(tokens_d, 1)
        for name, kl_n in table.kl_n.items()
    }
    order = np.argsort(-means[AFTER], kind="stable")[:_MOST_DOCUMENTS]
    return [
        WorstDocument(
            document=int(d) + 1,
            tokens=int(tokens_d[d]),
            kl={name: float(means[name][d]) for name in (BEFORE, AFTER) if name in means},
            begins=decode(documents[d][:_CONTEXT].tolist()),
        )
        for d in order
    ]
