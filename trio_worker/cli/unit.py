"""`trio-worker unit`: what starts a worker of this installation as a service."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from functools import partial
from pathlib import Path

from trio_worker.cli.arguments import Commands, add_config, add_engine
from trio_worker.config import VARIABLE_PREFIX, load_config
from trio_worker.deploy.launchd import launchd_plist
from trio_worker.deploy.systemd import systemd_unit, systemd_user_unit
from trio_worker.deploy.unit import NAME, make_unit, remarks, user_of_process
from trio_worker.errors import ExitStatus


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "unit", help="print a unit that runs a worker of this installation as a service"
    )
    managers = parser.add_subparsers(required=True, metavar="MANAGER")
    for manager, text in (
        ("systemd", "a unit for systemd, on Linux"),
        ("launchd", "an agent for launchd, on macOS"),
    ):
        each = managers.add_parser(manager, help=text)
        add_config(each)
        each.add_argument(
            "--name",
            default=NAME,
            help=f"of the service ({NAME}); each worker on a machine needs its own",
        )
        add_engine(each)
        each.set_defaults(command=partial(_unit, manager))
        if manager == "systemd":
            _add_whose(each)


def _add_whose(parser: argparse.ArgumentParser) -> None:
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--user", action="store_true", help="a service of your own manager, without root"
    )
    whose.add_argument(
        "--as",
        dest="run_as",
        metavar="USER",
        help="whom the machine's manager runs it as (you; for root, a user made for it)",
    )


def _unit(manager: str, args: argparse.Namespace) -> int:
    # As the service will find it: without this shell's variables, and without its secrets.
    config = load_config(
        args.config,
        environ={},
        overrides=args.overrides,
        hostname=socket.gethostname(),
        read_secrets=False,
    )
    unit = make_unit(
        config,
        config_file=args.config,
        overrides=args.overrides,
        engine=args.engine,
        name=args.name,
    )
    is_system = manager == "systemd" and not args.user
    user = (args.run_as or user_of_process()) if is_system else None
    if is_system:
        text = systemd_unit(unit, user=user)
    elif manager == "systemd":
        text = systemd_user_unit(unit)
    else:
        text = launchd_plist(unit, home=Path.home())
    sys.stdout.write(text)
    for name in sorted(os.environ):
        if name.startswith(VARIABLE_PREFIX):
            sys.stderr.write(f"note: {name} is set here and will not be set in the service\n")
    for remark in remarks(unit, is_system=is_system, user=user):
        sys.stderr.write(f"note: {remark}\n")
    return ExitStatus.OK
