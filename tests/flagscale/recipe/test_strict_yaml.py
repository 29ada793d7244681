"""A key given twice is refused, where it stands; anchors and merge keys go on working."""

import pytest
import yaml

from flagscale.recipe import strict_yaml

MERGED = """
common: &common {cpu: 1, memory: 4Gi}
small: {<<: *common, memory: 1Gi}
both:
  <<: [*common, {cpu: 2, gpu: 1}]
  memory: 2Gi
again: *common
"""


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", "lr", 1, 3),
        ("training:\n  lr: 1\n  'lr': 3\n", "lr", 2, 3),
        ("steps: [{cpu: 1, cpu: 2}]", "cpu", 1, 1),
        ("1: a\n1: b\n", "1", 1, 2),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(
    text: str, key: str, first: int, second: int
) -> None:
    with pytest.raises(yaml.YAMLError) as error:
        strict_yaml.load(text)
    assert f"{key} is given twice, first in line {first};" in str(error.value)
    assert f"line {second}, column" in str(error.value)


def test_merge_keys_are_not_repeated_keys() -> None:
    assert strict_yaml.load(MERGED) == yaml.safe_load(MERGED)
    assert strict_yaml.load(MERGED)["both"] == {"cpu": 1, "gpu": 1, "memory": "2Gi"}


def test_one_key_in_two_mappings_is_fine() -> None:
    assert strict_yaml.load("a: {x: 1}\nb: {x: 2}\n1: c\n'1': d\n") == {
        "a": {"x": 1},
        "b": {"x": 2},
        1: "c",
        "1": "d",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("-1E5", -1e5), ("1.e+2", 100.0), ("12e4f7", "12e4f7"), ("'1e5'", "1e5")],
)
def test_exponents_are_numbers_as_in_json(text: str, value: object) -> None:
    assert strict_yaml.load(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [('"\\ud83d\\ude42"', "🙂"), ('{"\\ud83d\\ude42": [1]}', {"🙂": [1]}), ('"\\u00e9"', "é")],
)
def test_a_character_beyond_16_bits_may_be_written_as_json_does(text: str, value: object) -> None:
    assert strict_yaml.load(text) == value


@pytest.mark.parametrize(
    "text", ['"\\ud83d"', '"\\ude42\\ud83d"', "[" * 2000, "9" * 5000, "2026-13-45"]
)
def test_what_python_cannot_hold_is_no_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        strict_yaml.load(text)
