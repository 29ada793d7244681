"""Commands: `python -m pipelines run|compile|compare`; `--help` shows examples."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from flagscale.errors import UserError
from flagscale.recipe import load_recipe
from pipelines.comparison import compare_with_baseline
from pipelines.compiling import compile_recipe
from pipelines.local import StepFailed, run_recipe
from pipelines.stopping import Stopped
from pipelines.summary import summary

_EXAMPLES = """examples:
  python -m pipelines run recipes/smollm2-135m-to-10-layers.yaml
      distil on this machine; results in runs/latest

  python -m pipelines run recipes/tiny.yaml --set distillation.temperature=2
      the same with another temperature: data, teacher and conversion come from the cache

  python -m pipelines compile recipes/smollm2-135m-to-10-layers.yaml -o distillation.yaml
      write the pipeline for Kubeflow; upload the file in its UI

  python -m pipelines compare recipes/tiny.yaml
      its newest run beside the newest with `--set distillation.loss=none`

environment:
  MLFLOW_TRACKING_URI   tracking server of `run`; default: a file in the runs folder
  FLAGSCALE_IMAGE       container image of the compiled steps
"""


def main(argv: list[str] | None = None) -> int:
    """Parse and do; the exit code is `ended`'s."""
    arguments = _parser().parse_args(argv)

    def work() -> str:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.command == "compile":
            return f"wrote {compile_recipe(recipe, arguments.output)}"
        if arguments.command == "compare":
            return compare_with_baseline(recipe, arguments.runs)
        return summary(run_recipe(recipe, arguments.runs, reuse=arguments.reuse))

    return ended(work)


def ended(work: Callable[[], str]) -> int:
    """Do the work and print what it says, or else its error as the last line.

    Returns:
        0; 1 when a step failed; 2 for something the user can put right; 130 or 143 when stopped
        by Ctrl-C or SIGTERM.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    try:
        print(work())
    except UserError as error:
        return _last_word(f"error: {error}", 2)
    except StepFailed as error:
        return _last_word(f"error: {error}", 1)
    except Stopped as stop:
        return _last_word(f"{stop}; the same command goes on from there", stop.exit_code)
    except KeyboardInterrupt:
        return _last_word("stopped before any work", 130)
    return 0


def _last_word(text: str, exit_code: int) -> int:
    sys.stdout.flush()
    print(text, file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m pipelines",
        description="Distil a teacher into a smaller student, here or on Kubeflow.",
        epilog=_EXAMPLES,
        formatter_class=shape,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="run the pipeline on this machine", epilog=_EXAMPLES, formatter_class=shape
    )
    run.add_argument(
        "--no-cache",
        dest="reuse",
        action="store_false",
        help="repeat every step, and the training from its beginning",
    )
    compiled = commands.add_parser(
        "compile", help="write the pipeline for Kubeflow", epilog=_EXAMPLES, formatter_class=shape
    )
    compiled.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("pipelines/compiled/distillation.yaml"),
        help="file to write (default: %(default)s)",
    )
    compared = commands.add_parser(
        "compare",
        help="a run beside the same training without a teacher",
        epilog=_EXAMPLES,
        formatter_class=shape,
    )
    for command in (run, compared):
        command.add_argument(
            "--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)"
        )
    for command in (run, compiled, compared):
        command.add_argument(
            "recipe",
            type=Path,
            nargs="?",
            default=Path("recipes/smollm2-135m-to-10-layers.yaml"),
            help="a YAML file (default: %(default)s)",
        )
        command.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="SECTION.FIELD=VALUE",
            help="change a field of the recipe; may be repeated",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
