"""What is looked at before a run: sources, what the models can do, whether anything has changed."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from sourced_recipe import recipe

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.recipe import Recipe, ResourcesRecipe
from pipelines.local.preflight import check_sources, fingerprint, with_fingerprints
from pipelines.local.runner import run_recipe
from pipelines.placement import check
from pipelines.platform import load_platform
from tests.flagscale.web_server import COMMIT, WebServer

ONE_ACCELERATOR = ResourcesRecipe(accelerator_count=1)


def of_a_model(teacher: Path, source: Path) -> Recipe:
    """The student is a model of its own."""
    values = recipe(teacher).model_dump(mode="json")
    values["student"] = {"init": "pretrained", "source": str(source)}
    return Recipe.model_validate(values)


def test_a_fingerprint_follows_local_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "a.txt"
    file.write_text("one")
    sources = [str(tmp_path), str(file), str(tmp_path / "*" / "*.txt")]
    sources += [f"file://{source}" for source in sources] + [f"file:{file}", f"local://{file}"]
    before = [fingerprint(source) for source in sources]
    assert None not in before
    assert before == [fingerprint(source) for source in sources]
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert all(a != b for a, b in zip(before, map(fingerprint, sources), strict=True))


def test_what_is_not_local_has_no_fingerprint() -> None:
    assert fingerprint("HuggingFaceTB/SmolLM2-135M") is None
    assert fingerprint("s3://bucket/*.jsonl") is None
    assert fingerprint("python-docs") == f"python {sys.version.split()[0]}"


def test_fingerprints_are_filled_in_but_not_replaced(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    filled = with_fingerprints(recipe(tmp_path, text))
    assert filled.teacher.fingerprint == fingerprint(str(tmp_path))
    # The tokenizer is the teacher's, and the tokens depend on it.
    assert filled.data.fingerprint == f"{fingerprint(str(text))}+{fingerprint(str(tmp_path))}"
    assert with_fingerprints(filled) == filled


def test_a_student_that_is_a_model_has_a_fingerprint_too(tmp_path: Path) -> None:
    """In a sweep one of all its students: whichever changes, none is taken from the cache."""
    places = [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
        (place / "config.json").write_text("one")
    one = of_a_model(tmp_path, places[0])
    assert with_fingerprints(one).student.fingerprint == fingerprint(str(places[0]))
    assert with_fingerprints(recipe(tmp_path)).student.fingerprint is None
    values = one.model_dump(mode="json")
    values["sweep"] = {"vary": {"student.source": [str(place) for place in places]}}
    sweep = Recipe.model_validate(values)
    both = "+".join(str(fingerprint(str(place))) for place in places)
    assert with_fingerprints(sweep).student.fingerprint == both


def test_remote_text_and_models_have_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = WebServer(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("one")
    asked = recipe("o/n", f"{server.url}/a.jsonl")
    before = with_fingerprints(asked)
    assert before.teacher.fingerprint == f"commit {COMMIT}"
    assert before.data.fingerprint is not None
    assert with_fingerprints(asked) == before
    server.commit = "d" * 40
    os.utime(tmp_path / "a.jsonl", (1, 1))
    after = with_fingerprints(asked)
    assert after.teacher.fingerprint != before.teacher.fingerprint
    assert after.data.fingerprint != before.data.fingerprint
    assert "nobody says" not in caplog.text
    server.tells = False
    silent = with_fingerprints(asked)
    assert silent.data.fingerprint == silent.teacher.fingerprint  # the tokenizer's
    assert "a.jsonl: nobody says whether it has changed" in caplog.text
    server.close()


def test_a_blend_is_looked_at_corpus_by_corpus(tiny_teacher: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("one")
    corpora = [{"name": path.stem, "source": str(path)} for path in (one, two)]
    values = recipe(tiny_teacher).model_dump(mode="json")
    values["data"] |= {"source": None, "blend": corpora}
    blend = Recipe.model_validate(values)
    with pytest.raises(UserError, match=r"b.txt': no such file"):
        check_sources(blend)
    before = with_fingerprints(blend).data.fingerprint
    two.write_text("two")
    check_sources(blend)
    assert with_fingerprints(blend).data.fingerprint != before


def test_every_variant_of_a_sweep_is_looked_at(tiny_teacher: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    values = recipe(tiny_teacher, text).model_dump(mode="json")
    values["student"] = {"num_layers": 2}
    values["sweep"] = {"vary": {"student.num_layers": [2, 9], "training.seed": [1, 2]}}
    with pytest.raises(UserError, match=r"the variant 'num_layers=9 seed=1': .*9"):
        check_sources(Recipe.model_validate(values))
    values["sweep"]["vary"]["student.num_layers"] = [2, 3]
    check_sources(Recipe.model_validate(values))


@pytest.mark.parametrize(
    ("parallelism", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"num_attention_heads=4 .* not divisible by tensor"),
        ({"pipeline_model_parallel_size": 4}, r"num_layers=2 .* not divisible by the pipeline's 4"),
        ({"context_parallel_size": 3}, r"seq_length=256 is not divisible by 2 x context"),
    ],
)
def test_models_that_the_ranks_do_not_divide(tiny_teacher, parallelism, message) -> None:
    values = recipe(tiny_teacher).model_dump(mode="json")
    values["training"]["parallelism"] = parallelism
    with pytest.raises(UserError, match=message):
        check_sources(Recipe.model_validate(values))


@pytest.mark.parametrize(
    ("pair", "stages", "message"),
    [
        (
            ["decoder.layers.2", "decoder.layers.3"],
            1,
            r"layers\.2' of the student: it has .* 0 to 1",
        ),
        (
            ["decoder.layers.1", "decoder.layers.4"],
            1,
            r"layers\.4' of the teacher: it has .* 0 to 3",
        ),
        (["layers.1", "decoder.layers.3"], 1, "must be embedding, decoder.final_layernorm, or"),
        (["decoder.layers.1.mpl", "decoder.layers.3"], 1, "is called mpl; did you mean mlp?"),
        (["decoder.layers.1", "output_layer"], 2, "of the teacher: logits are matched by"),
        (["decoder.layers.1.router", "decoder.layers.1"], 1, "router cannot be compared token"),
    ],
)
def test_pairs_of_layers_that_no_loss_can_compare(tiny_teacher, pair, stages, message) -> None:
    values = recipe(tiny_teacher).model_dump(mode="json")
    values["training"]["parallelism"] = {"pipeline_model_parallel_size": stages}
    values["distillation"]["intermediate_layer_pairs"] = [pair]
    with pytest.raises(UserError, match=message):
        check_sources(Recipe.model_validate(values))
    values["distillation"]["intermediate_layer_pairs"] = [["decoder.layers.1", "decoder.layers.0"]]
    check_sources(Recipe.model_validate(values))


@pytest.mark.parametrize(
    ("pair", "heads", "message"),
    [
        ([2, 0], None, "attention_layer_pairs: layer 2 of the student: it has layers 0 to 1"),
        ([1, 4], None, "attention_layer_pairs: layer 4 of the teacher: it has layers 0 to 3"),
        ([1, 3], 5, "its 4 heads of 16 channels cannot be split into 5; set .* divisor of 64"),
    ],
)
def test_pairs_of_attentions_that_no_loss_can_compare(tiny_teacher, pair, heads, message) -> None:
    values = recipe(tiny_teacher).model_dump(mode="json")
    changed = {"attention_layer_pairs": [pair], "attention_relation_heads": heads}
    values["distillation"] |= changed
    with pytest.raises(UserError, match=message):
        check_sources(Recipe.model_validate(values))


GPU_ONLY = [
    ({"fp8": "hybrid"}, "training.fp8=hybrid"),
    ({"transformer_impl": "transformer_engine"}, "training.transformer_impl=transformer_engine"),
    ({"log_straggler": True}, "training.log_straggler=True"),
    (
        {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]},
        "training.recompute_modules=layernorm",
    ),
]


@pytest.mark.skipif(platform.HAS_GPU, reason="there is a GPU")
@pytest.mark.parametrize(("training", "message"), GPU_ONLY)
def test_what_only_a_gpu_can_do_is_refused_before_a_run(
    tiny_teacher: Path, training: dict[str, object], message: str
) -> None:
    values = recipe(tiny_teacher).model_dump(mode="json")
    values["training"] |= training
    whole = Recipe.model_validate(values)
    with pytest.raises(UserError, match=f"{message}: needs a GPU"):
        check_sources(whole)
    with pytest.raises(UserError, match=f"on this platform: {message}: needs a GPU"):
        check(load_platform("cpu-only"), whole)
    check(load_platform("gke-h100"), whole.model_copy(update={"resources": ONE_ACCELERATOR}))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"spec": "no.such:thing"}, "cannot import no.such"),
        ({"spec": "os:getcwd"}, "architecture.spec='os:getcwd': TypeError"),
        ({"num_experts": 3}, None),
    ],
)
def test_megatron_is_asked_about_a_student_from_scratch(
    tiny_teacher: Path, architecture: dict[str, object], message: str | None
) -> None:
    values = recipe(tiny_teacher).model_dump(mode="json")
    values["student"] = {"init": "scratch", "architecture": architecture}
    values["distillation"], values["export"] = {"loss": "none"}, {"format": "megatron"}
    whole = Recipe.model_validate(values)
    if message is None:
        check_sources(whole)
        return
    with pytest.raises(UserError, match=message):
        check_sources(whole)


def test_sequences_longer_than_the_teachers_positions(tiny_teacher: Path) -> None:
    values = recipe(tiny_teacher).model_dump(mode="json")
    values["data"]["seq_length"] = 100_000
    with pytest.raises(
        UserError, match=r"data\.seq_length=100000 is more than the teacher's max_pos"
    ):
        check_sources(Recipe.model_validate(values))


def test_good_sources_pass(tiny_teacher: Path) -> None:
    check_sources(recipe(tiny_teacher, num_layers=4))
    check_sources(recipe(tiny_teacher, init="scratch", num_layers=3))
    check_sources(of_a_model(tiny_teacher, tiny_teacher))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "student: model_type='gemma' is not supported"),
        ({"max_position_embeddings": 16}, "is more than the student's max_position_embeddings=16"),
        ({"num_key_value_heads": 3}, "student: num_attention_heads=4 is not divisible by"),
        ({"tokenizer": 1}, "its tokenizer is not that of .*: 2 tokens differ, first 'A'"),
    ],
)
def test_a_student_that_is_another_model(
    tiny_teacher: Path, tmp_path: Path, change: dict, message: str
) -> None:
    source = Path(shutil.copytree(tiny_teacher, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["head_dim"]
    if "tokenizer" in change:
        values = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        ids = values["model"]["vocab"]
        ids["A"], ids["B"] = ids["B"], ids["A"]
        (source / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    else:
        (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        check_sources(of_a_model(tiny_teacher, source))


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"num_layers": 5}, "num_layers=5: the teacher has only 4 layers"),
        ({"init": "scratch", "num_layers": 5}, "num_layers=5: the teacher has only 4 layers"),
        ({"keep_layers": [0, 4]}, r"keep_layers=\[0, 4\]: the teacher's layers are 0 to 3"),
        ({"init": "scratch", "num_attention_heads": 3}, "num_attention_heads=3 is not divisible"),
    ],
)
def test_a_student_that_does_not_fit_its_teacher(
    tiny_teacher: Path, student: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_sources(recipe(tiny_teacher, **student))


def test_missing_text(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt"):
        check_sources(recipe(tiny_teacher, tmp_path / "none.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(UserError, match="empty"):
        check_sources(recipe(tiny_teacher, empty))


def test_a_missing_teacher_ends_the_run_before_any_work(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match="no such folder"):
        run_recipe(recipe(tmp_path / "none"), runs)
    assert not (runs / "artifacts").exists()
    assert not (runs / "latest").exists()
