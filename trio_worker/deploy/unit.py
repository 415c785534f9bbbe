"""What a unit says, whatever starts it: how a worker of this installation is run and stopped.

Everything in a unit comes from the configuration and from where this environment is. Rules:

1. A unit holds no secret: not from the command line, and not from a file.
2. Every value is escaped for its place, or refused (`systemd`, `launchd`).
3. The times to start and to stop are above what the configuration allows the worker to take.
"""

from __future__ import annotations

import os
import pwd
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trio_worker.config import Config, all_keys, files_with_secrets
from trio_worker.errors import ConfigError

NAME = "trio-worker"
START_MARGIN_S = 90
"""Until the first word of the load; from there on the worker asks for the time it needs."""
STOP_MARGIN_S = 30
"""Beside the drain: the subscriptions, the engine's end, the last publications."""
_NAME = re.compile(r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*\Z")
_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - it is asked whether something is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What a unit says, whatever its format."""

    name: str
    config: Config
    command: tuple[str, ...]
    """Its first part, and every path in it, is absolute."""
    working_directory: str | None
    """Given if the configuration has paths that are relative to it."""
    paths: tuple[Path, ...]
    """What the worker has to read."""

    @property
    def start_s(self) -> int:
        return START_MARGIN_S + self.config.nats.connect_timeout_ms // 1000

    @property
    def stop_s(self) -> int:
        gateway, longest_ms = self.config.gateway, self.config.worker.drain_timeout_ms
        if gateway.port is not None:
            longest_ms = max(longest_ms, gateway.drain_timeout_ms)
        return STOP_MARGIN_S + -(-longest_ms // 1000)

    @property
    def memory_max_mb(self) -> int:
        critical_mb = self.config.worker.resource_limits.critical_memory_mb
        return critical_mb + max(1024, critical_mb // 4)


def make_unit(
    config: Config,
    *,
    config_file: Path | None,
    overrides: Sequence[str],
    engine: str,
    name: str = NAME,
) -> Unit:
    """What a unit for this environment says.

    Raises:
        ConfigError: for a secret among the overrides, a name that is none, or a path that no
            unit can hold.
    """
    if not _NAME.match(name):
        raise ConfigError(f"--name {name!r}: expected letters and digits, joined by . or -")
    _refuse_secrets(overrides)
    program = Path(sys.executable).with_name("trio-worker")
    lead = [str(program)] if program.exists() else [sys.executable, "-P", "-m", "trio_worker"]
    command = [*lead, "run"]
    if config_file is not None:
        command += ["--config", str(config_file.absolute())]
    for override in overrides:
        command += ["--set", override]
    if engine != "mlx":
        command += ["--engine", engine]
    for part in command:
        if not part.isprintable():
            raise ConfigError(f"{part!r}: what cannot be printed has no place in a unit")
    given = [Path(each) for each in _files(config)]
    relative = any(not each.is_absolute() for each in given)
    places = [Path(each) for each in (sys.prefix, sys.base_prefix, lead[0])]
    return Unit(
        name=name,
        config=config,
        command=tuple(command),
        working_directory=str(Path.cwd()) if relative else None,
        paths=(*places, *([config_file] if config_file else []), *given),
    )


def remarks(unit: Unit, *, is_system: bool, user: str | None) -> list[str]:
    """What will probably not work as printed, one sentence each."""
    if not is_system:
        return []
    found = [
        f"{path} is below {folder}, which PrivateTmp=yes hides from the service"
        for path in unit.paths
        for folder in _TEMPORARY
        if is_below(path, [folder])
    ]
    if user is None:
        loaded = files_with_secrets(unit.config.nats).values()
        found += [
            f"{path} cannot be read by the user that DynamicUser=yes makes; "
            "move it, or choose a user with --as"
            for path in unit.paths
            if str(path) not in loaded and not _is_open_to_all(path)
        ]
    return list(dict.fromkeys(found))


def user_of_process() -> str | None:
    """The name of the user who runs this; None for root, as whom no worker should run."""
    uid = os.getuid()
    return None if uid == 0 else pwd.getpwuid(uid).pw_name


def _refuse_secrets(overrides: Iterable[str]) -> None:
    secret = {key.path for key in all_keys() if key.secret}
    for override in overrides:
        path, _, value = override.partition("=")
        if path in secret:
            raise ConfigError(
                f"--set {path}: a secret has no place in a unit; put it into a file and name "
                f"that with {path}_file"
            )
        if path == "nats.url" and "@" in value:
            raise ConfigError(
                f"--set {path}: a login has no place in a unit; put it into a file and name that "
                "with nats.password_file or nats.token_file"
            )


def _files(config: Config) -> list[str]:
    """The files and folders that the configuration names."""
    found = list(files_with_secrets(config.nats).values())
    if config.nats.tls is not None:
        tls = config.nats.tls
        found += [each for each in (tls.ca_file, tls.cert_file) if each is not None]
    if config.gateway.port is not None and config.gateway.keys_file is not None:
        found.append(config.gateway.keys_file)
    if Path(config.worker.model).exists():
        found.append(config.worker.model)
    return found


def is_below(path: Path, folders: Iterable[str]) -> bool:
    places = (path.absolute(), path.resolve())
    return any(place.is_relative_to(folder) for place in places for folder in folders)


def _is_open_to_all(path: Path) -> bool:
    """Whether everybody may read it and pass through every folder above."""
    resolved = path.resolve()
    try:
        passable = all(each.stat().st_mode & 0o001 for each in resolved.parents)
        return passable and bool(resolved.stat().st_mode & 0o004)
    except OSError:
        return False
