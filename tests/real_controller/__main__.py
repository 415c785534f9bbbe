"""A worker and the real controller of mlx-serving, through what happens to both.

    just try-controller checkout=FOLDER [engine=mlx]

FOLDER is a checkout of mlx-serving, as seen from the repository, with its packages `nats`,
`express`, `cors`, `ws`, `zod`, `yaml` and `tsx`; it needs Node 20. Elsewhere than on a Mac they are
installed in an empty folder, whose `node_modules` is linked into the checkout. All else is started
here, on free ports. Prints what came.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from support.nats_fixtures import running_server
from support.paths import REPOSITORY
from support.ports import free_port

MODEL = "smollm2-135m-instruct"
PATIENCE_S = 120.0


class Reply(NamedTuple):
    status: object
    text: str
    after_s: float

    @property
    def tokens(self) -> int:
        return self.text.count('"delta"')

    def __str__(self) -> str:
        return f"{self.status} {self.text.strip()}"


@dataclass
class Cluster:
    """What runs, and how it is started again."""

    checkout: Path
    engine: str
    nats_url: str
    folder: Path
    api: str = field(default_factory=lambda: f"http://127.0.0.1:{free_port()}")
    monitoring: str = field(default_factory=lambda: f"http://127.0.0.1:{free_port()}")

    def start_controller(self) -> subprocess.Popen[bytes]:
        config = self.folder / "cluster.yaml"
        config.write_text(
            json.dumps(
                {
                    "mode": "controller",
                    "nats": {"mode": "external", "serverUrl": self.nats_url, "reconnect": True},
                    "controller": {
                        "enabled": True,
                        "bindAddress": "127.0.0.1",
                        "port": _port(self.api),
                    },
                    "discovery": {
                        "enabled": True,
                        "heartbeatIntervalMs": 5000,
                        "offlineTimeoutMs": 15_000,
                    },
                }
            )
        )
        process = self._start(
            "env", f"CLUSTER_CONFIG={config}", "node", "--import", "tsx",
            "scripts/start-controller.ts", log="controller", folder=self.checkout,
        )  # fmt: skip
        until(lambda: fetch(self.api + "/health") is not None)
        return process

    def start_worker(self, name: str = "one", others: int = 0) -> subprocess.Popen[bytes]:
        """Return when the controller has it online, beside `others`."""
        monitoring = _port(self.monitoring) if name == "one" else free_port()
        process = self._start(
            sys.executable, "-m", "trio_worker", "run", "--engine", self.engine,
            "--set", f"nats.url={self.nats_url}", "--set", "nats.embedded=never",
            "--set", f"worker.id={name}", "--set", "nats.dialects=[native, mlx-serving]",
            "--set", f"worker.monitoring.port={monitoring}",
            log="worker", folder=REPOSITORY,
        )  # fmt: skip
        until(lambda: [m["status"] for m in self.members()] == ["online"] * (1 + others))
        return process

    def _start(self, *program: str, log: str, folder: Path) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(program, cwd=folder, stdout=file, stderr=file)

    def members(self) -> list[dict[str, Any]]:
        return fetch(self.api + "/api/cluster/workers") or []

    def in_flight(self) -> int:
        return int(fetch(self.monitoring + "/stats")["requests"]["in_flight"])

    def ask(self, content: str = "Say hello.", *, wait_s: float = 30.0, **more: Any) -> Reply:
        fields = {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}
        request = urllib.request.Request(
            self.api + "/v1/chat/completions",
            json.dumps(fields).encode(),
            {"content-type": "application/json"},
        )
        began_at = time.monotonic()
        text = ""
        status: object
        try:
            with urllib.request.urlopen(request, timeout=wait_s) as answer:
                status = answer.status
                for line in answer:
                    text += line.decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        except (OSError, ValueError) as error:
            status = type(error).__name__
        return Reply(status, text, time.monotonic() - began_at)

    def ask_many(self, count: int, at_a_time: int, **fields: Any) -> list[Reply]:
        with ThreadPoolExecutor(at_a_time) as threads:
            replies = list(threads.map(lambda _: self.ask(**fields), range(count)))
        statuses = dict(Counter(str(each.status) for each in replies))
        slowest_s = max(each.after_s for each in replies)
        say(f"{count} requests, {at_a_time} at a time: {statuses}, the slowest {slowest_s:.2f} s")
        return replies

    @contextmanager
    def stream_in_background(self, wait_s: float) -> Iterator[list[Reply]]:
        """A long answer is under way in the block; it is in the list behind it."""
        replies: list[Reply] = []

        def ask() -> None:
            replies.append(self.ask("Count.", max_tokens=400, stream=True, wait_s=wait_s))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: self.in_flight() == 1)
        time.sleep(1)
        yield replies
        thread.join()


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def fetch(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def until(holds: Callable[[], bool], *, within_s: float = PATIENCE_S) -> float:
    """Return after how many seconds it has come to hold."""
    began_at = time.monotonic()
    while not holds():
        if time.monotonic() - began_at > within_s:
            raise TimeoutError
        time.sleep(0.02)
    return time.monotonic() - began_at


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def kill(process: subprocess.Popen[bytes]) -> None:
    """With its children."""
    for each in psutil.Process(process.pid).children(recursive=True):
        each.kill()
    process.kill()
    process.wait()


def stop_under_load(cluster: Cluster, worker: subprocess.Popen[bytes]) -> None:
    replies: list[Reply] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            replies.append(cluster.ask(max_tokens=8))

    threads = [threading.Thread(target=keep_asking) for _ in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    worker.terminate()
    took_s = until(lambda: worker.poll() is not None)
    time.sleep(0.5)
    is_over.set()
    for thread in threads:
        thread.join()
    say(f"exit {worker.returncode} after {took_s:.2f} s; members: {len(cluster.members())}")
    for (status, text), count in Counter(
        (each.status, "" if each.status == 200 else each.text) for each in replies
    ).items():
        say(f"{count} times {status} {text}")


def try_all(cluster: Cluster) -> None:
    some = 300 if cluster.engine == "simulated" else 60
    controller, worker = cluster.start_controller(), cluster.start_worker()
    say("# a member")
    say(json.dumps(cluster.members()[0]))
    say("# an answer, one that is streamed, an option that is wrong, a model that nobody has")
    say(cluster.ask(max_tokens=8))
    say(cluster.ask(max_tokens=4, stream=True))
    say(cluster.ask(max_tokens=0))
    say(cluster.ask(model="other"))
    say("# errors at once")
    cluster.ask_many(300, 20, max_tokens=0)
    say("# answers of one token")
    cluster.ask_many(some, 20, max_tokens=1)
    say("# streams of eight tokens")
    replies = cluster.ask_many(some // 3, 10, max_tokens=8, stream=True)
    ended = sum("[DONE]" in each.text for each in replies)
    say(f"tokens: {dict(Counter(each.tokens for each in replies))}, with [DONE]: {ended}")
    say("# SIGTERM under load, ten callers at a time")
    stop_under_load(cluster, worker)
    say("# the same of one of two workers")
    worker, second = cluster.start_worker(), cluster.start_worker("two", others=1)
    stop_under_load(cluster, worker)
    second.terminate()
    second.wait()
    worker = cluster.start_worker()
    say("# the worker is killed in mid-stream, and started again")
    with cluster.stream_in_background(wait_s=4) as cut:
        kill(worker)
        killed_at = time.monotonic()
    say(f"the caller got {cut[0].tokens} tokens, no [DONE], and hung until it gave up")
    until(lambda: cluster.members()[0]["status"] == "offline")
    say(f"offline {time.monotonic() - killed_at:.0f} s after the kill; then: {cluster.ask()}")
    worker = cluster.start_worker()
    say(f"started again: {cluster.ask(max_tokens=4).status}")
    say("# the controller is killed in mid-stream, and started again")
    with cluster.stream_in_background(wait_s=10):
        controller.kill()
        freed_s = until(lambda: cluster.in_flight() == 0)
    say(f"the worker has ended the request {freed_s:.2f} s after the kill")
    controller = cluster.start_controller()
    known_s = until(lambda: bool(cluster.members()))
    say(f"{known_s:.1f} s after its start it knows the worker: {cluster.ask(max_tokens=4).status}")
    worker.terminate()
    worker.wait()
    say(f"# the worker stops: exit {worker.returncode}, members: {len(cluster.members())}")
    controller.terminate()
    controller.wait()


def main() -> None:
    options = dict(each.split("=", 1) for each in sys.argv[1:])
    checkout = (REPOSITORY / options["checkout"]).resolve()
    engine = options.get("engine", "simulated")
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(checkout, engine, server.url, Path(folder))
        try:
            try_all(cluster)
        finally:
            for each in psutil.Process().children(recursive=True):
                if each.name() != "nats-server":
                    each.kill()


if __name__ == "__main__":
    main()
