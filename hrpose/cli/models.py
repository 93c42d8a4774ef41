"""`hrpose models`: what can be built, with the papers' figures beside the computed ones."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hrpose import published


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("models", help="list the networks with parameters and MACs, computed and as printed")
    parser.add_argument("--json", action="store_true", help="the same table as one JSON list")
    parser.add_argument("--markdown", action="store_true", help="the same table as the README shows it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    rows = published.table()
    if options.json:
        print(json.dumps(rows))
    else:
        print(published.markdown_table(rows) if options.markdown else published.format_table(rows))
