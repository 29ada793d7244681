"""Which attempts Argo repeats with the policy of deploy/, and with those that are there before."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.argo_retries import (
    CONFIG_MAP,
    DAG,
    KEY,
    KILLED,
    MISTAKE,
    OUT_OF_MEMORY,
    STOPPED,
    VANISHED,
    Attempt,
    ExpressionError,
    Policy,
    evaluate,
)
from tests.deploy.manifests import DEPLOY, documents, kustomization

COMPONENT = DEPLOY / "components" / "retry-policy"
PATCH = COMPONENT / "workflow-defaults.yaml"
# As KFP 2.17.0 installs it, shortened.
KFP = """\
apiVersion: v1
kind: ConfigMap
metadata:
  name: workflow-controller-configmap
data:
  artifactRepository: |
    archiveLogs: true
  workflowDefaults: |
    spec:
      templateDefaults:
        retryStrategy:
          limit: '2'
          retryPolicy: OnError
"""
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="patches are applied by kubectl, which is not here"
)


def defaults(strategy: str) -> dict[str, str]:
    return {KEY: f"spec: {{templateDefaults: {{retryStrategy: {strategy}}}}}"}


@pytest.fixture
def policy() -> Policy:
    [patch] = documents(PATCH)
    return Policy.read(patch["data"])


@pytest.mark.parametrize(
    ("attempt", "is_repeated"),
    [
        (VANISHED, True),
        (Attempt("Error", "1", "failed to save outputs"), True),
        (STOPPED, True),
        (KILLED, True),
        (OUT_OF_MEMORY, False),
        (MISTAKE, False),
        (Attempt("Failed", "-1", "Pod was active longer than specified deadline"), False),
        (Attempt("Failed", "255", "Error (exit code 255)"), False),
        (DAG, False),
    ],
)
def test_what_is_repeated(policy: Policy, attempt: Attempt, is_repeated: bool) -> None:
    assert policy.repeats(attempt) is is_repeated


def test_it_has_an_end_and_no_fault(policy: Policy) -> None:
    assert policy.limit == 2  # of the DAGs; a step's own count goes before it
    assert policy.faults() == []


@pytest.mark.parametrize(
    ("data", "faults"),
    [
        (None, ["a pod that vanished is not repeated", "out of memory is", "a mistake is rep"]),
        ({"executor": "imagePullPolicy: Always"}, ["vanished is not", "out of", "a mistake"]),
        (
            defaults("{limit: '2', retryPolicy: OnError}"),
            ["(143) is not repeated", "(137) is not repeated"],
        ),
        (
            defaults("{retryPolicy: Always}"),
            ["out of memory is repeated", "a mistake is repeated", "again, without end"],
        ),
        (
            defaults("{limit: '2', retryPolicy: Always}"),
            ["out of memory is repeated", "a mistake is repeated", "again, 2 times more"],
        ),
        (
            defaults("""{retryPolicy: Always, expression: 'lastRetry.status == "Error"'}"""),
            ["(143) is not", "(137) is not", "without end: there is no limit"],
        ),
    ],
)
def test_the_faults_of_what_kfp_has_or_had(data: dict[str, str] | None, faults: list[str]) -> None:
    found = Policy.read(data).faults()
    assert len(found) == len(faults), found
    for text, expected in zip(found, faults, strict=True):
        assert expected in text


@pytest.mark.parametrize(
    "typo",
    [
        ("lastRetry", "lastretry"),
        ("exitCode", "exitcode"),
        ("asInt(lastRetry.exitCode)", "lastRetry.exitCode"),
        ("[137, 143]", "[137, 142]"),
        ("||", "&&"),
        ("!(", "("),
        ("OOMKilled", "OOM Killed"),
        (" contains ", " in "),
        ('"Error"', "Error"),
    ],
)
def test_a_typo_in_the_expression_is_seen(policy: Policy, typo: tuple[str, str]) -> None:
    assert policy.expression
    assert typo[0] in policy.expression
    wrong = Policy(True, 2, policy.kinds, policy.expression.replace(*typo))
    with contextlib.suppress(ExpressionError):  # Argo would say so, in the run
        assert wrong.faults()


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ('true == false || "a" == "a"', None),  # there are no such names
        ('"a" == "a" || "a" == "b" && "a" == "b"', True),  # && binds more strongly
        ('("a" == "a" || "a" == "b") && "a" == "b"', False),
        ('!("ab" contains "b") == ("a" == "a")', False),
        ('asInt("-1") in [1, 2]', False),
        ('"a" == 1', None),
        ('"a" ==', None),
        ('"a"', None),
        ("a ? b : c", None),
    ],
)
def test_expressions_are_read_as_expr_lang_does(expression: str, value: bool | None) -> None:
    if value is None:
        with pytest.raises(ExpressionError):
            evaluate(expression, {})
    else:
        assert evaluate(expression, {}) is value


def test_the_patch_is_one_of_kfps_own_config_map() -> None:
    [patch] = documents(PATCH)
    assert (patch["kind"], patch["metadata"]) == ("ConfigMap", {"name": CONFIG_MAP})
    assert set(patch["data"]) == {KEY}, "the other keys stay KFP's"
    assert set(yaml.safe_load(patch["data"][KEY])["spec"]) == {"templateDefaults"}
    [named] = kustomization(COMPONENT)["patches"]
    assert named == {"path": PATCH.name, "target": {"kind": "ConfigMap", "name": CONFIG_MAP}}


@needs_kubectl
@pytest.mark.parametrize("namespace", ["kubeflow", None])
def test_the_component_changes_kfps_manifests(tmp_path: Path, namespace: str | None) -> None:
    (tmp_path / "kfp").mkdir()
    (tmp_path / "kfp" / "config.yaml").write_text(KFP)
    base = {"resources": ["config.yaml"]} | ({"namespace": namespace} if namespace else {})
    (tmp_path / "kfp" / "kustomization.yaml").write_text(yaml.safe_dump(base))
    shutil.copytree(COMPONENT, tmp_path / "retry-policy")
    (tmp_path / "mine").mkdir()
    overlay = {"resources": ["../kfp"], "components": ["../retry-policy"]}
    (tmp_path / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    _check_patched(["kubectl", "kustomize", str(tmp_path / "mine")])


@needs_kubectl
def test_one_command_changes_a_kfp_that_is_there(tmp_path: Path) -> None:
    there = tmp_path / "config.yaml"
    there.write_text(KFP)
    _check_patched(
        ["kubectl", "patch", f"-f={there}", "--local", "-oyaml", f"--patch-file={PATCH}"]
    )


def _check_patched(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    data = yaml.safe_load(done.stdout)["data"]
    assert set(data) == {"artifactRepository", KEY}
    assert Policy.read(yaml.safe_load(KFP)["data"]).faults()
    assert Policy.read(data).faults() == []
