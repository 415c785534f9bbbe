# ruff: noqa: INP001 - a script, not a package
"""What the pages quote of this repository, held against the repository.

A quote is inline code, a line of a `sh` block, or a `yaml` block that begins with `cluster:`.
What is looked at in it: tests and files, commands and their options, configuration keys and
variables, metrics and their labels, error codes and every other name with an underscore. A name
that is neither a key nor a metric has to occur in the source; a quote of anything else (a
subject, a piece of JSON, another program) is none of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from trio_worker import config
from trio_worker.cli.command_line import make_parser
from trio_worker.config import strict_yaml
from trio_worker.errors import ErrorCode
from trio_worker.gateway import counts
from trio_worker.monitoring.metrics import PREFIX, Description, all_descriptions
from trio_worker.monitoring.snapshot import Snapshot
from trio_worker.wire import subjects
from trio_worker.wire.native import WorkerNote

ROOT = Path(__file__).resolve().parent.parent
PLACES = (ROOT, ROOT / "trio_worker", ROOT / "tests", ROOT / "docs")
"""A page names files as they are seen from one of these."""
ROOT_FILES = ("justfile", "pyproject.toml", "mkdocs.yml", "cluster.yaml")

FENCE = re.compile(r"\s*(`{3,})\s*([\w-]*)")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
NAME = re.compile(r"[a-z_]\w*(?:\.[a-z_]\w*)*")
UPPER = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]*)+")
LABEL = re.compile(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"')

FOREIGN = {"--no-templates", "rule_files"}
"""Of the `nats` command, and of Prometheus' configuration."""
FROM_OUTSIDE = {"instance", "job", "le"}
"""Labels that Prometheus puts on, and that of a histogram's buckets."""
BUILT = {"site", "dist", ".hypothesis", ".mutate"}
"""Folders that are only there when something has made them."""
VALUE_OPTIONS_OF_UV = {"--no-group", "--only-group", "--group", "--extra", "--with"}


def unknown_quotes(text: str) -> list[str]:
    """What a page quotes that does not exist: `LINE: QUOTE: why`, in the order of the page."""
    return [
        f"{number}: `{quote}`: {fault}"
        for number, kind, quote in _quotes(text)
        for fault in dict.fromkeys(_faults(kind, quote))
    ]


def unknown_series(text: str) -> list[str]:
    """What the queries in a file ask for that no worker has, in the order of the file."""
    found = []
    for name, labels in re.findall(rf"({PREFIX}\w+)(\{{[^}}]*\}})?", text.replace('\\"', '"')):
        faults = [*_faults_of_name(name), *_faults_of_labels(name, labels)]
        found += [f"{name}{labels}: {fault}" for fault in faults]
    return found


def _faults(kind: str, quote: str) -> Iterator[str]:
    if kind == "sh":
        yield from _faults_of_shell(quote)
    elif kind == "yaml":
        yield from _faults_of_yaml(quote)
    else:
        yield from _faults_of_code(quote)


