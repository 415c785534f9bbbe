"""An agent for launchd."""

from __future__ import annotations

import plistlib
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from trio_worker.deploy.unit import Unit


def launchd_plist(unit: Unit, *, home: Path) -> str:
    """An agent of one user, for ~/Library/LaunchAgents."""
    log = str(home / "Library" / "Logs" / f"{unit.name}.log")
    tools = [str(Path(unit.command[0]).parent), "/opt/homebrew/bin", "/usr/local/bin"]
    job: dict[str, Any] = {
        "Label": unit.name,
        "ProgramArguments": list(unit.command),
        "EnvironmentVariables": {"PATH": ":".join([*tools, "/usr/bin:/bin:/usr/sbin:/sbin"])},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": unit.stop_s,
        "ProcessType": "Interactive",
        "StandardOutPath": log,
        "StandardErrorPath": log,
        "Umask": 0o077,
    }
    if unit.working_directory is not None:
        job["WorkingDirectory"] = unit.working_directory
    declaration, doctype, rest = plistlib.dumps(job, sort_keys=False).decode().split("\n", 2)
    notes = (files(__package__) / "launchd-notes.txt").read_text(encoding="utf-8")
    comment = f"<!--\n{Template(notes).substitute(name=unit.name)}-->"
    return f"{declaration}\n{doctype}\n{comment}\n{rest}"
