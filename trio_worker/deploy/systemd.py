"""Units for systemd: of the machine's manager, and of a user's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from trio_worker.config import files_with_secrets, variable_of
from trio_worker.deploy.unit import Unit, is_below
from trio_worker.errors import ConfigError

WATCHDOG_S = 60
_HOMES = ("/home", "/root", "/run/user")


def systemd_unit(unit: Unit, *, user: str | None) -> str:
    """A service of the machine's manager, run as `user`; None: as a user made for it."""
    secrets = files_with_secrets(unit.config.nats)
    # These come from the manager instead, which may read what the user may not; a `--set` would
    # win over that.
    command = _without(unit.command, secrets)
    lines = [_secret_lines(path, Path(file).absolute()) for path, file in secrets.items()]
    hint = (
        "# A secret of NATS, from a file that only root can read:\n"
        "#LoadCredential=password-file:/etc/trio-worker/nats-password\n"
        "#Environment=TRIO_WORKER__NATS__PASSWORD_FILE=%d/password-file"
    )
    at_home = any(is_below(path, _HOMES) for path in unit.paths)
    return _filled(
        "system.service",
        _common(unit, command),
        user="DynamicUser=yes" if user is None else f"User={_specifiers(user)}",
        protect_home="read-only" if at_home else "yes",
        secrets="\n".join(lines) or hint,
    )


def systemd_user_unit(unit: Unit) -> str:
    """A service of a user's own manager, which has the user's files and rights."""
    return _filled("user.service", _common(unit, unit.command))


def _without(command: Sequence[str], paths: Iterable[str]) -> list[str]:
    """The command without the `--set` of these keys."""
    kept: list[str] = []
    for part in command:
        if kept and kept[-1] == "--set" and part.partition("=")[0] in paths:
            kept.pop()
        else:
            kept.append(part)
    return kept


def _filled(template: str, values: dict[str, str], **others: str) -> str:
    text = (files(__package__) / template).read_text(encoding="utf-8")
    filled = Template(text).substitute(values, **others)
    # A line that is not wanted is filled with nothing.
    return re.sub(r"\n{3,}", "\n\n", filled)


def _common(unit: Unit, command: Iterable[str]) -> dict[str, str]:
    folder = unit.working_directory
    return {
        "name": unit.name,
        # The colon: no variables are looked for, so a dollar sign is one.
        "command": " ".join(_quoted(part) for part in _with_colon(command)),
        "working_directory": f"WorkingDirectory={_specifiers(folder)}" if folder else "",
        "start_s": str(unit.start_s),
        "stop_s": str(unit.stop_s),
        "watchdog_s": str(WATCHDOG_S),
        "memory_max_mb": str(unit.memory_max_mb),
    }


def _with_colon(command: Iterable[str]) -> list[str]:
    program, *arguments = command
    if set(program) & set("\\\"'"):
        raise ConfigError(f"{program!r}: systemd starts no program with a quote in its path")
    return [f":{program}", *arguments]


def _secret_lines(path: str, file: Path) -> str:
    credential = path.rpartition(".")[2].replace("_", "-")
    return (
        f"LoadCredential={credential}:{_specifiers(str(file))}\n"
        f"Environment={variable_of(path)}=%d/{credential}"
    )


def _specifiers(text: str) -> str:
    """For a value that takes the whole line as it stands, but for specifiers."""
    if not text.isprintable() or text.endswith("\\") or text != text.strip():
        raise ConfigError(f"{text!r}: a name like this has no place in a unit")
    return text.replace("%", "%%")


def _quoted(word: str) -> str:
    """One word of a command line; see systemd.syntax(7) and systemd.service(5)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", escaped) else f'"{escaped}"'
