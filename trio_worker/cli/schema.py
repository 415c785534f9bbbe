"""`trio-worker schema`: the JSON Schema of cluster.yaml, for editors."""

from __future__ import annotations

import argparse
import json
import sys

from trio_worker.cli.arguments import Commands
from trio_worker.config import json_schema
from trio_worker.errors import ExitStatus


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("schema", help="print the JSON Schema of cluster.yaml")
    parser.set_defaults(command=_schema)


def _schema(_args: argparse.Namespace) -> int:
    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")
    return ExitStatus.OK
