"""Every key there is, by its path and by its variable."""

from __future__ import annotations

from trio_worker.config import keys
from trio_worker.config.keys import Key
from trio_worker.config.sections import Config

VARIABLE_PREFIX = "TRIO_WORKER__"


def all_keys() -> tuple[Key, ...]:
    """Every key, in the order of the file; their paths begin below `cluster`."""
    return tuple(KEYS.values())


def variable_of(path: str) -> str:
    """The environment variable that sets the key at `path`."""
    return VARIABLE_PREFIX + path.replace(".", "__").upper()


ROOT = keys.describe(Config)
KEYS = {key.path: key for key in ROOT.leaves()}
PATHS = (*KEYS, *(section.path for section in ROOT.sections() if section.path))
"""Of keys and of sections."""
VARIABLES = {variable_of(path): key for path, key in KEYS.items()}


def did_you_mean(written: str) -> str:
    """The end of a message about an unknown path: the nearest one there is, if one is near."""
    near = keys.nearest(written.removeprefix("."), PATHS)
    return f"; did you mean cluster.{near}?" if near else ""
