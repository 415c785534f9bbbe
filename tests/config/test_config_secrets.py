"""Secrets and the files they come from: in no message, and read where they are needed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from support.configurations import (
    SECRET,
    Load,
    load_fixture,  # noqa: F401 - a fixture
    problems_of,
    secret_file,
)

from trio_worker import config


@pytest.mark.parametrize(
    "text",
    [
        f"cluster: {{nats: {{password: [{SECRET}]}}}}",
        f"cluster: {{nats: {{password: {SECRET}}}}}",
        f"cluster: {{nats: {{token: {SECRET}{'x' * 5000}}}}}",
        f"cluster: {{nats: {{passwrd: {SECRET}}}}}",
        f"cluster: {{password: {SECRET}}}",
        f"cluster: {{nats: {{password: !{SECRET} x}}}}",
        f"cluster: {{nats: {{password: !{SECRET}!x}}}}",
        f"cluster: {{nats: {{password: *{SECRET}}}}}",
        f"cluster: {{nats: {{password: &{SECRET} x}}}}",
        f"cluster: {{nats: {{password: {SECRET}, password: {SECRET}}}}}",
        f"cluster: {{nats: {{url: 'http://u:{SECRET}@host'}}}}",
        f"cluster: {{nats: {{url: 'u:{SECRET}@host'}}}}",
        f"cluster: {{nats: {{url: 'nats://u:{SECRET}@host:x'}}}}",
        f"cluster: {{nats: {{url: 'nats://u:{SECRET}@{'x' * 5000}'}}}}",
        f"cluster: {{nats: {{url: ['nats://u:{SECRET}@host']}}}}",
        f"cluster: {{nats: {{url: 'nats://u:{SECRET}@host', token: x}}}}",
        f'cluster: {{nats: {{password: "{SECRET}',
    ],
)
def test_a_secret_is_in_no_message(load: Load, text: str) -> None:
    assert SECRET not in "\n".join(problems_of(lambda: load(text)))


def test_a_secret_is_in_no_repr(load: Load) -> None:
    by_user = load(f"cluster: {{nats: {{user: u, password: {SECRET}}}}}")
    by_token = load(f"cluster: {{nats: {{token: {SECRET}}}}}")
    by_url = load(f"cluster: {{nats: {{url: 'nats://u:{SECRET}@host:4222'}}}}")
    for loaded in (by_user, by_token, by_url):
        assert SECRET not in f"{loaded!r} {loaded} {loaded.nats!r}"
        assert SECRET not in repr(loaded.nats.__rich_repr__())
        assert SECRET in msgspec.json.encode(loaded).decode()


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_comes_from_its_file(tmp_path: Path, load: Load, end: str) -> None:
    file = secret_file(tmp_path, f" {SECRET} ü ".encode() + end.encode())
    by_user = load("cluster: {nats: {user: u}}", f"nats.password_file={file}")
    by_token = load("cluster: {}", f"nats.token_file={file}")
    assert by_user.nats.password == f" {SECRET} ü "
    assert by_user.nats.token is None
    assert by_token.nats.token == f" {SECRET} ü "
    assert by_token.nats.password is None
    for loaded in (by_user, by_token):
        assert SECRET not in f"{loaded!r} {loaded.nats!r}"
        assert config.warnings_about(loaded, total_memory_bytes=16 * 2**30) == []


def test_a_secret_is_left_in_its_file_for_who_does_not_need_it(load: Load) -> None:
    path = "/nowhere/secret"
    loaded = load(f"cluster: {{nats: {{token_file: {path}}}}}", read_secrets=False)
    assert loaded.nats.token is None
    assert config.files_with_secrets(loaded.nats) == {"nats.token_file": path}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\r\n", "is empty"),
        (SECRET.encode() + b"\n\n", "more than one line"),
        (SECRET.encode() + b"\nother", "more than one line"),
        (SECRET.encode() + b"\0", "cannot be printed"),
        (SECRET.encode() + b"\xff", "not text in UTF-8"),
        (SECRET.encode() * 1000, "longer than 4096 bytes"),
        (b"x" * 4095 + "ü".encode() * 99, "longer than 4096 bytes"),
        (None, "No such file"),
    ],
)
@pytest.mark.parametrize("name", ["password", "token"])
def test_a_file_without_a_secret_is_named_with_its_key(
    tmp_path: Path, load: Load, name: str, content: bytes | None, words: str
) -> None:
    file = str(tmp_path / "missing") if content is None else secret_file(tmp_path, content)
    beside = ["nats.user=u"] if name == "password" else []
    (problem,) = problems_of(
        lambda: load("cluster: {worker: {}}", *beside, f"nats.{name}_file={file}")
    )
    assert problem.startswith(f"cluster.nats.{name}_file: ")
    assert words in problem
    assert file[:60] in problem, "what is long is cut"
    assert problem.endswith(f"(--set nats.{name}_file)")
    assert SECRET not in problem


def test_a_folder_in_the_place_of_a_secret_is_named(tmp_path: Path, load: Load) -> None:
    (problem,) = problems_of(lambda: load("cluster: {worker: {}}", f"nats.token_file={tmp_path}"))
    assert "directory" in problem


def test_a_secret_that_everybody_can_read_is_warned_about(tmp_path: Path, load: Load) -> None:
    path = Path(secret_file(tmp_path))
    for name in ("token_file", "credentials_file", "nkey_seed_file"):
        loaded = load("cluster: {worker: {}}", f"nats.{name}={path}")
        path.chmod(0o640)
        assert config.warnings_about(loaded, total_memory_bytes=16 * 2**30) == []
        path.chmod(0o644)
        (warning,) = config.warnings_about(loaded, total_memory_bytes=16 * 2**30)
        assert warning.startswith(f"cluster.nats.{name}: ")
        assert str(path) in warning
        assert SECRET not in warning
