"""`schedule` against a real HTTP server that speaks KFP's API."""

import pytest

from pipelines.__main__ import main
from tests.pipelines.cluster.kfp_server import KfpServer

SCHEDULE = ["schedule", "recipes/tiny.yaml", "--platform", "cpu-only", "--cron", "0 0  2 * * *"]


def test_a_schedule_arrives_and_is_replaced_by_name(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SCHEDULE, "-ptraining.train_iters=40"]) == 0
    (first,) = kfp.schedules.values()
    (version,) = kfp.versions.values()
    assert first.display_name == "tiny on cpu-only"
    assert first.trigger.cron_schedule.cron == "0 0 2 * * *"
    assert (first.mode, first.max_concurrency, first.no_catchup) == ("ENABLE", "1", False)
    assert first.pipeline_version_reference.pipeline_version_id == version.pipeline_version_id
    assert first.runtime_config.parameters["training"]["train_iters"] == 40
    assert first.plugins_input == {"mlflow": {"experiment_name": "flagscale-distillation"}}
    said = capsys.readouterr().out
    assert f"{kfp.url}/#/recurringrun/details/{first.recurring_run_id}" in said

    again = ["--max-concurrency", "3", "--no-catchup", "--disable", "--no-cache"]
    assert main([*SCHEDULE, *again]) == 0
    (second,) = kfp.schedules.values()
    assert second.recurring_run_id != first.recurring_run_id
    assert (second.mode, second.max_concurrency, second.no_catchup) == ("DISABLE", "3", True)
    assert "enableCache" not in str(second.pipeline_spec)
    assert len(kfp.versions) == 1
    said = capsys.readouterr().out
    assert f"replaced schedule {first.recurring_run_id}" in said
    assert "switched off" in said

    assert main([*SCHEDULE, "--name", "other"]) == 0
    assert sorted(s.display_name for s in kfp.schedules.values()) == ["other", "tiny on cpu-only"]


def test_the_old_schedule_stays_when_the_new_one_is_refused(kfp: KfpServer) -> None:
    assert main(SCHEDULE) == 0
    kfp.failures = [("POST /apis/v2beta1/recurringruns", 500)]
    before = dict(kfp.schedules)
    assert main(SCHEDULE) == 2
    assert kfp.schedules == before


def test_another_pipelines_schedule_is_left_alone(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SCHEDULE, "--name", "nightly", "--pipeline-name", "other"]) == 0
    asked = len(kfp.written)
    assert main([*SCHEDULE, "--name", "nightly"]) == 2
    assert "choose another --name" in capsys.readouterr().err
    assert len(kfp.written) == asked


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--cron", "0 2 * * *"], "write '0 0 2 * * *'"),
        (["--max-concurrency", "11"], "must be 1 to 10"),
        (["-pnothing=1"], "the pipeline has none of this name"),
    ],
)
def test_mistakes_create_nothing(
    kfp: KfpServer, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert main([*SCHEDULE, *given]) == 2
    assert said in capsys.readouterr().err
    assert kfp.requests == []
