import pytest
import torch
from torch.nn.functional import kl_div

from flagscale.post_training.divergences.top_k_kl import TopKKL
from flagscale.teacher_outputs import SparseTargets, codec_of
from flagscale.teacher_outputs.bias import BiasMeter
from tests.flagscale.teacher_outputs.outputs import CODECS, V, facts

B, S, T = 6, 64, 2.0


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's and a student's, [b, s, V]."""
    generator = torch.Generator().manual_seed(5)
    teacher, noise = 3 * torch.randn(2, B, S, V, generator=generator)
    return teacher, 0.7 * teacher + 0.4 * noise


def decoded(codec: dict, teacher: torch.Tensor) -> SparseTargets:
    made = codec_of(facts(codec, seq_length=S))
    found = made.decode(made.encode(teacher, "train", range(B)))
    assert isinstance(found, SparseTargets)
    return found


def measured(what: object, *logits: torch.Tensor, **more: object) -> dict[str, float]:
    meter = BiasMeter(T)
    for half in (slice(0, 2), slice(2, B)):  # as batch after batch
        part = what[half] if isinstance(what, torch.Tensor) else _part(what, half)
        meter.add(part, *(x[half] for x in logits), **{k: v[half] for k, v in more.items()})
    return meter.result()


def _part(targets: SparseTargets, half: slice) -> SparseTargets:
    return SparseTargets(**{k: v if v is None else v[half] for k, v in vars(targets).items()})


def gradients(losses: list[torch.Tensor], student: torch.Tensor) -> list[torch.Tensor]:
    return [torch.autograd.grad(loss.sum(), student, retain_graph=True)[0] for loss in losses]


def test_the_teacher_itself_has_no_bias(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = logits
    found = measured(teacher, teacher, student)
    assert found.pop("tokens") == B * S
    assert found == dict.fromkeys(found, 0.0)
    everything = decoded(CODECS["topk"] | {"top_k": V}, teacher)
    found = measured(everything, teacher, student)
    assert abs(found["kl"]) < 1e-6  # of float16 log probabilities
    assert abs(found["loss_error"]) < 2e-5
    assert found["gradient_error"] < 2e-3


def test_rounded_logits_are_as_far_as_their_kl_says(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    teacher, student = logits
    rounded = (teacher * 4).round() / 4
    found = measured(rounded, teacher, student)
    log_r, log_p, log_q = (
        (x.double() / T).log_softmax(-1).flatten(0, 1) for x in (rounded, teacher, student)
    )
    kls = [
        kl_div(b, a, reduction="batchmean", log_target=True)
        for a, b in ((log_r, log_p), (log_r, log_q), (log_p, log_q))
    ]
    assert found["kl"] == pytest.approx(float(kls[0]), rel=1e-9)
    assert found["loss_error"] == pytest.approx(float(kls[1] - kls[2]), rel=1e-9)
    error, true = log_p.exp() - log_r.exp(), log_q.exp() - log_p.exp()
    assert found["gradient_error"] == pytest.approx(float(error.norm() / true.norm()), rel=1e-9)


def test_top_k_is_biased_as_its_loss_and_gradient_are(
    logits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    teacher, student = logits
    targets = decoded(CODECS["topk"], teacher)
    found = measured(targets, teacher, student)
    mine = student.double().requires_grad_()
    live = (teacher.double() / T).log_softmax(-1)
    log_q = (mine / T).log_softmax(-1)
    whole = (live.exp() * (live - log_q)).sum(-1)
    coarse = TopKKL(T, 16)(student, teacher) / T**2
    assert found["loss_error"] == pytest.approx(float((coarse - whole.detach()).mean()), rel=1e-3)
    assert found["loss_error"] < -3 * found["loss_standard_error"]

    chosen = live.topk(16).indices
    p, q = live.exp().gather(-1, chosen), log_q.gather(-1, chosen)
    p_tail, q_tail = 1 - p.sum(-1), 1 - q.exp().sum(-1)
    loss = (p * (p.log() - q)).sum(-1) + p_tail * (p_tail.log() - q_tail.log())
    of_coarse, of_whole = gradients([loss, whole], mine)
    error = of_coarse - of_whole
    assert found["gradient_error"] == pytest.approx(float(error.norm() / of_whole.norm()), rel=1e-3)
    along = float((error * of_whole).sum() / of_whole.square().sum())
    assert found["gradient_bias"] == pytest.approx(along, rel=1e-3)

    spread = (p_tail / (V - 16))[..., None].expand_as(live).scatter(-1, chosen, p)
    expected = (spread * (spread.log() - live)).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(expected), rel=1e-3)


def test_sampled_has_noise_and_no_bias(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = logits
    found = measured(decoded(CODECS["sampled"] | {"draws": 50}, teacher), teacher, student)
    assert abs(found["loss_error"]) < 3 * found["loss_standard_error"]
    assert abs(found["gradient_bias"]) < 3 * found["gradient_standard_error"]
    assert found["gradient_error"] > 0.5
    assert found["kl"] > 0.1


def test_tokens_without_a_loss_do_not_count(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    teacher, student = logits
    targets = decoded(CODECS["topk"], teacher)
    mask = torch.zeros(B, S)
    mask[:3] = 1
    some = measured(targets, teacher, student, loss_mask_bs=mask)
    half = BiasMeter(T)
    half.add(_part(targets, slice(3)), teacher[:3], student[:3])
    assert some == pytest.approx(half.result())
    with pytest.raises(ValueError, match="no token"):
        measured(targets, teacher, student, loss_mask_bs=torch.zeros(B, S))
