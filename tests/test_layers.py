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

PACKAGE = Path(__file__).resolve().parent.parent / "trio_worker"

BETWEEN = {"door", "overview", "priority_channel", "reply"}
"""What stages share with each other and with worker.py."""
EVERYTHING = {
    *("errors", "frames", "core", "config", "ports", *BETWEEN),
    *(
        "stages",
        "testing",
        "adapters",
        "worker",
        "client",
        "client_asyncio",
        "launch",
        "logs",
        "bench",
        "bench_scheduling",
        "deploy",
    ),
}
MAY_IMPORT: dict[str, set[str]] = {
    # unit (a module of the top level or a folder): the others of ours that it may import
    "__init__": set(),
    "errors": set(),
    "frames": {"errors"},
    "core": {"errors"},
    "config": {"core", "errors"},
    "ports": {"core", "errors"},
    "priority_channel": {"core", "errors"},
    "door": {"core", "errors"},
    "reply": {"core", "errors", "ports"},
    "overview": {"core", "errors", "ports", "config", "door"},
    "stages": {"core", "errors", "ports", "config", *BETWEEN},
    "testing": {"core", "errors", "ports", "config"},
    "adapters": {"core", "errors", "ports", "config", "frames"},
    "engine": {"errors", "frames"},
    "worker": {"core", "errors", "ports", "config", *BETWEEN, "stages"},
    "client": {"core", "errors", "ports", "adapters.nats_broker"},
    "client_asyncio": {"core", "errors"},
    "bench": EVERYTHING,
    "bench_scheduling": EVERYTHING,
    "launch": EVERYTHING,
    "logs": set(),
    "__main__": EVERYTHING,
    "deploy": {"config", "core", "errors"},
}

MODEL_LIBRARIES = {"mlx", "mlx_lm", "transformers", "tokenizers", "huggingface_hub"}
LOOPS = {"trio", "trio_util", "trio_asyncio", "anyio", "asyncio"}
"""What runs tasks."""
WORLD = {
    *("time", "socket", "select", "selectors", "subprocess", "threading", "multiprocessing"),
    *("signal", "ssl", "urllib.request", "http", "tempfile", "shutil", "secrets", "os", "io"),
    *("psutil", "nats", "hypercorn", "starlette", "loguru", "queue", "concurrent", "logging"),
    "prometheus_client",
}
"""What reads a clock or touches something outside of the process."""
GENERAL_LIBRARIES = {"trio", "trio_util", "msgspec", "loguru"}
"""What an adapter may use beside the library that it adapts."""
EDGE_PARTNERS = [{"hypercorn", "starlette"}, {"nats", "nkeys", "nacl", "trio_asyncio"}]
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
    """`trio_worker.core.wire.native` belongs to `core`; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def problems(source: str, module: str) -> list[str]:
    """What is wrong with the imports of one file; `module` is its dotted name."""
    is_package = module.endswith(".__init__")
    package = module.rpartition(".")[0]
    module = package if is_package and package != "trio_worker" else module
    tree = ast.parse(source)
    unit = unit_of(module)
    if unit not in MAY_IMPORT:
        return [f"{unit} has no rule: say in MAY_IMPORT what it may import"]
    found = []
    third_party = set()
    for each in imports_of(tree, package):
        top = each.module.split(".")[0]
        if top == "trio_worker":
            fault = own_fault(unit, module, each.module)
        else:
            fault = foreign_fault(unit, each)
            if top not in sys.stdlib_module_names:
                third_party.add(top)
        if fault:
            found.append(f"{module}:{each.line}: {fault}")
    if unit == "adapters":
        edges = third_party - GENERAL_LIBRARIES
        if len(edges) > 1 and not any(edges <= partners for partners in EDGE_PARTNERS):
            found.append(f"{module}: adapts more than one library: {sorted(edges)}")
    if unit == "core":
        found += [f"{module}:{line}: {what}" for line, what in undecided(tree)]
    return found


def own_fault(unit: str, module: str, target: str) -> str | None:
    target_unit = unit_of(target)
    if target == "trio_worker.__version__" or target == "trio_worker":
        return None
    if target_unit == unit:
        siblings = unit in ("stages", "adapters") and not target.startswith(module)
        return f"one of {unit} imports another: {target}" if siblings else None
    below = target.removeprefix("trio_worker.")
    if any(below == each or below.startswith(f"{each}.") for each in MAY_IMPORT[unit]):
        return None
    return f"{unit} imports {target}"


def foreign_fault(unit: str, each: Import) -> str | None:
    top = each.module.split(".")[0]
    names = {top, ".".join(each.module.split(".")[:2])}
    if top == "trio" and each.is_from:
        return "write `import trio`"
    if names & MODEL_LIBRARIES and unit != "engine":
        return f"only the engine process imports {top}"
    if unit in ("engine", "core", "errors", "frames", "config") and names & LOOPS:
        return f"{unit} imports {top}"
    if unit == "client_asyncio" and top in ("trio", "trio_util", "trio_asyncio", "anyio"):
        return f"{unit} imports {top}"
    if unit in ("core", "errors", "frames") and names & WORLD:
        return f"{unit} imports {top}"
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
        ("core.wire.native", "from ...stages import intake"),
        ("core.__init__", "from trio_worker.config import Config"),
        ("errors", "from trio_worker.core import request"),
        ("config", "import trio"),
        ("config", "from trio_worker.ports import Broker"),
        ("ports", "from trio_worker.config import Config"),
        ("stages.intake", "from trio_worker.stages.respond import respond"),
        ("stages.intake", "from trio_worker.stages import respond"),
        ("stages.intake", "from . import respond"),
        ("stages.intake", "if TYPE_CHECKING:\n    from trio_worker.adapters import nats_broker"),
        ("stages.intake", "import trio_worker.worker"),
        ("stages.intake", "from trio import sleep"),
        ("stages.intake", "import mlx.core as mx"),
        ("adapters.nats_broker", "from trio_worker.adapters import http_server"),
        ("adapters.nats_broker", "import nats\nimport psutil"),
        ("adapters.nats_broker", "from trio_worker.stages import intake"),
        ("testing.engine", "from trio_worker.stages import intake"),
        ("engine.__main__", "import trio"),
        ("engine.__main__", "from trio_worker.core import request"),
        ("worker", "from trio_worker.adapters.nats_broker import open_broker"),
        ("worker", "import transformers"),
        ("client", "from trio_worker.adapters import http_server"),
        ("client", "from trio_worker.worker import serve"),
        ("client_asyncio", "import trio_asyncio"),
        ("client_asyncio", "from trio_worker.adapters.nats_broker import Login"),
        ("__main__", "from trio_worker.engine import blas"),
        ("__main__", "def f():\n    import mlx_lm"),
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
        ("core.wire.native", "from ..request import Request\nfrom trio_worker.errors import X"),
        ("stages.intake", "import trio\nfrom trio_worker.ports import Broker"),
        ("adapters.http_server", "import starlette\nimport hypercorn\nimport trio\nimport json"),
        ("engine.__main__", "import mlx_lm\nfrom trio_worker.engine.prefix import X"),
        ("client", "from trio_worker.adapters.nats_broker import open_broker"),
        ("client", "from trio_worker.adapters import nats_broker"),
        (
            "__main__",
            "from trio_worker.adapters import nats_broker\nfrom trio_worker import worker",
        ),
        ("__main__", "from trio_worker import __version__"),
        ("stages.__init__", ""),
        ("__init__", ""),
    ],
)
def test_what_is_allowed_is_not_a_breach(module: str, source: str) -> None:
    assert problems(source, f"trio_worker.{module}") == []
