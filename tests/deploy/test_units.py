"""`trio-worker unit`: what is printed is valid, says what the configuration says, and no secret."""

from __future__ import annotations

import getpass
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.commands import command, command_here

from trio_worker.config import load_config
from trio_worker.deploy.launchd import launchd_plist
from trio_worker.deploy.systemd import systemd_unit, systemd_user_unit
from trio_worker.deploy.unit import STOP_MARGIN_S, Unit, make_unit, remarks
from trio_worker.errors import ConfigError

ANALYZE = shutil.which("systemd-analyze")
STRANGE = "a b%n$HOME&<x>é;"
STRANGER = f"{STRANGE}'\\\"q"
SECRET = "hunter2-hunter2"


def unit_of(*overrides: str, config_file: Path | None = None, **options: Any) -> Unit:
    config = load_config(
        config_file, environ={}, overrides=overrides, hostname="host", read_secrets=False
    )
    return make_unit(
        config,
        config_file=config_file,
        overrides=overrides,
        engine=options.pop("engine", "mlx"),
        **options,
    )


def settings(text: str) -> dict[str, list[str]]:
    """The values of each key of a systemd unit."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and line[0] not in "#[":
            key, separator, value = line.partition("=")
            assert separator, line
            found.setdefault(key, []).append(value)
    return found


def words(value: str) -> list[str]:
    """As systemd.syntax(7) splits a value; its quotes and escapes used here are the shell's."""
    return [word.replace("%%", "%") for word in shlex.split(value)]


