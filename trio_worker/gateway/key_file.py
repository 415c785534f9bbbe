"""The file of keys, read again when it has changed."""

from __future__ import annotations

import os
from pathlib import Path

import trio
from loguru import logger

from trio_worker.errors import ConfigError
from trio_worker.gateway.keys import Keys, parse_keys

LOOK_EVERY_S = 1.0
_BYTES_MAX = 2**20


class KeyFile:
    """Its state: the keys, and which version of the file they are from."""

    def __init__(self, path: str | None) -> None:
        """Reads the file; without one everybody is let in. Raises `ConfigError`."""
        self._path = None if path is None else Path(path)
        self._version: tuple[int, ...] = ()
        self._looked_at = -LOOK_EVERY_S
        self._keys = Keys()
        if self._path is not None:
            try:
                self._version = _version(self._path)
                self._keys = _read(self._path)
            except OSError as exc:
                raise ConfigError(f"gateway.keys_file: {path!r} cannot be read: {exc}") from exc

    def keys(self) -> Keys:
        """Those of now: the file is looked at once a second at most, while somebody asks.

        One that cannot be read, or is wrong, changes nothing but the log.
        """
        now = trio.current_time()
        if self._path is None or now < self._looked_at + LOOK_EVERY_S:
            return self._keys
        self._looked_at = now
        try:
            version = _version(self._path)
            if version == self._version:
                return self._keys
            self._version = version
            self._keys = _read(self._path)
        except OSError as exc:
            logger.error("The keys cannot be read again: {}; those of before hold", exc.strerror)
        except ConfigError as exc:
            logger.error("The keys are wrong: {}; those of before hold", exc)
        else:
            logger.info("Read {} keys again", len(self._keys.keys))
        return self._keys


def _version(path: Path) -> tuple[int, ...]:
    status = os.stat(path)  # noqa: PTH116 - one call, and no object
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> Keys:
    with path.open("rb") as file:
        text = file.read(_BYTES_MAX + 1)
    if len(text) > _BYTES_MAX:
        raise ConfigError(f"gateway.keys_file: it has more than {_BYTES_MAX} bytes")
    return parse_keys(text.decode("utf-8", "replace"), name="gateway.keys_file")
