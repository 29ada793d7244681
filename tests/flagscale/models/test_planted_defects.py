"""Defects planted in a distillation, each found by the audit and named; and sound models."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig
from variants import VARIANTS

from flagscale.artifacts import open_artifact
from flagscale.checkpoint import save_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments, with_teacher
from flagscale.megatron.global_vars import get_args, use_args
from flagscale.megatron.shape import ModelShape, from_hf_config
from flagscale.models import distillation_proof
from flagscale.models.audit_artifacts import audited_batch
from flagscale.models.distillation_audit import AUDITED_LOSS, audit
from flagscale.models.distillation_proof import PROOF_LOSS
from flagscale.models.megatron import WEIGHTS, build_model, logits
from flagscale.models.random_weights import with_random_weights
from flagscale.models.student_audit import Artifacts, audit_student, load_pair
from flagscale.post_training import attention_relations, conversion, loss_func
from flagscale.post_training.divergences import Divergence
from flagscale.post_training.divergences.total_variation import TotalVariation
from flagscale.post_training.findings import Finding, failures
from flagscale.post_training.hidden_states import FITS
from flagscale.post_training.intermediate_terms import intermediate_terms
from flagscale.train import train_gpt
from flagscale.train.batches import get_batch

SEQ_LENGTH = 64
Plant = Callable[["Case"], object]


@pytest.fixture(scope="module")
def arguments(teacher: Path, student: Path) -> Iterator[None]:
    args = with_teacher(model_arguments(ModelShape.load(student), SEQ_LENGTH), teacher, PROOF_LOSS)
    with platform.runtime(), use_args(args):
        yield


class Case:
    """Two models, a batch and where they come from, for a plant to spoil."""

    def __init__(
        self, teacher: Path, student: Path, dataset: Path, folder: Path, patch: Any
    ) -> None:
        self.folder, self.patch = folder, patch
        kinds = {"teacher": teacher, "dataset": dataset}
        manifests = {kind: open_artifact(path, kind, False) for kind, path in kinds.items()}
        self.artifacts = Artifacts(student, teacher, dataset, manifests, [0, 3], torch.float32)
        self.student, self.teacher = load_pair(self.artifacts, get_args())
        self.loss = AUDITED_LOSS
        self.batch, self.unigram = audited_batch(dataset, self.teacher.unpadded_vocab_size)

    def audit(self) -> list[Finding]:
        """As convert-student does."""
        audited = audit_student(
            self.artifacts, self.student, self.teacher, self.batch, self.unigram, self.loss
        )
        return audited.findings


@pytest.fixture
def case(
    arguments: None, teacher: Path, student: Path, dataset: Path, tmp_path: Path, monkeypatch: Any
) -> Case:
    return Case(teacher, student, dataset, tmp_path, monkeypatch)


def test_a_sound_conversion_passes(case):
    found = case.audit()
    assert [one for one in found if one.verdict != "passed"] == []
    assert len(found) >= 25


def test_a_sound_conversion_with_terms_passes(case):
    case.loss = AUDITED_LOSS.model_copy(update=TERMS)
    found = case.audit()
    assert [one for one in found if one.verdict != "passed"] == []
    assert {"intermediate loss", "attention loss"} <= {one.check for one in found}


def test_the_models_are_what_they_were(case):
    models = {"teacher": case.teacher, "student": case.student}
    before = {name: logits(model, case.batch["tokens"]) for name, model in models.items()}
    hooks = {name: count_hooks(model) for name, model in models.items()}
    case.audit()
    for name, model in models.items():
        assert torch.equal(logits(model, case.batch["tokens"]), before[name])
        assert count_hooks(model) == hooks[name]
        assert not model.training
        assert not [one for one in model.parameters() if one.grad is not None]


def count_hooks(model: GPTModel) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def kl(p_v: torch.Tensor, q_v: torch.Tensor) -> torch.Tensor:
    log_p, log_q = p_v.log_softmax(-1), q_v.log_softmax(-1)
    # Of what is no token both are -inf.
    return (log_p.exp() * torch.where(log_p.isneginf(), 0.0, log_p - log_q)).sum(-1)


def entropy(p_v: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=p_v.clamp(min=-1e4)).entropy()


def kd(function: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> Plant:
    """Another KD loss, of (student's logits, teacher's logits, temperature)."""

    class Planted(Divergence):
        def loss_and_gradient(self, student_nv, teacher_nv, group=None, *, with_gradient=True):
            leaf_nv = student_nv.detach().float().requires_grad_()
            with torch.enable_grad():
                loss_n = function(leaf_nv, teacher_nv.float(), self.temperature)
                (gradient_nv,) = torch.autograd.grad(loss_n.sum(), leaf_nv)
            if not with_gradient:
                return loss_n.detach(), None
            return loss_n.detach(), student_nv.copy_(gradient_nv)

        def _work(self, *_):
            raise NotImplementedError

    def plant(case: Case) -> None:
        case.patch.setattr(conversion, "divergence_of", lambda recipe: Planted(recipe.temperature))

    return plant


def top_k_renormalised(s: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
    top = t.topk(32, -1)
    return temperature**2 * kl(top.values / temperature, s.gather(-1, top.indices) / temperature)


def gradient_times(factor: float) -> Plant:
    """The value is right."""

    def loss(s: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
        right = temperature**2 * kl(t / temperature, s / temperature)
        return right * factor + (right * (1 - factor)).detach()

    return kd(loss)


def no_temperature(case: Case) -> None:
    """In one of the divergences that the recipe has not chosen."""
    right = TotalVariation.loss_and_gradient

    def wrong(self: Any, *inputs: Any, **named: Any) -> Any:
        loss, gradient = right(self, *inputs, **named)
        return loss / self.temperature**2, gradient

    case.patch.setattr(TotalVariation, "loss_and_gradient", wrong)


def get_batch_with(**changes: Callable[[Any], torch.Tensor]) -> Plant:
    def plant(case: Case) -> None:
        def changed(*args: Any) -> Any:
            batch = get_batch(*args)
            return batch._replace(**{name: change(batch) for name, change in changes.items()})

        case.patch.setattr(train_gpt, "get_batch", changed)

    return plant


def summed(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Plant:
    """Another sum over the tokens: of (the right one, loss mask)."""

    def plant(case: Case) -> None:
        right = loss_func.masked_sum

        def masked_sum(output: Any, mask: torch.Tensor) -> torch.Tensor:
            return function(lambda m: right(output, m), mask)

        case.patch.setattr(loss_func, "masked_sum", masked_sum)

    return plant


def result(function: Callable[..., Any]) -> Plant:
    """Another result of `loss_func`: of (loss, number of tokens, report, mask)."""

    def plant(case: Case) -> None:
        right = train_gpt.loss_func_modelopt

        def changed(mask: torch.Tensor, *args: Any, **named: Any) -> Any:
            return function(*right(mask, *args, **named), mask)

        case.patch.setattr(train_gpt, "loss_func_modelopt", changed)

    return plant


def all_are_counted(loss, num_tokens, report, mask):
    count = torch.tensor(float(mask.numel()))
    counted = {name: torch.stack([sums[0], count]) for name, sums in report.items()}
    return loss, count.int(), counted


def lm_is_differentiated(loss, num_tokens, report, mask):
    return loss / 2, num_tokens, report


def after_conversion(change: Callable[[Any, GPTModel], object]) -> Plant:
    """Change a distillation model and its teacher, right after they have become one."""

    def plant(case: Case) -> None:
        def convert(student: GPTModel, teacher: GPTModel, *rest: Any) -> Any:
            model = conversion.convert_for_distillation(student, teacher, *rest)
            change(model, teacher)
            return model

        case.patch.setattr(distillation_proof, "convert_for_distillation", convert)

    return plant


def stays_in_training(model: Any, teacher: GPTModel) -> None:
    teacher.eval = lambda: teacher.train()


def drops_out(model: Any, teacher: GPTModel) -> None:
    norm = teacher.decoder.final_layernorm
    norm.register_forward_hook(lambda *a: torch.nn.functional.dropout(a[2], 0.1))


def keeps_a_gradient(model: Any, teacher: GPTModel) -> None:
    weight = teacher.decoder.final_layernorm.weight
    weight.grad = torch.ones_like(weight)


def lm_loss_twice(model: Any, teacher: GPTModel) -> None:
    right = model.loss_balancer.forward

    def forward(losses: Any) -> Any:
        found = right(losses)
        return found | {"kd_loss": found["kd_loss"] + losses["student_loss"]}

    model.loss_balancer.forward = forward


def otherwise_in_validation(model: Any, teacher: GPTModel) -> None:
    right = model.loss_balancer.forward

    def forward(losses: Any) -> Any:
        found = right(losses)
        return found if model.training else {k: 1.5 * loss for k, loss in found.items()}

    model.loss_balancer.forward = forward


def not_causal(case: Case) -> None:
    right = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **named: Any) -> torch.Tensor:
        return right(*args, **{**named, "is_causal": False})

    case.patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def weight(whose: str, name: str, change: Callable[[torch.Tensor], object]) -> Plant:
    return lambda case: change(getattr(case, whose).get_parameter(name).data)


def set_nan(value: torch.Tensor) -> None:
    value[3, 5] = float("nan")


def in_the_artifact(plant: Plant) -> Plant:
    """What was read is what is stored, and that is wrong."""

    def planted(case: Case) -> None:
        plant(case)
        copy = case.folder / "teacher"
        shutil.copytree(case.artifacts.teacher, copy, ignore=shutil.ignore_patterns(WEIGHTS))
        save_weights(case.teacher, copy / WEIGHTS)
        case.artifacts = replace(case.artifacts, teacher=copy)

    return planted


def rows_in_another_order(value: torch.Tensor) -> None:
    value.copy_(value.roll(7, 0))


def untied(case: Case) -> None:
    own = case.student.embedding.word_embeddings.weight.detach().clone().requires_grad_()
    case.student.shared_embedding_or_output_weight = lambda: own


def padding_in_the_softmax(case: Case) -> None:
    apart(case)
    for model in (case.student, case.teacher):
        model.output_layer._forward_hooks.clear()
        with torch.no_grad():  # padding that nobody masks is not 0
            model.embedding.word_embeddings.weight[1000:] = 0.1


def other_tokenizer(case: Case) -> None:
    for name in ("tokens", "labels"):
        case.batch[name] = (case.batch[name] * 7 + 300) % 1000


def other_layers(case: Case) -> None:
    first, second = case.student.decoder.layers
    first.load_state_dict(second.state_dict())


def stored_in_bf16(case: Case) -> None:
    save_weights(case.student, case.folder / "saved" / WEIGHTS, torch.bfloat16)
    case.artifacts = replace(case.artifacts, student=case.folder / "saved")


def apart(case: Case) -> None:
    """Output layers and losses are not fused: there are logits."""
    case.loss = AUDITED_LOSS.model_copy(update={"fuse_output_layer": False})


def with_logits(plant: Plant) -> Plant:
    """Fused, the losses of masked tokens are not even made."""

    def planted(case: Case) -> None:
        apart(case)
        plant(case)

    return planted


def with_terms(plant: Plant) -> Plant:
    """Layers and attentions are matched too."""

    def planted(case: Case) -> None:
        case.loss = AUDITED_LOSS.model_copy(update=TERMS)
        plant(case)

    return planted


def projection(first: int, last: int) -> Plant:
    """Of the pair of hidden states, another than its widths need."""

    def plant(model: Any, teacher: GPTModel) -> None:
        terms = intermediate_terms(model)
        terms.projections["0"] = torch.nn.Linear(first, last)

    return with_terms(after_conversion(plant))


def scores_not_scaled(case: Case) -> None:
    def scores(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return row.float() @ column.float().transpose(2, 3)

    case.patch.setattr(attention_relations, "_scores", scores)


def overwritten_logits(case: Case) -> None:
    apart(case)
    case.patch.setattr(conversion, "_keep_logits_for_the_kd_loss", lambda model: None)


def frozen_part(case: Case) -> None:
    case.student.decoder.layers[0].mlp.linear_fc1.weight.requires_grad_(False)


NORM = "decoder.final_layernorm.weight"
LAYER_NORM = "decoder.layers.1.input_layernorm.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
EMBEDDING = "embedding.word_embeddings.weight"
TERMS = {
    "intermediate_layer_pairs": (("decoder.layers.0", "decoder.layers.1", "mse"),),
    "attention_layer_pairs": ((0, 1),),
}
DEFECTS: dict[str, tuple[Plant, str]] = {
    "student's norm not loaded": (
        weight("student", LAYER_NORM, lambda w: w.fill_(1)),
        r"student's .*layer_norm_weight in memory is not what its artifact holds: .* not loaded",
    ),
    "teacher's norm not loaded": (
        weight("teacher", NORM, lambda w: w.fill_(1)),
        r"teacher's .*final_layernorm.weight in memory is not what its artifact holds",
    ),
    "soft cross entropy as KL": (
        kd(lambda s, t, x: x * x * kl(t / x, s / x) + x * x * entropy(t / x)),
        "KD loss is reported as .* it is soft cross entropy: the teacher's entropy is not taken",
    ),
    "top-k renormalised": (kd(top_k_renormalised), "it is over the teacher's top 32 .*renormalis"),
    "reversed KL": (kd(lambda s, t, x: x * x * kl(s / x, t / x)), "it is the reverse KL"),
    "temperature not squared": (
        kd(lambda s, t, x: kl(t / x, s / x)),
        r"it is without the factor T\^2",
    ),
    "temperature of one model": (
        kd(lambda s, t, x: x * x * kl(t, s / x)),
        "it is with the temperature applied to the student's logits alone",
    ),
    "masked teacher's log-probabilities": (
        kd(lambda s, t, x: x * x * kl(t.where((t > t.median()) | t.isneginf(), -1e4) / x, s / x)),
        "KD loss is reported as .* but is .* in float64 from the same hidden states",
    ),
    "mean over the vocabulary": (
        kd(lambda s, t, x: x * x * kl(t / x, s / x) / s.size(-1)),
        r"it is a mean over the (padded )?vocabulary, not a sum",
    ),
    "temperature missing in the gradient": (
        gradient_times(0.25),
        r"KD loss' gradient is 0.25 times what it must be: the factor T\^2 is missing",
    ),
    "gradient's sign": (gradient_times(-1), "gradient is -1 times what it must be"),
    "validation otherwise": (
        after_conversion(otherwise_in_validation),
        "changes from .* to .* in evaluation mode",
    ),
    "another divergence without T^2": (no_temperature, "total_variation differs by 0.7"),
    "labels shifted twice": (
        get_batch_with(labels=lambda b: b.labels.roll(-1, 1)),
        "labels that the loss is given are shifted twice",
    ),
    "labels not shifted": (
        get_batch_with(labels=lambda b: b.tokens),
        "labels that the loss is given are not shifted",
    ),
    "mask shifted": (
        get_batch_with(loss_mask=lambda b: b.loss_mask.roll(1, 1)),
        "given another mask than the data loader's",
    ),
    "position ids off by one": (
        get_batch_with(position_ids=lambda b: b.position_ids + 1),
        "position ids begin at 1, not 0",
    ),
    "mask ignored in the loss": (
        with_logits(summed(lambda right, mask: right(torch.ones_like(mask)))),
        "it is summed over the masked tokens too: the mask is ignored",
    ),
    "mask ignored in the loss, fused": (
        summed(lambda right, mask: right(torch.ones_like(mask))),
        "fails: .* differentiated in another way than its gradient was computed for",
    ),
    "mask ignored in the denominator": (
        result(all_are_counted),
        "divided by 64 tokens, but .* are not masked .* the mask is ignored in the denominator",
    ),
    "wrong token count": (
        summed(lambda right, mask: right(mask) * mask.numel() / mask.sum()),
        "it is scaled by the share of masked tokens",
    ),
    "summed over ranks twice": (
        summed(lambda right, mask: 2 * right(mask)),
        "it is 2 times too large: summed over ranks",
    ),
    "a mean, not a sum": (
        summed(lambda right, mask: right(mask) / mask.sum()),
        "it is a mean over the unmasked tokens, not their sum",
    ),
    "another loss is differentiated": (
        result(lm_is_differentiated),
        "the loss that training takes the gradient of is .* not the total of the reported terms",
    ),
    "LM loss twice": (after_conversion(lm_loss_twice), "total is reported as .* but the terms add"),
    "logits overwritten by cross entropy": (
        overwritten_logits,
        "changes from .* when the LM loss is mixed in: it reads logits that the cross entropy",
    ),
    "teacher in training mode": (after_conversion(stays_in_training), "is in training mode"),
    "teacher's dropout": (after_conversion(drops_out), "differ by .* dropout is on"),
    "teacher trainable": (
        after_conversion(lambda model, teacher: teacher.requires_grad_(True)),
        "the teacher beside the student is trainable",
    ),
    "teacher's gradient kept": (
        after_conversion(keeps_a_gradient),
        "teacher's decoder.final_layernorm.weight got a gradient: it would not stay",
    ),
    "attention not causal": (not_causal, "student's hidden states change .* is not causal"),
    "vocabulary rows permuted": (
        in_the_artifact(weight("teacher", EMBEDDING, rows_in_another_order)),
        "teacher's loss is .* its weights are broken .* rows in another order",
    ),
    "layer zeroed": (weight("student", FC2, lambda w: w.zero_()), "student's .* is all zero"),
    "NaN": (weight("teacher", FC2, set_nan), "teacher's .*linear_fc2.weight holds .* not finite"),
    "tied weights untied": (untied, "student's output layer has weights of its own"),
    "padding in the softmax": (padding_in_the_softmax, "with the padding of the vocabulary in the"),
    "wrong tokenizer": (other_tokenizer, "data were made with another tokenizer"),
    "other layers kept": (other_layers, "student's .* is not the teacher's .*layers.0"),
    "stored in another dtype": (stored_in_bf16, "stored in torch.bfloat16, not in torch.float32"),
    "projection from a wrong size": (
        projection(24, 64),
        "mse of .*: 64 channels of the student need a projection to 64 .* is one from 24 to 64",
    ),
    "projection to one channel": (projection(64, 1), "but there is one from 64 to 1"),
    "another fit of hidden states": (
        with_terms(lambda case: case.patch.setitem(FITS, "mse", FITS["cosine"])),
        "intermediate distillation loss is reported as .* but is .* in float64",
    ),
    "attention's scores not scaled": (
        with_terms(scores_not_scaled),
        "attention distillation loss is reported as .* but is .* in float64",
    ),
    "part of the student frozen": (frozen_part, "student's .*linear_fc1.weight got no gradient"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_named(case, name):
    plant, message = DEFECTS[name]
    plant(case)
    found = failures(case.audit())

    assert any(re.search(message, line) for line in found), found


FAMILIES = [
    "llama tied",
    "llama untied, llama3 rope",
    "qwen2 tied",
    "qwen3 untied",
    "mistral untied, wide heads",
    "qwen3_moe untied, rescaled shares",
]


def random_shape(family: str) -> ModelShape:
    values = {
        "vocab_size": 300,  # padded to 384
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    return from_hf_config(AutoConfig.for_model(**(values | VARIANTS[family])))


@pytest.mark.parametrize("init", ["depth", "same", "scratch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_found_in_sound_models(family, dtype, init, teacher, arguments):
    """With random weights, whose loss is no better than that of frequencies: a warning."""
    shape = random_shape(family)
    build = partial(build_model, seq_length=32, params_dtype=dtype)
    taught = with_random_weights(partial(build, shape), 5)
    layers = {"depth": [0, 2], "same": [0, 1, 2], "scratch": [0]}[init]
    student_shape = replace(shape, num_layers=len(layers))
    learner = with_random_weights(partial(build, student_shape), 6)
    if init != "scratch":
        theirs = dict(taught.named_parameters())
        for name, parameter in learner.named_parameters():
            kept = re.sub(r"layers\.(\d+)", lambda at: f"layers.{layers[int(at[1])]}", name)
            parameter.data.copy_(theirs[kept])
    tokens = torch.randint(300, (1, 33), generator=torch.Generator().manual_seed(1))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(1, 32),
        "position_ids": torch.arange(32)[None],
    }
    args = model_arguments(student_shape, 32, params_dtype=dtype)
    with use_args(with_teacher(args, teacher, PROOF_LOSS)):
        found = audit(learner, taught, batch, unigram=5.0).findings
    wrong = [one for one in found if one.verdict not in ("passed", "not run")]
    assert [(one.check, one.verdict) for one in wrong] == [("teacher's loss", "warning")], wrong
