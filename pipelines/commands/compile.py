"""`python -m pipelines compile`: the pipeline as a file for Kubeflow."""

import argparse
import re
from pathlib import Path

from flagscale.errors import UserError
from pipelines.commands.arguments import add_platform, add_recipe, new_command, read_recipe
from pipelines.compiling import compile_manifests, compile_recipe
from pipelines.planning import fitted
from pipelines.platform import load_platform
from pipelines.sources import notes

_EXAMPLES = """\
  python -m pipelines compile recipes/smollm2-135m-to-22-layers.yaml --platform gke-h100
      write build/smollm2-135m-to-22-layers-gke-h100.yaml; upload it in the KFP UI

  python -m pipelines compile mine.yaml --platform my-cluster.yaml -o mine-on-my-cluster.yaml

  python -m pipelines compile mine.yaml --format kubernetes --namespace ml -o objects.yaml
      for a KFP that keeps pipelines as Kubernetes objects: kubectl apply -f objects.yaml

environment:
  FLAGSCALE_REGISTRY    where the release's images were pushed
  FLAGSCALE_CPU_IMAGE, FLAGSCALE_GPU_IMAGE
                        whole names, where the platform file gives none; with a digest best
"""


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = new_command(commands, "compile", "write the pipeline for Kubeflow", _EXAMPLES)
    add_recipe(parser)
    add_platform(parser, default="cpu-only")
    parser.add_argument(
        "-o", "--output", type=Path, help="file to write (default: build/RECIPE-PLATFORM.yaml)"
    )
    parser.add_argument(
        "--format",
        choices=("ir", "kubernetes"),
        default="ir",
        help="ir: what the UI and clients upload; kubernetes: objects Pipeline and "
        "PipelineVersion (default: %(default)s)",
    )
    parser.add_argument("--namespace", help="of the objects; only with --format kubernetes")
    parser.set_defaults(work=work)


def work(arguments: argparse.Namespace) -> str:
    """Write the file, and say which."""
    platform = load_platform(arguments.platform)
    recipe, note = fitted(read_recipe(arguments), platform)
    name = f"{recipe.name}-{Path(arguments.platform).stem}.yaml"
    output = arguments.output or Path("build") / name
    namespace = arguments.namespace
    if namespace is not None and not re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", namespace):
        raise UserError(
            f"--namespace {namespace}: must be up to 63 lower-case letters, digits and inner dashes"
        )
    if arguments.format == "kubernetes":
        written = compile_manifests(recipe, platform, output, namespace)
        return f"{note}{notes(recipe, platform)}wrote {written}: kubectl apply -f {written}"
    if namespace is not None:
        raise UserError(
            f"--namespace {namespace}: only --format kubernetes writes a namespace; a "
            "client or the UI chooses it when the file is uploaded"
        )
    return f"{note}{notes(recipe, platform)}wrote {compile_recipe(recipe, platform, output)}"
