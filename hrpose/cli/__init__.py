"""The command `hrpose`: one file per subcommand, each a thin layer over functions one can import."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hrpose.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake in what was given, 130 or 143 when interrupted."""
    from hrpose.cli import demo, doctor, evaluate, models, predict, train
    from hrpose.train.fit import Interrupted

    parser = argparse.ArgumentParser(prog="hrpose", description="Human pose estimation: train, evaluate, predict.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, predict, train, evaluate, models, doctor):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"hrpose: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"hrpose: {stop}; the same command with --resume goes on from here", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hrpose models | head`
        sys.stderr.close()
        return 0
    return 0
