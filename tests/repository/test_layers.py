"""Who may import whom: the rules of docs/architecture.md, read off the source.

Imports inside functions and below `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.paths import PACKAGE

PLUMBING = {"core", "errors", "ports", "protocol"}
EVERYTHING = {
    *PLUMBING,
    *("bench", "calling", "cli", "client", "client_asyncio", "config", "deploy"),
    *("exception_groups", "flow", "gateway", "http", "launch", "launch_gateway", "launch_nats"),
    *("grammar", "jetstream", "logs", "machine", "markup"),
    *("monitoring", "nats"),
    *("simulated", "stages", "supervisor", "wire", "worker"),
}
"""All but the engine process."""
MAY_IMPORT: dict[str, set[str]] = {
    # unit (a module of the top level or a folder), or one module of it: what else of ours it may
    # import. A module's own rule stands for that of its unit.
    "__init__": set(),
    "errors": set(),
    "exception_groups": set(),
    "logs": set(),
    "protocol": {"errors"},
    "markup": {"protocol"},
    "grammar": {"protocol"},
    "grammar.forms": {"markup", "protocol"},
    "core": {"errors", "protocol"},
    "wire": {"core", "errors", "protocol"},
    "config": {"errors", "nats.address"},
    "ports": {"core", "errors", "protocol"},
    "flow.hand_on": {*PLUMBING, "monitoring.metrics", "wire"},
    "flow.live_set": {"core", "wire"},
    "flow.own_beat": {"__init__", "wire"},
    "flow.passed_on": {"ports", "protocol", "wire"},
    "flow": {
        *(*PLUMBING, "config", "exception_groups", "jetstream.api", "wire"),
        "supervisor.restart_budget",
    },
    "flow.reception": {*PLUMBING, "monitoring.counters", "wire"},
    "http": {"errors"},
    "http.messages": set(),
    "monitoring": {*PLUMBING, "config", "flow", "http"},
    "monitoring.counters": {"core", "errors", "protocol"},
    "monitoring.heartbeat": set(),
    "monitoring.metrics": {"core", "errors", "protocol"},
    "monitoring.observed": set(),
    "monitoring.recent": set(),
    "monitoring.snapshot": {"protocol", "ports"},
    "stages": {
        *(*PLUMBING, "config", "exception_groups", "flow", "jetstream", "wire"),
        *("monitoring.counters", "monitoring.heartbeat"),
        *("monitoring.metrics", "monitoring.observed", "monitoring.recent", "monitoring.snapshot"),
    },
    "machine": PLUMBING,
    "machine.child_process": set(),
    "nats": {*PLUMBING, "exception_groups", "machine.child_process"},
    "nats.address": {"errors"},
    "nats.connection_life": set(),
    "nats.outbox": {"errors"},
    "nats.parcel": {"errors"},
    "supervisor": {*PLUMBING, "exception_groups", "machine.child_process"},
    "supervisor.gateway_log": set(),
    "supervisor.gateway_process": {
        *("exception_groups", "http.listening", "machine.child_process"),
    },
    "supervisor.load_patience": set(),
    "supervisor.restart_budget": set(),
    "simulated": {
        *(*PLUMBING, "config", "exception_groups", "nats.outbox", "nats.parcel"),
        *("grammar", "markup", "supervisor.load_patience", "supervisor.restart_budget"),
    },
    "simulated.batch": {"grammar", "markup", "protocol"},
    "simulated.forms": {"grammar", "markup", "protocol"},
    "simulated.speech": {"grammar", "markup", "protocol"},
    "engine": {"errors", "grammar", "markup", "protocol"},
    "worker": {
        *(*PLUMBING, "config", "flow", "jetstream", "monitoring", "stages", "wire"),
        "supervisor.restart_budget",
    },
    "jetstream": {"errors", "exception_groups", "ports", "wire"},
    "calling": {"errors", "ports", "wire"},
    "calling.any_loop": set(),
    "calling.attempts": {"errors", "wire"},
    "calling.on_asyncio": {"errors"},
    "calling.on_trio": {"errors", "ports", "nats.broker", "nats.login"},
    "client": {"calling.on_trio"},
    "client_asyncio": {"calling.on_asyncio"},
    "deploy": {"config", "errors"},
    "gateway": {"core", "errors", "wire"},
    "gateway.page": set(),
    "gateway.batch_jobs": {"calling.attempts", "core", "errors", "wire"},
    "gateway.batch_pages": {"errors", "http", "jetstream", "wire"},
    "gateway.batch_queue": {"exception_groups", "jetstream", "ports", "wire"},
    "gateway.batch_store": {"jetstream", "wire"},
    "gateway.batch_tally": {"jetstream", "wire"},
    "gateway.batch_tasks": {"core", "exception_groups", "jetstream", "ports", "wire"},
    "gateway.browsers": {"config.hosts"},
    "gateway.counts": {"monitoring.metrics"},
    "gateway.directory": {"ports"},
    "gateway.endpoints": {"errors", "http", "ports"},
    "gateway.forward": {"calling.attempts", "errors", "ports", "wire"},
    "gateway.inboxes": {"ports"},
    "gateway.key_file": {"errors"},
    "gateway.serve": {
        *("config", "errors", "exception_groups", "http", "jetstream"),
        *("monitoring.prometheus", "ports"),
    },
    "gateway.__main__": {"cli.exit_statuses", "errors", "launch_gateway", "logs"},
    "bench": EVERYTHING,
    "bench.clocked_engine": {"engine.sockets", "protocol"},
    "bench.gateway_process": {"config", "gateway", "http", "logs", "nats"},
    "bench.http_load": set(),
    "bench.load": set(),
    "bench.responder": set(),
    "cli": EVERYTHING,
    "launch": EVERYTHING,
    "launch_gateway": {
        *(*PLUMBING, "config", "gateway", "http", "launch_nats", "machine.service_manager"),
        "supervisor.gateway_process",
    },
    "launch_nats": {"config", "nats"},
    "__main__": {"cli"},
}
PURE = {
    *("core", "errors", "exception_groups", "grammar", "markup", "protocol", "wire"),
    *("calling.any_loop", "calling.attempts", "http.limits"),
    *("config.catalogue", "config.conflicts", "config.generated", "config.hosts"),
    *("config.keys", "config.sections", "config.strict_yaml", "config.values"),
    *("flow.live_set", "flow.passed_on"),
    *("engine.padding", "engine.prefill_plan", "engine.stem_lengths"),
    *("gateway.batch_jobs", "gateway.batch_records", "gateway.upload"),
    *("gateway.answers", "gateway.browsers", "gateway.errors", "gateway.fields"),
    *("gateway.json_body", "gateway.keys", "gateway.messages", "gateway.models"),
    *("gateway.joined", "gateway.shapes", "gateway.structured", "gateway.terms"),
    *("monitoring.counters", "monitoring.heartbeat", "monitoring.metrics", "monitoring.snapshot"),
    *("jetstream.api", "jetstream.streams"),
    *("nats.address", "nats.connection_life", "nats.outbox", "nats.parcel", "simulated.batch"),
    *("simulated.forms", "simulated.speech"),
    *("supervisor.load_patience", "supervisor.restart_budget"),
}
"""Decisions and values: without a loop, a clock, chance, or anything outside of the process."""
WITHOUT_A_LOOP = {
    *(*PURE, "config", "engine"),
    *("bench.clocked_engine", "bench.http_load", "bench.load"),
}
WITHOUT_TRIO = {"calling.on_asyncio", "client_asyncio"}
EDGES = {"grammar", "http", "machine", "monitoring", "nats", "supervisor"}
"""Where a file adapts one third-party library."""

MODEL_LIBRARIES = {"mlx", "mlx_lm", "transformers", "tokenizers", "huggingface_hub"}
LOOPS = {"trio", "trio_util", "trio_asyncio", "anyio", "asyncio"}
"""What runs tasks."""
WORLD = {
    *("time", "socket", "select", "selectors", "subprocess", "threading", "multiprocessing"),
    *("signal", "ssl", "urllib.request", "http", "tempfile", "shutil", "secrets", "os", "io"),
    *("psutil", "nats", "h11", "loguru", "queue", "concurrent", "logging"),
    "prometheus_client",
}
"""What reads a clock or touches something outside of the process."""
GENERAL_LIBRARIES = {"trio", "trio_util", "msgspec", "loguru"}
"""What an adapter may use beside the library that it adapts."""
EDGE_PARTNERS = [{"nats", "nkeys", "nacl", "trio_asyncio"}, {"llguidance", "numpy"}]
"""Libraries that make one edge together."""
UNDECIDED_CALLS = {
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
    ("uuid", "uuid1"),
    ("uuid", "uuid4"),
}


@dataclass(frozen=True)
class Import:
    line: int
    module: str
    """With dots; of ours, and of `from x import y`, including y."""
    is_from: bool


def imports_of(tree: ast.AST, package: str) -> Iterator[Import]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, is_from=False)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                yield Import(node.lineno, f"{base}.{alias.name}", is_from=True)


def unit_of(module: str) -> str:
    """`trio_worker.nats.broker` belongs to `nats`; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def place_of(module: str) -> str:
    """The unit and the module in it, as rules name them."""
    return ".".join(module.split(".")[1:3])


