"""A platform file that is accepted gives parameters that its first step takes, and compiles."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings

from flagscale.errors import UserError
from flagscale.recipe import load_recipe, parse_section
from flagscale.run_values import check_run
from pipelines import form
from pipelines.distillation import build_pipeline
from pipelines.placement import check
from pipelines.platform import Platform
from tests.flagscale.recipe.nasty import Change, changed, changes_of

RECIPE = load_recipe("recipes/tiny.yaml")
BASE = yaml.safe_load(Path("recipes/platforms/gke-h100.yaml").read_text(encoding="utf-8"))


@given(changes_of(Platform))
@settings(max_examples=150)
def test_a_platform_is_refused_by_name_or_its_first_step_takes_it(changes: list[Change]) -> None:
    try:
        platform = parse_section(Platform, changed(BASE, changes), where="platform")
        check(platform, RECIPE)
        parameters = form.parameters(RECIPE, platform, "1")
    except UserError as error:
        str(error).encode()
        return
    given = {parameter.name: parameter.default for parameter in parameters}
    made = form.made(RECIPE, platform, list(given))
    checked = check_run(made, given)
    assert checked == {name: given[name] for name in checked}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("shared", {"url": "s3://a b/x"}, "names the bucket 'a b'"),
        ("shared", {"url": "s3://bucket/a?b"}, "holds '?'"),
        (
            "shared",
            {"url": "s3://bucket" + "/" + "/".join(["x" * 200] * 4)},
            "must be no longer than",
        ),
        ("env", {"A": "{{x}}"}, "must not hold {{, which Argo replaces"),
        ("env", {"A": "a\0"}, "the character 0"),
        ("run_as_user", 2**31, "less than or equal to 2147483647"),
        ("steps", {"data": {"memory": "10000Ei"}}, "must be 1Ei or less"),
        ("steps", {"data": {"cpu": "0.0001"}}, "must be whole thousandths"),
        ("steps", {"data": {"cpu": "9" * 20}}, "must be no more than 65536"),
        ("steps", {"data": {"labels": {"a" * 254 + "/b": "c"}}}, "no more than 253 characters"),
        ("steps", {"data": {"retries": {"backoff": "9999999999s"}}}, "should match pattern"),
        ("steps", {"data": {"retries": {"count": True}}}, "must be a number, not true"),
        ("images", {"cpu": "a/" * 200 + "b"}, "must be no longer than 255 characters"),
    ],
)
def test_what_a_cluster_would_refuse_late(path: str, value: object, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_section(Platform, changed({}, [((path,), value)]), where="platform")
    assert said in str(error.value)


def test_borders_compile() -> None:
    values = {
        "env": {"A": "$(B) 'x' \n é"},
        "steps": {"data": {"node_selector": {"a": "y", "b": "7e2"}, "memory": "1Ei", "cpu": "1m"}},
        "shared": {"url": "az://container@account.dfs.core.windows.net/a b/$(HOME)"},
    }
    platform = parse_section(Platform, values, where="platform")
    parameters = build_pipeline(RECIPE, platform).pipeline_spec.root.input_definitions.parameters
    place = parameters["training_checkpoints"].default_value.string_value
    assert place.endswith("/a b/$\\u0028HOME)/checkpoints/tiny")
