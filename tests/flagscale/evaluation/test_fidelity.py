"""Figures against an independent float64 computation; windows, padding and batches."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from flagscale.errors import UserError
from flagscale.evaluation.fidelity import FIGURES, TEACHER, Fidelity, document_hash, read_rows
from flagscale.evaluation.measure import measuring
from flagscale.evaluation.measure.teacher import KeptTeacher
from flagscale.evaluation.measure.windows import batches

VOCAB = 101


def make_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Layer:
    """An output layer over the whole vocabulary."""

    weight: Callable[[torch.Tensor], torch.Tensor]
    group: None = None
    first_token: int = 0
    size: int = VOCAB

    def __call__(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        return self.weight(hidden_nh)


class Halves:
    """A transformers model in two halves."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model, self.output_layer = model, Layer(model.lm_head)

    def hidden_states(self, tokens_bs: torch.Tensor) -> torch.Tensor:
        return self._model.model(tokens_bs).last_hidden_state


class Fixed:
    """Logits that do not depend on the text; notes what was run."""

    def __init__(self, value: float) -> None:
        self.output_layer = Layer(lambda hidden_nh: torch.full((len(hidden_nh), VOCAB), value))
        self.seen: list[torch.Tensor] = []

    def hidden_states(self, tokens_bs: torch.Tensor) -> torch.Tensor:
        self.seen.append(tokens_bs)
        return torch.zeros(*tokens_bs.shape, 2)


def measure(
    teacher: measuring.Model,
    students: Mapping[str, measuring.Model],
    documents: list[np.ndarray],
    seq_length: int,
    micro_batch_size: int,
) -> Fidelity:
    """As the step does."""
    text = batches(documents, seq_length, micro_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptTeacher(Path(folder), writes=True)
        measuring.keep(teacher, kept, text)
        sums = {}
        for name, model in students.items():
            sums[TEACHER], sums[name] = measuring.measure(name, model, kept, text, len(documents))
    return Fidelity(
        documents=tuple(document_hash(document) for document in documents),
        tokens_d=np.array([len(document) - 1 for document in documents]),
        sums={name: dict(zip(FIGURES, rows, strict=True)) for name, rows in sums.items()},
    )


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return make_model(0)


@pytest.fixture(scope="module")
def student() -> LlamaForCausalLM:
    return make_model(1)


MODELS = Halves(make_model(0)), Halves(make_model(1))


def make_documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB, n).astype(np.int32) for n in lengths]


@torch.no_grad()
def figures_by_hand(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM, document: np.ndarray, seq_length: int
) -> dict[str, float]:
    """Token by token, one window at a time, in float64, from transformers' logits."""
    sums = dict.fromkeys(FIGURES, 0.0)
    ids = torch.from_numpy(document.astype(np.int64))
    for position in range(1, len(ids)):
        start = (position - 1) // seq_length * seq_length
        context = ids[None, start:position]
        log_t = model_log_probs(teacher, context)
        log_s = model_log_probs(student, context)
        label = int(ids[position])
        sums["lm_loss"] -= float(log_s[label])
        sums["kl"] += float(
            torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="sum")
        )
        sums["top1_agreement"] += float(log_t.argmax() == log_s.argmax())
        sums["accuracy"] += float(log_s.argmax() == label)
    return sums


def model_log_probs(model: LlamaForCausalLM, context: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(context).logits[0, -1].double(), dim=-1)


def test_figures_equal_an_independent_float64_computation(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM
) -> None:
    documents = make_documents([2, 9, 17, 25, 8, 5])
    result = measure(Halves(teacher), {"student": Halves(student)}, documents, 8, 3)
    assert result.tokens_d.tolist() == [1, 8, 16, 24, 7, 4]
    for d, document in enumerate(documents):
        expected = figures_by_hand(teacher, student, document, seq_length=8)
        for figure in FIGURES:
            assert result.sums["student"][figure][d] == pytest.approx(expected[figure], rel=1e-5)
        own = figures_by_hand(teacher, teacher, document, seq_length=8)
        for figure in ("lm_loss", "accuracy"):
            assert result.sums["teacher"][figure][d] == pytest.approx(own[figure], rel=1e-5)


