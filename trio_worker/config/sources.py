"""The three sources: a file, variables of the environment, `--set`. Each later one wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trio_worker.config import keys, strict_yaml
from trio_worker.config.catalogue import (
    KEYS,
    PATHS,
    VARIABLE_PREFIX,
    VARIABLES,
    did_you_mean,
    variable_of,
)
from trio_worker.config.keys import Key, quoted
from trio_worker.config.values import Values

_FILE_BYTES_MAX = 262_144


def read_file(path: Path, values: Values) -> None:
    """Take what the file holds; what is wrong with it is noted in `values`, as below."""
    try:
        tree = _tree_of(path, values)
    except _Unreadable as error:
        values.is_partial = True
        values.problems.append(f"{quoted(str(path))}: {error}")
        return
    for name in tree:
        if name != "cluster":
            values.complain(name, f"unknown key{did_you_mean(name)}")
    values.tree.update(tree)


def _tree_of(path: Path, values: Values) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_FILE_BYTES_MAX + 1)
        if len(text) > _FILE_BYTES_MAX:
            raise _Unreadable(f"is larger than {_FILE_BYTES_MAX} bytes")
        document = strict_yaml.parse(text)
    except OSError as error:
        raise _Unreadable(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise _Unreadable("is not a file name") from None
    except strict_yaml.NotYaml as error:
        raise _Unreadable(f"is not YAML as expected here: {error}") from None
    tree = document.value
    if not isinstance(tree, dict) or not tree:
        what = f"holds {keys.named(tree)}" if tree else "is empty"
        raise _Unreadable(f"{what}; expected a mapping with `cluster:` at its top")
    values.origins.update({key: f"{path}:{line}" for key, line in document.lines.items()})
    for key, first, second in document.repeated:
        values.problems.append(
            f"{quoted(key)}: written twice, in the lines {first} and {second} ({path}:{second})"
        )
    return tree


class _Unreadable(Exception):
    """The file as a whole is of no use."""


def read_variables(environ: Mapping[str, str], values: Values) -> None:
    """Lay the variables whose names begin with `TRIO_WORKER__` over what is there."""
    for name in sorted(environ):
        if not name.startswith(VARIABLE_PREFIX):
            continue
        key = VARIABLES.get(name)
        if key is not None:
            _override(key, environ[name], name, values)
            continue
        path = name.removeprefix(VARIABLE_PREFIX).lower().replace("__", ".")
        near = keys.nearest(path, KEYS)
        meant = f"; did you mean {variable_of(near)}?" if near else ""
        values.problems.append(f"{quoted(name)}: names no key of cluster.yaml{meant}")


def read_overrides(overrides: Sequence[str], values: Values) -> None:
    """Lay each `PATH=VALUE` over what is there."""
    for override in overrides:
        path, separator, text = override.partition("=")
        key = KEYS.get(path)
        if key is not None and separator:
            _override(key, text, f"--set {path}", values)
            continue
        if not separator:
            fault = "expected PATH=VALUE"
        elif path in PATHS:
            fault = "names a section; expected one of its keys"
        else:
            near = keys.nearest(path.removeprefix("cluster."), KEYS)
            fault = f"names no key{f'; did you mean {near}?' if near else ''}"
        values.problems.append(f"--set {quoted(path)}: {fault}")


def _override(key: Key, text: str, origin: str, values: Values) -> None:
    """Lay one value over what is there.

    Where text is wanted it counts as it stands, so that a password of digits needs no quotes
    inside the shell's; everything else is read as YAML.
    """
    value: object = text
    if key.is_text:
        if key.nullable and text in ("", "~", "null"):
            value = None
    else:
        try:
            value = strict_yaml.parse(text.encode("utf-8", "surrogatepass")).value
        except strict_yaml.NotYaml as error:
            values.problems.append(f"cluster.{key.path}: not YAML: {error} ({origin})")
            return
    values.put(f"cluster.{key.path}", value, origin)
