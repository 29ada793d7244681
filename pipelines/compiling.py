"""The pipeline as a file for Kubeflow: KFP's own format, or Kubernetes objects."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from flagscale.errors import UserError
from flagscale.recipe import Recipe, strict_yaml
from pipelines.distillation import build_pipeline
from pipelines.platform import Platform

# libyaml, where PyYAML has it, is ten times as fast.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def compile_recipe(recipe: Recipe, platform: Platform, output: Path) -> Path:
    """Write the pipeline with the recipe's and the platform's values as its defaults.

    Its `code_version` is the release, not a digest of the sources: on a cluster the image pins
    the code, and the file changes only when the pipeline does.

    Args:
        recipe: validated.
        platform: validated.
        output: a `.yaml` file, replaced if there is one.

    Raises:
        UserError: `output` has another suffix or cannot be written, the platform cannot hold the
            training, or an image's name is wrong.
    """
    pipeline = build_pipeline(recipe, platform)
    with _writing(output):
        compiler.Compiler().compile(pipeline, str(output))
        _rewrite(output, f"{_origin(recipe)}: upload it in the KFP UI.")
    return output


def compile_manifests(
    recipe: Recipe, platform: Platform, output: Path, namespace: str | None = None
) -> Path:
    """Write the pipeline as Kubernetes objects: a Pipeline, and a PipelineVersion of it.

    Args:
        recipe: validated.
        platform: validated.
        output: a `.yaml` file, replaced if there is one.
        namespace: of the objects; None: whichever they are applied to.

    Raises:
        UserError: `output` has another suffix or cannot be written, the platform cannot hold the
            training, or an image's name is wrong.
    """
    version = pipeline_version(compile_recipe(recipe, platform, output))
    pipeline = build_pipeline(recipe, platform)
    options = KubernetesManifestOptions(
        pipeline_name=pipeline_name(recipe),
        pipeline_display_name=f"Distillation: {recipe.name}",
        pipeline_version_name=f"{pipeline_name(recipe)}-{version}",
        namespace=namespace,
        include_pipeline_manifest=True,
    )
    with _writing(output):
        compiler.Compiler().compile(
            pipeline,
            str(output),
            kubernetes_manifest_format=True,
            kubernetes_manifest_options=options,
        )
        _rewrite(output, f"{_origin(recipe)}: kubectl apply -f it.")
    return output


def pipeline_name(recipe: Recipe) -> str:
    """Under which name a cluster keeps the recipe's pipeline."""
    return f"distillation-{recipe.name}"


def pipeline_version(compiled: Path) -> str:
    """A name for what a compiled file says: another pipeline, another name.

    A version on a cluster cannot be changed, so equal files are the same version and need no new
    one.
    """
    return hashlib.sha256(compiled.read_bytes()).hexdigest()[:12]


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Make the file's folder, and explain why the file cannot be written."""
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"output {output}: must end in .yaml")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise UserError(f"output {output}: cannot be written ({why})") from error


def _origin(recipe: Recipe) -> str:
    return f"{recipe.name}, made by `python -m pipelines compile`"


def _rewrite(output: Path, heading: str) -> None:
    """Write it anew, with quotes wherever a reader might miss them.

    Without KFP's opening comment, which lists defaults in an order that varies by process.
    """
    documents = list(yaml.load_all(output.read_text(encoding="utf-8"), LOADER))
    body = yaml.dump_all(documents, Dumper=strict_yaml.Dumper, sort_keys=True)
    output.write_text(f"# {heading}\n{body}", encoding="utf-8")
