"""Commands: `python -m pipelines run`, `plan`, `compile`, `submit`, ...; `--help` teaches."""

import argparse
import logging
import sys
from collections.abc import Callable

from flagscale.errors import UserError
from flagscale.secrets import mask_output
from pipelines.cluster.connection_errors import StoppedWaiting
from pipelines.commands import compare, compile, doctor, plan, run, schedule, status, submit
from pipelines.local.stopping import Stopped
from pipelines.outcome import StepFailed

_COMMANDS = (run, doctor, plan, compile, submit, schedule, status, compare)
_EXAMPLES = """examples:
  python -m pipelines run recipes/smollm2-135m-to-22-layers.yaml
      distil on this machine; results in runs/latest

  python -m pipelines compile recipes/smollm2-135m-to-22-layers.yaml --platform gke-h100
      write the pipeline for a cluster; upload the file in the KFP UI

  python -m pipelines COMMAND --help
      what a command takes, with examples
"""


def main(argv: list[str] | None = None) -> int:
    """Parse and do; the exit code is `ended`'s."""
    arguments = _parser().parse_args(argv)
    return ended(lambda: arguments.work(arguments))


def ended(work: Callable[[], str]) -> int:
    """Do the work and print what it says, or else its error as the last line.

    Returns:
        0; 1 when a step failed; 2 for something the user can put right; 130 or 143 when stopped
        by Ctrl-C or SIGTERM.
    """
    mask_output()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    try:
        print(work())
    except UserError as error:
        return _last_word(f"error: {error}", 2)
    except StepFailed as error:
        return _last_word(f"error: {error}", 1)
    except Stopped as stop:
        return _last_word(f"{stop}; the same command goes on from there", stop.exit_code)
    except StoppedWaiting as stop:
        return _last_word(str(stop), 130)
    except KeyboardInterrupt:
        return _last_word("stopped before any work", 130)
    return 0


def _last_word(text: str, exit_code: int) -> int:
    sys.stdout.flush()
    print(text, file=sys.stderr)
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines",
        description="Distil a teacher into a smaller student, here or on Kubeflow.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