def verify(text: str, folder: Path, *, user: bool = False) -> str:
    """What systemd itself has to say about a unit; nothing is good."""
    path = folder / "trio-worker.service"
    path.write_text(text)
    assert ANALYZE is not None, "these tests need systemd-analyze"
    done = subprocess.run(
        [ANALYZE, *(["--user"] if user else []), "verify", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
    )
    said = done.stderr + done.stdout
    return said or (f"status {done.returncode}" if done.returncode else "")


@pytest.fixture(name="strange")
def strange_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation at a place whose name has everything that might need an escape."""
    folder = tmp_path / STRANGE
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "trio-worker"):
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    (folder / STRANGER).mkdir()
    text = "cluster: {worker: {drain_timeout_ms: 90500}}"
    (folder / "cluster.yaml").write_text(text)
    (folder / STRANGER / "cluster.yaml").write_text(text)
    monkeypatch.chdir(folder)
    return folder


# --- systemd --------------------------------------------------------------------------------


@pytest.mark.systemd
@pytest.mark.parametrize("user", [None, "root", getpass.getuser()])
def test_systemd_has_nothing_to_say_about_the_unit(user: str | None, tmp_path: Path) -> None:
    assert verify(systemd_unit(unit_of(), user=user), tmp_path) == ""


@pytest.mark.systemd
def test_systemd_has_nothing_to_say_about_the_unit_of_a_user(tmp_path: Path) -> None:
    assert verify(systemd_user_unit(unit_of()), tmp_path, user=True) == ""


@pytest.mark.systemd
def test_systemd_would_say_what_is_wrong(tmp_path: Path) -> None:
    text = systemd_unit(unit_of(), user=None)
    assert "Unknown key" in verify(text.replace("WatchdogSec=", "WatchdogSeconds="), tmp_path)
    missing = text.replace("bin/trio-worker run", "bin/nothing-here run")
    assert "nothing-here" in verify(missing, tmp_path)


@pytest.mark.systemd
def test_systemd_finds_a_program_at_a_strange_place(strange: Path, tmp_path: Path) -> None:
    unit = unit_of(
        "worker.model=bin",
        "nats.user=u",
        f"nats.password_file={strange}/secret",
        config_file=Path(STRANGER) / "cluster.yaml",
    )
    assert unit.command[0].startswith(str(strange))
    assert verify(systemd_unit(unit, user=None), tmp_path) == ""
    assert verify(systemd_user_unit(unit), tmp_path, user=True) == ""


def test_every_word_arrives_as_it_was(strange: Path) -> None:
    unit = unit_of(
        "worker.prewarm.prompt=50 % of $x \\ done;", config_file=Path(STRANGER) / "cluster.yaml"
    )
    for text in (systemd_unit(unit, user=None), systemd_user_unit(unit)):
        (line,) = settings(text)["ExecStart"]
        program, *arguments = words(line)
        # The colon says that a dollar sign is no variable.
        assert program == f":{strange}/bin/trio-worker"
        assert arguments == [
            *("run", "--config", f"{strange}/{STRANGER}/cluster.yaml"),
            *("--set", "worker.prewarm.prompt=50 % of $x \\ done;"),
        ]


def test_without_the_script_the_interpreter_is_started(
    strange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (strange / "bin" / "trio-worker").unlink()
    assert unit_of(engine="simulated").command == (
        *(f"{strange}/bin/python", "-P", "-m", "trio_worker"),
        *("run", "--engine", "simulated"),
    )


@pytest.mark.parametrize("user", [None, "somebody"])
def test_times_and_memory_follow_the_configuration(user: str | None) -> None:
    unit = unit_of(
        "worker.drain_timeout_ms=90500",
        "nats.connect_timeout_ms=40000",
        "worker.resource_limits.critical_memory_mb=40000",
    )
    found = settings(systemd_unit(unit, user=user))
    assert found["TimeoutStopSec"] == [str(91 + STOP_MARGIN_S)]
    assert int(found["TimeoutStartSec"][0]) > 40
    assert found["MemoryMax"] == ["50000M"]
    assert found["Type"] == ["notify"]
    assert found["NotifyAccess"] == ["main"]
    assert found["KillMode"] == ["mixed"]
    assert found["Restart"] == ["on-failure"]
    assert found["RestartPreventExitStatus"] == ["78"]
    assert found["OOMPolicy"] == ["continue"]
    assert "MemoryDenyWriteExecute" not in found
    assert found.get("User", found.get("DynamicUser")) == [user or "yes"]


def test_a_stop_may_take_as_long_as_the_drain_of_the_gateway_beside_the_worker() -> None:
    longer = "gateway.drain_timeout_ms=90500"
    assert unit_of(longer).stop_s == 30 + STOP_MARGIN_S
    assert unit_of(longer, "gateway.port=8000").stop_s == 91 + STOP_MARGIN_S


def test_the_file_of_keys_is_among_what_the_service_has_to_read() -> None:
    keys = Path("/etc/trio-worker/keys")
    given = f"gateway.keys_file={keys}"
    assert keys in unit_of(given, "gateway.port=8000").paths
    assert keys not in unit_of(given).paths


def test_a_small_limit_leaves_room_for_the_worker_itself() -> None:
    unit = unit_of(
        "worker.resource_limits.max_memory_mb=100", "worker.resource_limits.critical_memory_mb=200"
    )
    assert unit.memory_max_mb == 1224


@pytest.mark.parametrize(
    ("prefix", "expected"), [("/home/me/env", "read-only"), ("/opt/trio-worker", "yes")]
)
def test_homes_can_be_read_only_where_the_worker_lies_in_one(
    prefix: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", f"{prefix}/bin/python")
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert settings(systemd_unit(unit_of(), user=None))["ProtectHome"] == [expected]


def test_models_are_kept_where_the_service_may_write() -> None:
    found = settings(systemd_unit(unit_of(name="second"), user=None))
    assert found["CacheDirectory"] == ["second"]
    variables = dict(word.split("=", 1) for value in found["Environment"] for word in words(value))
    assert variables["TRIO_WORKER_CACHE"] == "%C/second"
    assert variables["HF_HOME"].startswith("%C/second/")
    assert found["StateDirectory"] == ["second"]
    assert variables["XDG_DATA_HOME"] == "%S/second"


def test_relative_paths_mean_the_same_in_the_service(strange: Path) -> None:
    relative = unit_of("worker.model=bin")
    for text in (systemd_unit(relative, user=None), systemd_user_unit(relative)):
        # A line of its own without quotes: only the percent sign needs an escape.
        assert settings(text)["WorkingDirectory"] == [str(strange).replace("%", "%%")]
    assert "WorkingDirectory" not in settings(systemd_unit(unit_of(), user=None))
    absolute = unit_of(f"worker.model={strange}/bin")
    assert "WorkingDirectory" not in settings(systemd_unit(absolute, user=None))


# --- secrets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        f"nats.token={SECRET}",
        f"nats.password={SECRET}",
        f"nats.url=nats://u:{SECRET}@localhost",
    ],
)
def test_a_secret_on_the_command_line_is_refused(override: str) -> None:
    config = load_config(None, environ={}, hostname="host")
    with pytest.raises(ConfigError) as caught:
        make_unit(config, config_file=None, overrides=[override], engine="mlx")
    assert SECRET not in str(caught.value)
    assert "_file" in str(caught.value)


def test_the_secrets_of_files_are_handed_over_by_systemd(strange: Path) -> None:
    (strange / "secret").write_text(SECRET)
    (strange / "cluster.yaml").write_text(
        "cluster: {nats: {user: u, password_file: secret, tls: {cert_file: c, key_file: k}}}"
    )
    unit = unit_of("nats.user=v", config_file=Path("cluster.yaml"))
    text = systemd_unit(unit, user=None)
    found = settings(text)
    folder = str(strange).replace("%", "%%")
    assert found["LoadCredential"] == [
        f"password-file:{folder}/secret",
        f"key-file:{folder}/k",
    ]
    assert "TRIO_WORKER__NATS__PASSWORD_FILE=%d/password-file" in found["Environment"]
    assert "TRIO_WORKER__NATS__TLS__KEY_FILE=%d/key-file" in found["Environment"]
    assert SECRET not in text + systemd_user_unit(unit) + launchd_plist(unit, home=Path("/h"))
    # A user's own manager leaves the files where they are.
    assert "LoadCredential" not in settings(systemd_user_unit(unit))


def test_a_file_from_the_command_line_gives_way_to_the_credential() -> None:
    unit = unit_of("nats.token_file=/etc/token", "worker.id=w1")
    assert words(settings(systemd_unit(unit, user=None))["ExecStart"][0])[1:] == [
        *("run", "--set", "worker.id=w1"),
    ]
    assert "nats.token_file=/etc/token" in systemd_user_unit(unit)


def test_without_secrets_a_comment_says_how() -> None:
    text = systemd_unit(unit_of(), user=None)
    assert "LoadCredential" not in settings(text)
    assert re.search(r"^#LoadCredential=password-file:", text, re.MULTILINE)


# --- launchd --------------------------------------------------------------------------------


def plist(unit: Unit, home: str = "/Users/me") -> dict[str, Any]:
    text = launchd_plist(unit, home=Path(home))
    for comment in re.findall(r"<!--(.*?)-->", text, re.DOTALL):
        assert "--" not in comment, "XML allows no two hyphens inside a comment"
    loaded: dict[str, Any] = plistlib.loads(text.encode())
    return loaded


def test_the_plist_reads_back_as_what_was_meant(strange: Path) -> None:
    unit = unit_of("worker.model=bin", config_file=Path("cluster.yaml"))
    job = plist(unit, home=f"/Users/{STRANGE}")
    assert job["ProgramArguments"] == list(unit.command)
    assert job["ProgramArguments"][:4] == [
        *(f"{strange}/bin/trio-worker", "run", "--config", f"{strange}/cluster.yaml"),
    ]
    assert job["WorkingDirectory"] == str(strange)
    assert job["Label"] == "trio-worker"
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["ExitTimeOut"] == 91 + STOP_MARGIN_S
    assert job["ProcessType"] == "Interactive"
    assert job["StandardErrorPath"] == f"/Users/{STRANGE}/Library/Logs/trio-worker.log"


def test_the_plist_of_a_second_worker_has_its_own_label_and_log() -> None:
    job = plist(unit_of(name="second.one"))
    assert job["Label"] == "second.one"
    assert job["StandardOutPath"].endswith("/second.one.log")


@pytest.mark.parametrize("name", ["", "a b", "a--b", "../x", "x\n", "-x", "a/b"])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        unit_of(name=name)


def test_what_systemd_does_not_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("it's", 'a"b', "a\\b"):
        monkeypatch.setattr(sys, "executable", str(tmp_path / name / "python"))
        for printed in (systemd_user_unit, lambda unit: systemd_unit(unit, user=None)):
            with pytest.raises(ConfigError, match="a quote in its path"):
                printed(unit_of())
        assert plist(unit_of())["ProgramArguments"][0] == str(tmp_path / name / "python")


def test_what_no_unit_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError):
        unit_of("worker.prewarm.prompt=two\nlines")


# --- what is said beside the unit, and the command ------------------------------------------


def said(*overrides: str, user: str | None = None) -> Sequence[str]:
    return remarks(unit_of(*overrides), is_system=True, user=user)


def test_what_a_made_up_user_cannot_read_is_said(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    assert any(f"{closed} cannot be read" in each for each in said(f"worker.model={closed}"))
    assert not any("cannot be read" in each for each in said(user="me"))


def test_what_a_private_tmp_hides_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/tmp/env")
    assert any("/tmp/env" in each and "PrivateTmp" in each for each in said(user="me"))


def configuration_with_a_secret(folder: Path) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(
        f"cluster: {{nats: {{user: u, password: {SECRET}}}, worker: {{drain_timeout_ms: 1000}}}}"
    )
    return path


async def test_the_command_prints_a_unit_and_nothing_else_to_standard_output(
    tmp_path: Path,
) -> None:
    path = configuration_with_a_secret(tmp_path)
    env = {"TRIO_WORKER__WORKER__DRAIN_TIMEOUT_MS": "2000000"}
    system = await command("unit", "systemd", "--config", str(path), "--as", "me", env=env)
    assert system.returncode == 0
    found = settings(system.stdout.decode())
    assert found["User"] == ["me"]
    # The variable is of this shell, not of the service; and that is said.
    assert found["TimeoutStopSec"] == ["31"]
    assert b"TRIO_WORKER__WORKER__DRAIN_TIMEOUT_MS is set here" in system.stderr
    assert SECRET.encode() not in system.stdout + system.stderr


def test_each_manager_gets_its_own_format_and_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configuration_with_a_secret(tmp_path)
    assert command_here("unit", "systemd", "--user", "--config", str(path)) == 0
    user = capsys.readouterr()
    assert settings(user.out)["WantedBy"] == ["default.target"]
    assert command_here("unit", "launchd", "--config", str(path), "--name", "other") == 0
    mac = capsys.readouterr()
    assert plistlib.loads(mac.out.encode())["Label"] == "other"
    assert SECRET not in user.out + user.err + mac.out + mac.err


def test_the_command_refuses_a_bad_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_here("unit", "systemd", "--set", "worker.drain_timeout_ms=soon") == 78
    assert capsys.readouterr().out == ""
