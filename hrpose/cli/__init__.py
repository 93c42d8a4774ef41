"""The command `hrpose`: one file per subcommand, each a thin layer over functions one can import."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hrpose.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake in what was given, 130 or 143 if interrupted."""
    import torch

    from hrpose.cli import ablate, bench, demo, doctor, evaluate, models, predict, recipe, train
    from hrpose.ranks import ErrorOfRank, is_first
    from hrpose.train.fit import Diverged
    from hrpose.train.stop import Interrupted

    parser = argparse.ArgumentParser(prog="hrpose", description="Human pose estimation: train, evaluate, predict.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, predict, train, recipe, evaluate, ablate, models, bench, doctor):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()  # here, where a closed pipe can be answered, and not when Python exits
    except InputError as error:
        if not isinstance(error, ErrorOfRank) and (is_first() or not isinstance(error, Diverged)):  # said once
            print(f"hrpose: error: {error}", file=sys.stderr)
        return 2
    except torch.cuda.OutOfMemoryError as error:
        advice = "a smaller batch needs less (--batch-size, in training --set batch_size=N)"
        print(f"hrpose: error: out of memory on the device; {advice}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        again = "the same command with --resume" if options.command == "train" else "the same command"
        if is_first():
            print(f"hrpose: {stop}; {again} goes on from here", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hrpose models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed when Python exits
        return 0
    return 0