def problems(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one file; `module` is its dotted name."""
    is_package = module.endswith(".__init__")
    package = module.rpartition(".")[0]
    module = package if is_package and package != "trio_worker" else module
    tree = ast.parse(source)
    unit, place = unit_of(module), place_of(module)
    if unit not in MAY_IMPORT:
        return [f"{unit} has no rule: say in MAY_IMPORT what it may import"]
    found = []
    third_party = set()
    for each in imports_of(tree, package):
        top = each.module.split(".")[0]
        if top == "trio_worker":
            fault = own_fault(module, each.module)
        else:
            fault = foreign_fault(unit, place, each)
            if top not in sys.stdlib_module_names:
                third_party.add(top)
        if fault:
            found.append(f"{module}:{each.line}: {fault}")
    if unit in EDGES:
        edges = third_party - GENERAL_LIBRARIES
        if len(edges) > 1 and not any(edges <= partners for partners in EDGE_PARTNERS):
            found.append(f"{module}: adapts more than one library: {sorted(edges)}")
    if {unit, place} & PURE:
        found += [f"{module}:{line}: {what}" for line, what in undecided(tree)]
    return found


def own_fault(module: str, target: str) -> str | None:
    unit, place = unit_of(module), place_of(module)
    if target in ("trio_worker.__version__", "trio_worker"):
        return None
    if unit_of(target) == unit:
        siblings = unit == "stages" and not target.startswith(module)
        # What is pure in a room may be taken out of it, so it leans on nothing of it that is not.
        impure = place in PURE and unit not in PURE and place_of(target) not in PURE
        brings_trio = place in WITHOUT_TRIO and place_of(target) not in PURE
        return f"{place or unit} imports {target}" if siblings or impure or brings_trio else None
    below = target.removeprefix("trio_worker.")
    allowed = MAY_IMPORT[place if place in MAY_IMPORT else unit]
    if any(below == each or below.startswith(f"{each}.") for each in allowed):
        return None
    return f"{place or unit} imports {target}"


def foreign_fault(unit: str, place: str, each: Import) -> str | None:
    top = each.module.split(".")[0]
    names = {top, ".".join(each.module.split(".")[:2])}
    here = {unit, place}
    if top == "trio" and each.is_from:
        return "write `import trio`"
    if names & MODEL_LIBRARIES and unit != "engine":
        return f"only the engine process imports {top}"
    if here & WITHOUT_A_LOOP and names & LOOPS:
        return f"{place} imports {top}"
    if here & WITHOUT_TRIO and top in ("trio", "trio_util", "trio_asyncio", "anyio"):
        return f"{place} imports {top}"
    if here & PURE and names & WORLD:
        return f"{place} imports {top}"
    return None


def undecided(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls whose result a core function could not repeat."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=name) if (
                owner,
                name,
            ) in UNDECIDED_CALLS:
                yield node.lineno, f"{owner}.{name} reads what is outside"
            case ast.Attribute(value=ast.Name(id="random"), attr=name) if name != "Random":
                yield node.lineno, f"random.{name}: take a random.Random"
            case ast.ImportFrom(module="random", names=names):
                if any(alias.name != "Random" for alias in names):
                    yield node.lineno, "from random: take a random.Random"
            case ast.Call(func=ast.Name(id="open" | "input" | "print" as name)):
                yield node.lineno, f"{name}() in core"
            case _:
                pass


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_every_file_keeps_to_its_layer(path: Path) -> None:
    module = ".".join(["trio_worker", *path.relative_to(PACKAGE).with_suffix("").parts])
    assert problems(path.read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.plan", "import trio"),
        ("core.plan", "import asyncio"),
        ("core.plan", "import time"),
        ("core.plan", "def f():\n    from time import monotonic"),
        ("core.plan", "import datetime\ndatetime.datetime.now()"),
        ("core.plan", "from datetime import datetime\ndatetime.now()"),
        ("core.plan", "import random\nrandom.random()"),
        ("core.plan", "from random import choice"),
        ("core.plan", "import urllib.request"),
        ("core.plan", "open('x')"),
        ("core.plan", "from trio_worker import ports"),
        ("core.plan", "from ..ports import Broker"),
        ("core.plan", "from trio_worker.monitoring.metrics import Metrics"),
        ("core.__init__", "from trio_worker.config import Config"),
        ("protocol.turn", "from trio_worker.core.request import Request"),
        ("wire.native", "from ..stages import intake"),
        ("wire.native", "import trio"),
        ("errors", "from trio_worker.core import request"),
        ("config", "import trio"),
        ("config.sections", "from trio_worker.ports import Broker"),
        ("config.keys", "import os"),
        ("config.conflicts", "from trio_worker.config.secrets import with_secrets"),
        ("ports", "from trio_worker.config import Config"),
        ("flow.serving", "from trio_worker.monitoring.counters import BatchCounters"),
        ("flow.door", "from trio_worker.stages.intake import run_intake"),
        ("stages.intake", "from trio_worker.stages.respond import respond"),
        ("stages.intake", "from trio_worker.stages import respond"),
        ("stages.intake", "from . import respond"),
        ("stages.intake", "if TYPE_CHECKING:\n    from trio_worker.nats import broker"),
        ("stages.intake", "import trio_worker.worker"),
        ("stages.intake", "from trio_worker.monitoring.http_server import serve_http"),
        ("stages.intake", "from trio_worker.supervisor.engine_process import open_engine"),
        ("stages.intake", "from trio import sleep"),
        ("stages.intake", "import mlx.core as mx"),
        ("nats.broker", "from trio_worker.monitoring import http_server"),
        ("http.server", "from trio_worker.monitoring.observed import Observed"),
        ("http.line", "import h11\nimport psutil"),
        ("nats.broker", "import nats\nimport psutil"),
        ("nats.broker", "from trio_worker.stages import intake"),
        ("nats.outbox", "import trio"),
        ("nats.outbox", "from trio_worker.nats.broker import open_nats_broker"),
        ("nats.outbox", "from trio_worker.ports import Message"),
        ("monitoring.metrics", "from trio_worker.monitoring.prometheus import exposition"),
        ("supervisor.restart_budget", "import time"),
        ("engine.prefill_plan", "from trio_worker.engine.caches import RowsCache"),
        ("simulated.engine", "from trio_worker.stages import intake"),
        ("engine.__main__", "import trio"),
        ("engine.__main__", "from trio_worker.core import request"),
        ("worker", "from trio_worker.nats.broker import open_broker"),
        ("worker", "from trio_worker.supervisor.engine_process import open_engine"),
        ("worker", "import transformers"),
        ("client", "from trio_worker.monitoring import http_server"),
        ("calling.on_trio", "from trio_worker.worker import serve"),
        ("calling.attempts", "import trio"),
        ("calling.on_asyncio", "import trio_asyncio"),
        ("calling.on_asyncio", "from trio_worker.nats.login import Login"),
        ("calling.on_asyncio", "from trio_worker.calling.on_trio import Client"),
        ("client_asyncio", "import trio"),
        ("__main__", "from trio_worker.engine.cpu import blas"),
        ("bench.clocked_engine", "import trio"),
        ("bench.clocked_engine", "from trio_worker.engine.batch import Batch"),
        ("bench.load", "from trio_worker.client import Client"),
        ("bench.tiny", "from trio_worker.engine.models.tiny import write_tiny_model"),
        ("cli.run", "def f():\n    import mlx_lm"),
        ("novelty", "import json"),
    ],
)
def test_a_breach_is_found(module: str, source: str) -> None:
    """The rules above must be able to fail."""
    assert problems(source, f"trio_worker.{module}") != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.plan", "import random\ndef f(r: random.Random): r.random()"),
        ("core.plan", "from urllib.parse import urlsplit"),
        ("core.plan", "from trio_worker.protocol.turn import Work"),
        ("wire.native", "from ..core.request import Request\nfrom trio_worker.errors import X"),
        ("stages.intake", "import trio\nfrom trio_worker.ports import Broker"),
        ("stages.intake", "from trio_worker.monitoring.metrics import Metrics"),
        ("flow.serving", "from trio_worker.supervisor.restart_budget import RestartBudget"),
        ("monitoring.http_pages", "from trio_worker.http.messages import Answer\nimport trio"),
        ("http.line", "import h11\nimport trio\nimport loguru"),
        ("monitoring.http_server", "from trio_worker.monitoring.snapshot import Snapshot"),
        ("nats.broker", "from trio_worker.nats.outbox import Outbox"),
        ("engine.__main__", "import mlx_lm\nfrom trio_worker.engine.prefix_cache import X"),
        ("engine.serve", "from trio_worker.protocol.frames import encode"),
        ("engine.prefill_plan", "from trio_worker.engine.padding import padding"),
        ("calling.on_trio", "from trio_worker.nats.broker import open_broker"),
        ("calling.on_trio", "from trio_worker.nats import broker"),
        ("client", "from trio_worker.calling.on_trio import Client"),
        ("bench.clocked_engine", "from trio_worker.engine.sockets import Line"),
        ("cli.run", "from trio_worker.nats import broker\nfrom trio_worker import worker"),
        ("__main__", "from trio_worker import __version__"),
        ("stages.__init__", ""),
        ("__init__", ""),
    ],
)
def test_what_is_allowed_is_not_a_breach(module: str, source: str) -> None:
    assert problems(source, f"trio_worker.{module}") == []
