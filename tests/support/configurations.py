"""What tests of the configuration load, and what they look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trio_worker.config import Config, load_config
from trio_worker.errors import ConfigError

DEFAULTS = load_config(None, environ={}, hostname="host")
Load = Callable[..., Config]


@pytest.fixture(name="load")
def load_fixture(tmp_path: Path) -> Load:
    """Load a text as the file, which is then named `cluster.yaml` in messages."""

    def load_text(
        text: str | bytes, *overrides: str, read_secrets: bool = True, **environ: str
    ) -> Config:
        path = tmp_path / "cluster.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            return load_config(
                path,
                environ=environ,
                overrides=overrides,
                hostname="host",
                read_secrets=read_secrets,
            )
        except ConfigError as error:
            shortened = [each.replace(str(path), "cluster.yaml") for each in error.problems]
            raise ConfigError(*shortened) from None

    return load_text


def problems_of(loading: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loading()
    return list(caught.value.problems)


def problems_if_any(loading: Callable[[], object]) -> list[str]:
    try:
        loading()
    except ConfigError as error:
        return list(error.problems)
    return []


def tree_with(path: str, value: object) -> dict[str, Any]:
    """A file's content with one value in it."""
    for name in reversed(["cluster", *path.split(".")]):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def value_at(loaded: Config, path: str) -> object:
    value: object = loaded
    for name in path.split("."):
        value = getattr(value, name)
    return value


SECRET = "hunter2-hunter2"


def secret_file(tmp_path: Path, content: bytes = f"{SECRET}\n".encode()) -> str:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(0o600)
    return str(path)
