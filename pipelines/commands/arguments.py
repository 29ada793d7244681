"""Arguments that several commands take, in the same words."""

import argparse
from pathlib import Path

from flagscale.recipe import Recipe, load_recipe

DEFAULT_RECIPE = Path("recipes/smollm2-135m-to-22-layers.yaml")


def new_command(
    commands: argparse._SubParsersAction, name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    """A command's parser.

    Args:
        commands: of the main parser.
        name: of the command.
        text: one line for the list of commands.
        examples: shown below the options.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe, and what of it is changed."""
    parser.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        default=DEFAULT_RECIPE,
        help="a YAML file (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change a field of the recipe; may be repeated",
    )


def add_platform(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """The platform that a pipeline is made for; without a default it must be named."""
    suffix = " (default: %(default)s)" if default else ""
    parser.add_argument(
        "--platform",
        default=default,
        required=default is None,
        metavar="NAME|FILE",
        help=f"what the cluster has: a name in recipes/platforms/, or a YAML file{suffix}",
    )


def add_runs(parser: argparse.ArgumentParser) -> None:
    """The folder of all local runs."""
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)"
    )


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with its changes.

    Raises:
        UserError: it is missing or wrong.
    """
    return load_recipe(arguments.recipe, arguments.overrides)
