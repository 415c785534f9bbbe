"""Real nats-servers for tests: `from nats_fixtures import NatsServer, running_server`.

A machine without the program fails these tests; it does not skip them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trio_worker.nats.embedded_server import find_nats_server


class NatsServer:
    """One nats-server on a port of its own, which it keeps over restarts."""

    def __init__(
        self, *, config: str = "", extra: tuple[str, ...] = (), jetstream: bool = False
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nats-"))
        self.port = 0
        """The kernel's choice at the first start."""
        (self.folder / "nats.conf").write_text(config)
        self._command = [
            *(find_nats_server(), "-a", "127.0.0.1"),
            *("-c", str(self.folder / "nats.conf"), "--ports_file_dir", str(self.folder)),
            *extra,
        ]
        if jetstream:
            self._command += ["-js", "-sd", str(self.folder / "store")]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it takes connections; that takes about 10 ms."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "-p", str(self.port or -1)], stdout=log, stderr=log
            )
        ports = self.folder / f"nats-server_{self._process.pid}.ports"
        give_up = time.monotonic() + 10
        while True:
            try:
                if urls := json.loads(ports.read_text()).get("nats"):
                    self.port = int(urls[0].rpartition(":")[2])
                    return
            except (FileNotFoundError, ValueError):
                pass
            if self._process.poll() is not None or time.monotonic() > give_up:
                pytest.fail(f"nats-server did not start: {(self.folder / 'log').read_text()}")
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        if number is signal.SIGSTOP:
            # Returns once the last of its threads has stopped.
            os.waitpid(self._process.pid, os.WUNTRACED)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def running_server(
    *, config: str = "", extra: tuple[str, ...] = (), jetstream: bool = False
) -> Iterator[NatsServer]:
    server = NatsServer(config=config, extra=extra, jetstream=jetstream)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(name="nats_url", scope="session")
def nats_url_fixture() -> Iterator[str]:
    """A server shared by all tests that do nothing to it; use `fresh_subject` there."""
    with running_server() as server:
        yield server.url


@pytest.fixture(name="private_server")
def private_server_fixture() -> Iterator[NatsServer]:
    """A server for a test that stops, kills or restarts it."""
    with running_server() as server:
        yield server


def fresh_subject() -> str:
    return f"test.{uuid.uuid4().hex[:12]}"
