"""`hrpose recipe`: what a training run by a recipe would use, as a TOML file that `hrpose train --config` reads."""

from __future__ import annotations

import argparse
from typing import Any

from hrpose.cli.arguments import add_recipe_flags, recipe_from
from hrpose.train.recipe import RECIPES


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("recipe", help="print a training recipe as TOML, for `hrpose train --config`")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(RECIPES)} (default dpn)")
    add_recipe_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    print(recipe_from(options, options.name).to_toml(), end="")
