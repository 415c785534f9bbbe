"""From the sources to a `Config`; all problems of all sources are reported at once.

Rules:
 1. A `Config` that `load_config` returned is complete and consistent: nobody checks it again.
 2. Whatever the sources hold, `load_config` returns or raises `ConfigError`; nothing else.
 3. The values of secret keys appear in no message and in no repr.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trio_worker.config import keys
from trio_worker.config.catalogue import KEYS, ROOT, did_you_mean
from trio_worker.config.conflicts import RESERVED_IDS, conflicts
from trio_worker.config.keys import Key, Section, shown
from trio_worker.config.secrets import with_secrets
from trio_worker.config.sections import Config
from trio_worker.config.sources import read_file, read_overrides, read_variables
from trio_worker.config.values import Values
from trio_worker.errors import ConfigError


def load_config(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    hostname: str,
    read_secrets: bool = True,
) -> Config:
    """Read the file, lay variables and then `--set` over it, check and complete everything.

    Args:
        path: cluster.yaml; None for the defaults alone.
        environ: the environment; of it, the names that begin with `TRIO_WORKER__` count.
        overrides: `PATH=VALUE` each, the path beginning below `cluster`.
        hostname: what `worker.id` is derived from.
        read_secrets: whether `password` and `token` are taken from the files that are named for
            them; if not, they stay null.

    Raises:
        ConfigError: with every problem found, one sentence each.
    """
    loaded = load_with_sources(
        path, environ=environ, overrides=overrides, hostname=hostname, read_secrets=read_secrets
    )
    return loaded.config


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration, and who said what of it."""

    config: Config
    sources: Mapping[str, str]
    """Of each key that was given a value, by its path: `FILE:LINE`, the name of a variable, or
    `--set PATH`. All others have their default."""


def load_with_sources(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
    hostname: str,
    read_secrets: bool = True,
) -> Loaded:
    """As `load_config`, with where each value came from."""
    values = Values()
    if path is not None:
        read_file(path, values)
    read_variables(environ, values)
    read_overrides(overrides, values)
    faulty: set[str] = set()
    raw = _section(ROOT, values.tree.get("cluster"), "cluster", values, faulty)
    config = _complete(raw, hostname)
    if not values.is_partial:
        _note_conflicts(config, values, faulty)
    if read_secrets:
        config = with_secrets(config, values, faulty)
    if values.problems:
        raise ConfigError(*dict.fromkeys(values.problems))
    return Loaded(config=config, sources=_sources(values))


def _sources(values: Values) -> dict[str, str]:
    """Where the values in effect came from. Null is not one where something is derived from it."""
    derived = {f"cluster.{key.path}" for key in KEYS.values() if key.derived}
    return {
        path.removeprefix("cluster."): origin
        for path, origin in values.origins.items()
        if path not in derived or values.at(path) is not None
    }


def _note_conflicts(config: Config, values: Values, faulty: set[str]) -> None:
    """Complain of values that do not go together; they become `faulty`, as others are already."""
    disputed: set[str] = set()
    for paths, sentence in conflicts(config):
        concerned = [f"cluster.{each}" for each in paths]
        if not faulty.intersection(concerned):
            values.complain(concerned[0], sentence, beside=concerned[1:])
            disputed.update(concerned)
    faulty |= disputed


def _section(
    section: Section, given: object, path: str, values: Values, faulty: set[str]
) -> dict[str, Any]:
    """The section's values, defaults filled in; paths of values of no use go to `faulty`."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        values.complain(
            path,
            f"{shown(given)} is {keys.named(given)}; expected a section with "
            f"{', '.join(section.children)}",
        )
        faulty.update(f"cluster.{key.path}" for key in section.leaves())
        given = {}
    for name in given:
        if name not in section.children:
            values.complain(
                f"{path}.{name}", f"unknown key{did_you_mean(f'{section.path}.{name}')}"
            )
    result: dict[str, Any] = {}
    for name, child in section.children.items():
        inner = f"{path}.{name}"
        if isinstance(child, Key):
            result[name] = child.default
            if name in given:
                value, complaint = keys.check(child, given[name])
                if complaint is None:
                    result[name] = value
                else:
                    values.complain(inner, complaint)
                    faulty.add(inner)
        elif child.nullable and given.get(name) is None:
            result[name] = None
        else:
            result[name] = _section(child, given.get(name), inner, values, faulty)
    return result


def _complete(raw: dict[str, Any], hostname: str) -> Config:
    """Derive what was null, and make the sections."""
    worker: dict[str, Any] = raw["worker"]
    worker["id"] = worker["id"] or _derived_id(hostname)
    worker["model_name"] = worker["model_name"] or _derived_model_name(worker["model"])
    config: Config = msgspec.convert(raw, Config)
    return config


def _derived_id(hostname: str) -> str:
    name = _subject_token(hostname, otherwise="worker")
    return f"worker-{name}" if name in RESERVED_IDS else name


def _derived_model_name(model: str) -> str:
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return _subject_token(re.sub(r"\.gguf\Z", "", last, flags=re.IGNORECASE), otherwise="model")


def _subject_token(text: str, *, otherwise: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:64].strip("-") or otherwise
