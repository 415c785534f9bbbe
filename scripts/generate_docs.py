# ruff: noqa: INP001 - a script, not a package
"""Rewrite the parts of docs/*.md that are generated from the code, and check what pages quote.

A part stands between `<!-- generated: NAME -->` and `<!-- end -->`; NAME is one of `BLOCKS`.
With `--check` nothing is written, and the exit status is 1 if something would be. It is 1 as well
if a page, an alert or a panel names what does not exist: see quotes.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path

import openai
import quotes

from trio_worker import config, errors
from trio_worker.cli.command_line import make_parser
from trio_worker.core import sequence
from trio_worker.errors import WorkerError
from trio_worker.gateway import counts
from trio_worker.gateway.errors import MAY_BE_MET, Refusal, Refused, reply_to
from trio_worker.gateway.shapes import HARMLESS, Effect, Endpoint, effects
from trio_worker.monitoring.metrics import Description, all_descriptions
from trio_worker.nats import connection_life as nats_connection

ROOT = Path(__file__).resolve().parent.parent
QUERIES = (ROOT / "docs/alerts.yaml", ROOT / "docs/grafana-dashboard.json")
MARKED = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def error_codes() -> str:
    """Every code of an error reply, in the order of `ErrorCode`."""
    rows = [
        f"| `{code}` | {each.number} | {'yes' if each.retryable else 'no'} | {_first_line(each)} |"
        for code, each in ((code, errors.BY_CODE[code]) for code in errors.ErrorCode)
    ]
    return "\n".join(["| code | number | retryable | when |", "|---|---|---|---|", *rows, ""])


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").partition("\n")[0]


def commands() -> str:
    """What `--help` says of each command, in 80 columns whatever the terminal."""
    os.environ["COLUMNS"] = "80"
    parser = make_parser()
    parts = [f"```\n{parser.format_help()}```\n"]
    parts += [f"### {name}\n\n```\n{sub.format_help()}```\n" for name, sub in _subcommands(parser)]
    return "\n".join(parts)


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for name, sub in action.choices.items():
                nested = list(_subcommands(sub))
                yield from ((f"{name} {inner}", each) for inner, each in nested)
                if not nested:
                    yield name, sub


def metrics() -> str:
    """Every metric of a worker, by name."""
    return _described(all_descriptions())


def gateway_metrics() -> str:
    """Every metric of a gateway, by name."""
    return _described(sorted(counts.DESCRIPTIONS, key=lambda each: each.name))


def _described(descriptions: Iterable[Description]) -> str:
    parts = []
    for each in descriptions:
        lines = [f"### `{each.full_name}`", "", f"A {each.kind}{_labels(each.labels)}."]
        if each.buckets:
            bounds = ", ".join(f"{bound:g}" for bound in each.buckets)
            lines += [f"Buckets up to {bounds}."]
        lines += ["", each.meaning]
        if each.worry:
            lines += ["", f"**When to worry:** {each.worry[0].lower()}{each.worry[1:]}"]
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def _labels(labels: tuple[str, ...]) -> str:
    return " by " + " and ".join(f"`{label}`" for label in labels) if labels else ""


def request_life() -> str:
    """What follows each stage of a request; whatever else happens there is a fault of ours."""
    moves = [(stage, event, after) for (stage, event), after in sequence.TRANSITIONS.items()]
    return _life(sequence.Stage, moves)


def connection_life() -> str:
    """What follows each state of the NATS connection; whatever else happens changes nothing."""
    table = nats_connection.TRANSITIONS
    moves = [(state, event, after) for (state, event), after in table.items() if after is not state]
    return _life(nats_connection.State, moves)


def _life(states: Iterable[StrEnum], moves: Sequence[tuple[StrEnum, StrEnum, StrEnum]]) -> str:
    rows = []
    for state in states:
        causes: dict[StrEnum, list[StrEnum]] = {}
        for before, event, after in moves:
            if before is state:
                causes.setdefault(after, []).append(event)
        steps = [f"{' or '.join(events)} → **{after}**" for after, events in causes.items()]
        rows.append(f"| **{state}** | {'; '.join(steps) or 'nothing'} |")
    return "\n".join(["| in | what happens → what follows |", "|---|---|", *rows, ""])


def gateway_fields() -> str:
    """Every field that the gateway knows, and what becomes of it."""
    of_chat, of_text = effects(Endpoint.CHAT), effects(Endpoint.COMPLETIONS)
    rows = []
    for name in sorted(of_chat | of_text):
        where = {"chat": of_chat.get(name), "completions": of_text.get(name)}
        if where["chat"] is where["completions"]:
            where = {"both": of_chat[name]}
        rows += [
            f"| `{name}` | {endpoint} | {_what_becomes_of(name, effect)} |"
            for endpoint, effect in where.items()
            if effect is not None
        ]
    return "\n".join(["| field | endpoint | what becomes of it |", "|---|---|---|", *rows, ""])


def _what_becomes_of(name: str, effect: Effect) -> str:
    if effect is not Effect.REFUSED:
        return str(effect)
    values = [f"`{json.dumps(value)}`" for value in HARMLESS[name]]
    return f"refused, unless it is {' or '.join(values)}" if values else "refused"


def gateway_errors() -> str:
    """Every error that the gateway tells, as its clients see it."""
    told: list[WorkerError | Refused] = [each("") for each in errors.BY_CODE.values()]
    told += [errors.NoWorker(""), errors.RequestTimeout("", details={"stage": MAY_BE_MET})]
    told += [Refused(code, "") for code in Refusal]
    subclasses = openai.APIStatusError.__subclasses__()
    classes = {getattr(each, "status_code", None): each.__name__ for each in subclasses}
    rows = []
    for reply in sorted(map(reply_to, told), key=lambda each: each.status):
        other = "InternalServerError" if reply.status >= 500 else "APIStatusError"
        again = "yes" if reply.headers["x-should-retry"] == "true" else "no"
        stage = f", at {reply.error['stage']}" if "stage" in reply.error else ""
        rows.append(
            f"| {reply.status} | `{reply.error['code']}`{stage} | `{reply.error['type']}` "
            f"| `{classes.get(reply.status, other)}` | {again} |"
        )
    head = "| status | `code` | `type` | in openai for Python | to be tried again |"
    return "\n".join([head, "|---|---|---|---|---|", *rows, ""])


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "config-keys": config.reference_markdown,
    "connection-life": connection_life,
    "error-codes": error_codes,
    "gateway-errors": gateway_errors,
    "gateway-fields": gateway_fields,
    "gateway-metrics": gateway_metrics,
    "metrics": metrics,
    "request-life": request_life,
}
"""What can be generated. A new block is a function here and a pair of markers in a page."""


def generate(text: str) -> str:
    """`text` with every marked part written again. Raises `KeyError` for an unknown name."""
    return MARKED.sub(lambda part: f"{part[1]}\n{BLOCKS[part[2]]()}\n{part[4]}", text)


def pages() -> list[Path]:
    return sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])


def unknown_names() -> list[str]:
    """What the pages quote and the alerts and panels ask for that does not exist."""
    found = []
    for path in [*pages(), *QUERIES]:
        text = path.read_text(encoding="utf-8")
        faults = [*quotes.unknown_quotes(text), *quotes.unknown_series(text)]
        found += [f"{path.relative_to(ROOT).as_posix()}:{each}" for each in faults]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        current = generate(text)
        if current != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(current, encoding="utf-8")
    for name in stale:
        sys.stdout.write(f"{name}: {'is not current: run `just docs`' if check else 'written'}\n")
    unknown = unknown_names()
    for line in unknown:
        sys.stdout.write(f"{line}\n")
    return 1 if unknown or (check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
