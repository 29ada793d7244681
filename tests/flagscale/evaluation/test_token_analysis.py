"""Where models disagree, against scikit-learn and plain loops."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from flagscale.evaluation.report.token_analysis import Draws, calibration, find
from flagscale.evaluation.report.token_findings import CALIBRATION_BINS, TokenFindings, TokenTable

VOCAB = 50
DRAWS = Draws(documents=6, samples=200, confidence=0.95, seed=0)


def make_documents() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCAB, n) for n in (30, 9, 70, 2, 40, 33)]


def make_table(seq_length: int = 32) -> TokenTable:
    generator = np.random.default_rng(1)
    documents = make_documents()
    label_n = np.concatenate([one[1:] for one in documents])
    n = len(label_n)
    guesses = [np.where(generator.random(n) < 0.6, label_n, 7) for _ in range(3)]
    return TokenTable(
        document_n=np.repeat(np.arange(6), [len(one) - 1 for one in documents]),
        position_n=np.concatenate([np.arange(len(one) - 1) % seq_length + 1 for one in documents]),
        label_n=label_n,
        teacher_entropy_n=generator.gamma(1, 2, n),
        teacher_confidence_n=generator.random(n),
        teacher_guess_n=guesses[0],
        kl_n={"student": generator.gamma(2, 2, n), "distilled": generator.gamma(2, 1, n)},
        confidence_n={"student": generator.random(n), "distilled": generator.random(n)},
        guess_n={"student": guesses[1], "distilled": guesses[2]},
    )


def decode(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


@pytest.fixture(scope="module")
def findings() -> TokenFindings:
    trained_v = np.arange(VOCAB) ** 3
    return find(make_table(), DRAWS, trained_v, make_documents(), decode)


@pytest.mark.parametrize("seed", range(3))
def test_calibration_is_scikit_learns(seed: int) -> None:
    generator = np.random.default_rng(seed)
    confidence_n = np.append(generator.beta(2, 3, 400), [0.1, 0.2, 1.0])
    is_right_n = generator.random(403) < confidence_n**2
    found = calibration(confidence_n, is_right_n, np.arange(403) % 6, DRAWS)
    accuracy, confidence = calibration_curve(is_right_n, confidence_n, n_bins=CALIBRATION_BINS)
    filled = np.array(found.tokens) > 0
    np.testing.assert_allclose(np.array(found.accuracy)[filled], accuracy)
    np.testing.assert_allclose(np.array(found.confidence)[filled], confidence)
    shares = np.array(found.tokens)[filled] / 403
    assert found.ece == pytest.approx((shares * np.abs(accuracy - confidence)).sum())
    over = confidence_n.mean() - is_right_n.mean()
    assert found.overconfidence["value"] == pytest.approx(over)
    assert found.overconfidence["low"] < over < found.overconfidence["high"]


def test_slices_hold_every_token_once(findings: TokenFindings) -> None:
    table = make_table()
    assert set(findings.slices) == {"position", "teacher entropy", "token frequency"}
    for found in findings.slices.values():
        assert sum(one.tokens for one in found) == len(table.label_n)
        for model, kl_n in table.kl_n.items():
            total = sum(one.tokens * one.kl[model]["value"] for one in found)
            assert total == pytest.approx(kl_n.sum())
            for one in found:
                low, high = (one.kl[model][end] for end in ("low", "high"))
                assert low is None or low <= one.kl[model]["value"] <= high


def test_slices_are_where_they_say(findings: TokenFindings) -> None:
    table = make_table()
    kl_n, entropy_n = table.kl_n["distilled"], table.teacher_entropy_n
    labels = {name: {one.label: one for one in some} for name, some in findings.slices.items()}
    for name, label, here_n in (
        ("position", "1", table.position_n == 1),
        ("position", "4 to 7", (table.position_n >= 4) & (table.position_n <= 7)),
        ("position", "32 and more", table.position_n == 32),
        (
            "teacher entropy",
            "1 to 2",
            (entropy_n >= 1) & (entropy_n < 2),
        ),
        ("token frequency", "0", table.label_n == 0),
        ("token frequency", "10 to 99", (table.label_n**3 >= 10) & (table.label_n**3 < 100)),
    ):
        found = labels[name][label]
        assert found.tokens == here_n.sum(), (name, label)
        assert found.kl["distilled"]["value"] == pytest.approx(kl_n[here_n].mean())


def test_tokens_of_one_document_have_no_interval() -> None:
    """They would be equal in every resample, as if nothing were more certain."""
    table = make_table()
    here = table.document_n == 2
    moved = replace(table, position_n=np.where(here, 40, 1))
    found = find(moved, DRAWS, np.ones(VOCAB), make_documents(), decode)
    longest = found.slices["position"][-1]
    assert longest.tokens == here.sum()
    assert longest.kl["student"]["low"] is longest.kl["student"]["high"] is None
    assert longest.kl["student"]["value"] == pytest.approx(table.kl_n["student"][here].mean())


def test_the_worst_tokens_are_shown_in_their_text(findings: TokenFindings) -> None:
    table, documents = make_table(), make_documents()
    worst = findings.worst_tokens[0]
    row = int(table.kl_n["distilled"].argmax())
    assert worst.kl == table.kl_n["distilled"].max()
    document = documents[worst.document - 1]
    assert worst.token == decode([document[worst.position]]) == decode([table.label_n[row]])
    assert decode(document.tolist()).startswith(worst.before + worst.token)
    assert worst.student == (
        decode([table.guess_n["distilled"][row]]),
        table.confidence_n["distilled"][row],
    )
    assert worst.teacher[1] == table.teacher_confidence_n[row]
    kls = [one.kl for one in findings.worst_tokens]
    assert kls == sorted(kls, reverse=True)
    for a in findings.worst_tokens:
        for b in findings.worst_tokens:
            assert a is b or a.document != b.document or abs(a.position - b.position) >= 16


def test_the_worst_documents(findings: TokenFindings) -> None:
    table = make_table()
    means = [table.kl_n["distilled"][table.document_n == d].mean() for d in range(6)]
    assert [one.document for one in findings.worst_documents] == [
        int(d) + 1 for d in np.argsort(means)[::-1][:5]
    ]
    assert findings.worst_documents[0].kl["distilled"] == pytest.approx(max(means))


def test_survives_json(findings: TokenFindings) -> None:
    assert TokenFindings.of_json(json.loads(json.dumps(findings.as_json()))) == findings