def _quotes(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, kind and text of every quote, under the line where it begins."""
    fence, language, began, block = "", "", 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        mark = FENCE.match(line)
        if fence and mark is not None and mark[1] == fence and not mark[2]:
            yield from _quotes_of_block(language, began, block)
            fence = ""
        elif fence:
            block.append(line)
        elif mark is not None:
            fence, language, began, block = mark[1], mark[2], number + 1, []
        else:
            yield from ((number, "code", quote) for quote in INLINE.findall(line))


def _quotes_of_block(language: str, began: int, block: list[str]) -> Iterator[tuple[int, str, str]]:
    if language == "yaml" and block[:1] == ["cluster:"]:
        yield began, "yaml", "\n".join(block)
    elif language == "sh":
        held: list[str] = []
        for number, line in enumerate(block, began):
            held.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                yield number + 1 - len(held), "sh", "".join(held)
                held.clear()


# --- what there is --------------------------------------------------------------------------


@cache
def _words() -> frozenset[str]:
    """Every word of the source; not of the test that quotes what does not exist."""
    files = [*ROOT.glob("trio_worker/**/*.py"), *ROOT.glob("tests/**/*.py")]
    files += [ROOT / name for name in ROOT_FILES]
    texts = [each.read_text("utf-8") for each in files if each.name != "test_docs.py"]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


@cache
def _tests() -> frozenset[str]:
    """The functions of the tests, the checks of the simulation among them."""
    texts = [each.read_text("utf-8") for each in ROOT.glob("tests/**/*.py")]
    return frozenset(
        name
        for text in texts
        for name in re.findall(r"^ *(?:async )?def (\w+)", text, re.MULTILINE)
    )


@cache
def _metrics() -> dict[str, Description]:
    """By every name that a query may have for it, with the prefix and without."""
    found = {}
    for each in (*all_descriptions(), *counts.DESCRIPTIONS):
        ends = ("", "_bucket", "_sum", "_count") if each.kind == "histogram" else ("",)
        for end in ends:
            found[f"{each.name}{end}"] = found[f"{PREFIX}{each.name}{end}"] = each
    return found


@cache
def _dotted() -> frozenset[str]:
    """Everything that a page may name by a path with dots."""
    paths = {key.path for key in config.all_keys()}
    paths |= {path.rpartition(".")[0] for path in paths} | {"worker.requests.default_priority"}
    ends = {".".join(path.split(".")[start:]) for path in paths for start in range(4)}
    snapshot = {
        f"{section.name}.{field}"
        for section in dataclasses.fields(Snapshot)
        for field in dataclasses.fields(_present(get_type_hints(Snapshot)[section.name]))
    }
    note = {f"worker.{field}" for field in WorkerNote.__struct_fields__}
    told = {subjects.REGISTER, subjects.HEARTBEAT, subjects.DEREGISTER}
    return frozenset(ends | snapshot | note | told)


def _present(section: Any) -> Any:
    """The type of a part of the snapshot that may be left out."""
    return next((each for each in get_args(section) if each is not NoneType), section)


@cache
def _sections() -> frozenset[str]:
    parts = [key.path.split(".")[:-1] for key in config.all_keys()]
    return frozenset(name for each in parts for name in each)


@cache
def _recipes() -> dict[str, str]:
    """The recipes of the justfile, and what each does."""
    text = (ROOT / "justfile").read_text("utf-8")
    found = re.findall(
        r"^@?([a-z][\w-]*)([^:\n]*):(?!=)[^\n]*\n((?:[ \t]+.*\n|\n)*)", text, re.MULTILINE
    )
    return {name: f"{parameters.strip()}\n{body}" for name, parameters, body in found}


def _commands(
    parser: argparse.ArgumentParser,
) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for inner in _subcommands(parser).values():
        yield from _commands(inner)


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            found |= action.choices
    return found


# --- inline code ----------------------------------------------------------------------------


def _faults_of_code(quote: str) -> Iterator[str]:
    first, *rest = quote.split(" ")
    if first in ("just", "uv", "python") or (first == "trio-worker" and rest):
        yield from _faults_of_shell(quote)
    elif first.startswith("--"):
        yield from _faults_of_option(first, rest)
    elif re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", quote) and ("/" in quote or _is_file(quote)):
        yield from _faults_of_path(quote)
    elif (name := NAME.match(quote)) is not None:
        after = quote[name.end() :]
        if not after or after[0] in ":={[(":
            yield from _faults_of_name(name[0])
            yield from _faults_of_labels(name[0], after)
    elif (upper := UPPER.match(quote)) is not None:
        yield from _faults_of_upper(upper[0])


def _is_file(quote: str) -> bool:
    return quote.endswith((".py", ".md")) or quote in ROOT_FILES


def _faults_of_path(quote: str) -> Iterator[str]:
    """A file that stands below a folder of ours, or is a Python file or a page."""
    path = quote.rstrip("/")
    head = path.partition("/")[0]
    if head in BUILT:
        return
    ours = "/" not in path or any((place / head).is_dir() for place in PLACES)
    anywhere = f"**/{path}" if "/" not in path else path
    found = (True for place in PLACES for _ in place.glob(path if place == ROOT else anywhere))
    if ours and not any(found):
        yield "there is no such file"


def _faults_of_name(name: str) -> Iterator[str]:
    if name.startswith("test_"):
        if name not in _tests():
            yield "there is no such test"
    elif "." in name:
        path = name.removeprefix("cluster.")
        if path in _dotted():
            return
        if name.startswith("cluster.") or path.partition(".")[0] in _sections():
            yield "there is no such key"
            return
        for part in path.split("."):
            yield from _faults_of_word(part)
    elif re.search(r"_(total|seconds)(_bucket|_sum|_count)?\Z", name) or name.startswith(PREFIX):
        if name not in _metrics() and name not in _tests():
            yield "there is no such metric"
    else:
        yield from _faults_of_word(name)


def _faults_of_word(word: str) -> Iterator[str]:
    known = word in _words() or word in _metrics() or word in FOREIGN
    # The gateway writes the codes in lower case.
    known = known or word.upper() in ErrorCode.__members__
    if "_" in word.strip("_") and not known:
        yield "this name is nowhere in the source"


def _faults_of_labels(name: str, after: str) -> Iterator[str]:
    if after.startswith("{") and name in _metrics():
        for label, values in LABEL.findall(after):
            yield from _faults_of_label(_metrics()[name], label, values)


def _faults_of_label(metric: Description, label: str, values: str) -> Iterator[str]:
    """What is wrong with asking `metric` for one of these values, `|` between them."""
    if label in FROM_OUTSIDE:
        return
    if label not in metric.labels:
        yield f"it has no label {label}"
        return
    known = _values_of(metric, label)
    for value in values.split("|"):
        if known and value not in known:
            yield f"{label} is never {value}"


def _values_of(metric: Description, label: str) -> frozenset[str]:
    """The values that a label may have; empty where that is not known."""
    codes = {code.value for code in ErrorCode}
    if label in ("code", "outcome"):
        return frozenset(codes if label == "code" else {"ok", *codes})
    if metric.name == "memory_bytes":
        return frozenset(re.findall(r"`(\w+)`", metric.meaning))
    return frozenset(each[metric.labels.index(label)] for each in metric.starts)


def _faults_of_upper(name: str) -> Iterator[str]:
    if name.startswith(config.VARIABLE_PREFIX):
        yield from _faults_of_variable(name)
    elif name.rstrip("_") not in _words() and name not in _words():
        yield "this name is nowhere in the source"


def _faults_of_variable(name: str) -> Iterator[str]:
    known = {config.variable_of(key.path) for key in config.all_keys()}
    if name not in known | {config.VARIABLE_PREFIX}:
        yield f"{name} names no key"


# --- commands -------------------------------------------------------------------------------


def _faults_of_shell(line: str) -> Iterator[str]:
    """Of every simple command in a line of a shell; of those that are not ours, none."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError as error:
        yield f"a shell cannot read it: {error}"
        return
    command: list[str] = []
    for token in [*tokens, ";"]:
        if token.strip("();<>|&"):
            command.append(token)
        else:
            yield from _faults_of_command(command)
            # What follows a redirection is a file.
            command = ["file"] if token.startswith((">", "<")) else []


def _faults_of_command(tokens: Sequence[str]) -> Iterator[str]:
    tokens = list(tokens)
    while tokens and re.match(r"\w+=", tokens[0]):
        yield from _faults_of_assignment(tokens.pop(0).partition("=")[0])
    if tokens[:1] == ["sudo"]:
        tokens.pop(0)
    if tokens[:2] == ["uv", "run"]:
        tokens = _after_uv_run(tokens[2:])
    if tokens[:3] == ["python", "-m", "trio_worker"]:
        tokens = ["trio-worker", *tokens[3:]]
    if tokens[:1] == ["just"]:
        yield from _faults_of_recipe(tokens[1:])
    elif tokens and tokens[0].rpartition("/")[2] == "trio-worker":
        yield from _faults_of_arguments(make_parser(), tokens[1:])


def _after_uv_run(tokens: Sequence[str]) -> list[str]:
    tokens = list(tokens)
    while tokens and tokens[0].startswith("--"):
        del tokens[: 2 if tokens[0] in VALUE_OPTIONS_OF_UV else 1]
    return tokens


def _faults_of_assignment(name: str) -> Iterator[str]:
    yield from _faults_of_upper(name)


def _faults_of_recipe(tokens: Sequence[str]) -> Iterator[str]:
    if not tokens:
        return
    name, *rest = tokens
    if name not in _recipes():
        yield f"there is no recipe {name}"
        return
    parameters, _, body = _recipes()[name].partition("\n")
    if not parameters:
        yield from _faults_of_recipe(rest)
    elif (through := re.search(r"run trio-worker (\w+)", body)) is not None:
        yield from _faults_of_arguments(make_parser(), [through[1], *rest])
    elif (module := re.search(r"python -m ([\w.]+)", body)) is not None:
        yield from _faults_of_settings(module[1], rest)
    elif "generate_docs.py" in body:
        yield from (f"{name} has no option {each}" for each in rest if each != "--check")
    else:
        yield from _faults_of_pytest(rest)


def _faults_of_settings(module: str, tokens: Sequence[str]) -> Iterator[str]:
    """Of `name=value` and of paths, as the programs below tests/ take them."""
    path = ROOT / "tests" / module.replace(".", "/")
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    text = "\n".join(file.read_text() for file in files)
    known = re.findall(r'(?:\boptions\.get\(|\boptions\[|\bif )"(\w+)"', text, re.MULTILINE)
    for token in tokens:
        # Files and folders stand without a name; PATH stands for one.
        is_path = token.startswith("PATH") or ("/" in token and (ROOT / token).exists())
        if not is_path and token.partition("=")[0] not in known:
            yield f"{module} takes no {token}"


def _faults_of_pytest(tokens: Sequence[str]) -> Iterator[str]:
    for before, token in zip(["", *tokens], tokens, strict=False):
        if before == "-m":
            unknown = set(re.findall(r"\w+", token)) - {"and", "or", "not"} - _markers()
            yield from (f"there is no marker {each}" for each in sorted(unknown))
        elif "/" in token:
            yield from _faults_of_path(token.partition("::")[0])


@cache
def _markers() -> frozenset[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    markers: list[str] = project["tool"]["pytest"]["ini_options"]["markers"]
    return frozenset(each.partition(":")[0] for each in markers)


def _faults_of_arguments(parser: argparse.ArgumentParser, tokens: Sequence[str]) -> Iterator[str]:
    """Subcommands, options and choices; whether it is complete is not asked."""
    inner = _subcommands(parser)
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token in inner:
            yield from _faults_of_arguments(inner[token], rest)
            return
        if token.startswith("-"):
            name, separator, value = token.partition("=")
            action = parser._option_string_actions.get(name)  # noqa: SLF001
            if action is None:
                yield f"{parser.prog} has no option {name}"
            elif separator or (action.nargs is None and rest):
                yield from _faults_of_value(action, value if separator else rest.pop(0))
        elif inner:
            yield f"{parser.prog} has no command {token}"
        else:
            for action in parser._get_positional_actions():  # noqa: SLF001
                yield from _faults_of_value(action, token)


def _faults_of_value(action: argparse.Action, value: str) -> Iterator[str]:
    if action.choices is not None and value not in action.choices:
        yield f"{action.metavar or action.dest} is never {value}"
    if action.dest == "overrides" and value != action.metavar:
        path = value.partition("=")[0]
        if path not in {key.path for key in config.all_keys()}:
            yield f"there is no key {path}"


def _faults_of_option(option: str, rest: Sequence[str]) -> Iterator[str]:
    """Of an option that stands alone: some command of ours has to have it."""
    for parser in _commands(make_parser()):
        if option in parser._option_string_actions:  # noqa: SLF001
            yield from _faults_of_arguments(parser, [option, *rest])
            return
    if option not in FOREIGN:
        yield f"no command has the option {option}"


def _faults_of_yaml(text: str) -> Iterator[str]:
    """Of a configuration: its keys, not its values."""
    known = {f"cluster.{key.path}" for key in config.all_keys()}
    sections = {path.rpartition(".")[0] for path in known}
    sections |= {path.rpartition(".")[0] for path in sections}
    for path in strict_yaml.parse(text.encode()).lines:
        if path not in known | sections:
            yield f"there is no key {path}"
