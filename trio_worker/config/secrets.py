"""The files that hold what NATS is logged in to with."""

from __future__ import annotations

import stat
from pathlib import Path

import msgspec

from trio_worker.config.keys import shown
from trio_worker.config.sections import Config, NatsConfig
from trio_worker.config.values import Values

_SECRET_BYTES_MAX = 4_096


def files_with_secrets(nats: NatsConfig) -> dict[str, str]:
    """The files that are given to log in with, by the paths of their keys."""
    names = ("password_file", "token_file", "credentials_file", "nkey_seed_file")
    files = {f"nats.{name}": getattr(nats, name) for name in names}
    if nats.tls is not None:
        files["nats.tls.key_file"] = nats.tls.key_file
    return {path: file for path, file in files.items() if file is not None}


def is_in_file(nats: NatsConfig, name: str) -> bool:
    """Whether `password` or `token` comes from a file of its own."""
    return getattr(nats, f"{name}_file") is not None


def is_readable_by_all(file: str) -> bool:
    try:
        return bool(Path(file).stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def with_secrets(config: Config, values: Values, faulty: set[str]) -> Config:
    """With the contents of `password_file` and `token_file`, unless these keys are `faulty`.

    What is wrong with the files is noted in `values`.
    """
    found: dict[str, str] = {}
    for name in ("password", "token"):
        path = f"cluster.nats.{name}_file"
        file: str | None = getattr(config.nats, f"{name}_file")
        if file is None or path in faulty:
            continue
        try:
            found[name] = _secret_in(file)
        except _Unusable as error:
            values.complain(path, f"{shown(file)} {error}; expected a file with the {name}")
    nats = msgspec.structs.replace(config.nats, **found)
    return msgspec.structs.replace(config, nats=nats)


def _secret_in(file: str) -> str:
    """What the file holds, without the newline at its end."""
    try:
        with Path(file).open("rb") as opened:
            line = opened.read(_SECRET_BYTES_MAX + 3)
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from None
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if not line:
        raise _Unusable("is empty")
    if len(line) > _SECRET_BYTES_MAX:
        raise _Unusable(f"is longer than {_SECRET_BYTES_MAX} bytes")
    try:
        secret = line.decode()
    except UnicodeDecodeError:
        raise _Unusable("is not text in UTF-8") from None
    if not secret.isprintable():
        raise _Unusable("holds more than one line, or what cannot be printed")
    return secret


class _Unusable(Exception):
    """The file holds no secret."""
