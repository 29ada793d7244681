"""Single values; those that a command line gives are in tests/pipelines/cluster."""

import pytest

from flagscale.errors import UserError
from flagscale.run_values import PlatformFacts
from flagscale.run_values.values import check_checkpoints, check_value

FACTS = {"images": {}, "accelerator_counts": {}}
VOLUME = PlatformFacts(mount_path="/mnt/flagscale", **FACTS)
TRAINJOB = VOLUME.model_copy(update={"uses_trainjob": True})
BUCKET = PlatformFacts(url="s3://bucket/distillation", **FACTS)
NEITHER = PlatformFacts(**FACTS)
ANY_FOLDER = "must be a folder of the pods, from / on"
ON_VOLUME = "must be a folder below /mnt/flagscale, or a URL of an object store; any other folder"
ON_NODES = "must be a folder below /mnt/flagscale, which all nodes of a TrainJob see"


@pytest.mark.parametrize(
    ("platform", "place", "said"),
    [
        (VOLUME, "foo://x", "a URL must start with s3://, gs:// or az://, and name a bucket"),
        (VOLUME, "s3://", "a URL must start with"),
        (VOLUME, "/tmp/x", ON_VOLUME),
        (VOLUME, "/mnt/flagscale/../other", ON_VOLUME),
        (VOLUME, "/mnt/flagscale-2/x", ON_VOLUME),
        (TRAINJOB, "s3://b/x", ON_NODES),
        (TRAINJOB, "/tmp/x", ON_NODES),
        (NEITHER, "foo://x", "a URL must start with"),
        (NEITHER, "x", ANY_FOLDER),
        (BUCKET, "/tmp/x", "must be a URL of an object store; a folder is lost with its pod"),
    ],
)
def test_checkpoints_that_pods_would_lose_or_not_find(
    platform: PlatformFacts, place: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_checkpoints(place, platform)
    assert str(caught.value).startswith(f"parameter training_checkpoints={place}: {said}")


@pytest.mark.parametrize(
    ("platform", "place"),
    [
        (VOLUME, "/mnt/flagscale/mine"),
        (VOLUME, "gs://bucket/mine"),
        (TRAINJOB, "/mnt/flagscale/a/../b"),
        (NEITHER, "/tmp/x"),  # where the default lies too
        (NEITHER, "az://container/mine"),
        (BUCKET, "s3://other/mine"),
    ],
)
def test_checkpoints_that_outlive_their_pod(platform: PlatformFacts, place: str) -> None:
    check_checkpoints(place, platform)


@pytest.mark.parametrize("key", ["tracking_experiment", "distillation_temperature"])
def test_what_may_be_empty(key: str) -> None:
    check_value(key, "")
    with pytest.raises(UserError, match="where_code_version: is empty"):
        check_value("where_code_version", "")


@pytest.mark.parametrize("key", ["tracking_experiment", "where_code_version", "training_lr"])
def test_credentials_are_refused_and_not_shown(key: str) -> None:
    with pytest.raises(UserError, match=rf"parameter {key}=https://\*\*\*@host: holds") as error:
        check_value(key, "https://me:planted@host")
    assert "planted" not in str(error.value)