def test_teacher_as_student_has_no_kl_and_full_agreement(teacher: LlamaForCausalLM) -> None:
    documents = make_documents([12, 30])
    result = measure(Halves(teacher), {"copy": Halves(teacher)}, documents, 8, 2)
    for model in ("teacher", "copy"):
        assert result.sums[model]["kl"].tolist() == [0.0, 0.0]
        assert (result.sums[model]["top1_agreement"] == result.tokens_d).all()
    np.testing.assert_array_equal(result.sums["copy"]["lm_loss"], result.sums["teacher"]["lm_loss"])


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=7),
    seq_length=st.integers(4, 20),
    micro_batch_size=st.integers(1, 6),
)
def test_batching_and_padding_change_nothing(
    lengths: list[int], seq_length: int, micro_batch_size: int
) -> None:
    teacher, student = MODELS
    documents = make_documents(lengths)
    alone = measure(teacher, {"student": student}, documents, seq_length, 1)
    together = measure(teacher, {"student": student}, documents, seq_length, micro_batch_size)
    for figure in FIGURES:
        np.testing.assert_allclose(
            together.sums["student"][figure], alone.sums["student"][figure], rtol=1e-5
        )
    assert together.documents == alone.documents


def test_every_token_but_the_first_is_predicted_once() -> None:
    uniform = Fixed(0.0)
    document = np.arange(1, 24)
    result = measure(uniform, {"a": Fixed(1.0)}, [document], seq_length=5, micro_batch_size=2)
    seen = torch.cat([tokens_bs.flatten() for tokens_bs in uniform.seen]).tolist()
    assert sorted(token for token in seen if token) == list(range(1, 23))
    assert result.sums["teacher"]["lm_loss"][0] == pytest.approx(22 * np.log(VOCAB), rel=1e-7)


def test_the_teacher_runs_once_for_all_students() -> None:
    teacher = Fixed(0.0)
    measure(teacher, {name: Fixed(1.0) for name in "abc"}, make_documents([9, 9, 9]), 8, 2)
    assert [tuple(tokens_bs.shape) for tokens_bs in teacher.seen] == [(2, 8), (1, 8)]


def test_logits_are_computed_in_pieces(
    teacher: LlamaForCausalLM, student: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = make_documents([12, 30])
    whole = measure(Halves(teacher), {"student": Halves(student)}, documents, 8, 2)
    monkeypatch.setitem(measuring._CHUNK_ELEMENTS, "cpu", 5 * VOCAB)
    sizes = []
    halves = Halves(student)
    halves.output_layer.weight = lambda hidden_nh: (
        sizes.append(len(hidden_nh)) or student.lm_head(hidden_nh)
    )
    pieces = measure(Halves(teacher), {"student": halves}, documents, 8, 2)
    assert max(sizes) == 5
    for figure in FIGURES:
        np.testing.assert_allclose(
            pieces.sums["student"][figure], whole.sums["student"][figure], rtol=1e-5
        )


def test_diverged_model_is_named(teacher: LlamaForCausalLM) -> None:
    with pytest.raises(UserError, match="the distilled model's logits are not finite"):
        measure(Halves(teacher), {"distilled": Fixed(float("nan"))}, make_documents([5]), 8, 2)


def test_broken_teacher_is_named(student: LlamaForCausalLM) -> None:
    students = {"student": Halves(student)}
    with pytest.raises(UserError, match="the teacher model's logits are not finite"):
        measure(Fixed(float("nan")), students, make_documents([5]), 8, 2)


def test_students_come_after_their_teacher(tmp_path: Path) -> None:
    text = batches(make_documents([5]), 8, 2)
    with pytest.raises(ValueError, match="the teacher is measured before its students"):
        measuring.measure("student", MODELS[1], KeptTeacher(tmp_path, writes=True), text, 1)


def test_rows_survive_json(teacher: LlamaForCausalLM, student: LlamaForCausalLM) -> None:
    documents = make_documents([12, 30])
    result = measure(Halves(teacher), {"student": Halves(student)}, documents, 8, 2)
    again = read_rows([json.loads(json.dumps(row)) for row in result.rows()])
    assert again.documents == result.documents
    for model in ("teacher", "student"):
        for figure in FIGURES:
            np.testing.assert_array_equal(again.sums[model][figure], result.sums[model][figure])


def test_documents_are_known_by_their_tokens() -> None:
    a, b = make_documents([9, 9])
    assert document_hash(a) == document_hash(a.astype(np.int64))
    assert document_hash(a) != document_hash(b)
