"""The bugs: every place of a source file where one line could easily have been another.

A mutant replaces one piece of the text. Left alone is what does nothing: docstrings, annotations,
assertions, what is logged, `__repr__`, messages for people, and what is inside of f-strings.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import TypeAlias

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

_COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_SAID_ONLY = {"NewType", "TypeVar", "ParamSpec", "cast", "warn"}
"""Calls whose arguments are for people or for the type checker."""
_KEYWORDS_OF_NO_BUG = {"slots", "frozen", "kw_only", "repr", "strict", "description", "encoding"}
_WORD = re.compile(r"[\w.*>/:-]+\Z")
"""Text that a program reads rather than a person: a key, a name, a subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    path: Path
    line: int
    operator: str
    """What was done, as `< to <=`."""
    old: str
    """The line's text, without indentation."""
    new: str
    source: bytes
    lines: range
    """The lines of its statement: who runs one of them may notice."""
    names: frozenset[str] = frozenset()
    """Not empty where the statement runs at import: what it defines."""

    def compiled(self) -> CodeType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for `1 is not x`
            return compile(self.source, str(self.path), "exec", dont_inherit=True)


def unchanged(path: Path) -> Mutant:
    """No bug at all: no test may find it."""
    source = path.read_bytes()
    return Mutant(path=path, line=1, operator="none", old="", new="", source=source, lines=range(1))


def mutants_of(path: Path, *, required: dict[str, set[str]] | None = None) -> list[Mutant]:
    """Every mutant of a file, in the order of the lines.

    `required`: the parameters without a default, by the name of what is called; see
    `required_parameters`. A call cannot do without these, and no mutant drops one.
    """
    finder = _Finder(path, required or {})
    finder.visit(ast.parse(finder.source))
    unique = {(each.source, each.line): each for each in finder.found}
    return sorted(unique.values(), key=lambda each: each.line)


def required_parameters(paths: Iterator[Path]) -> dict[str, set[str]]:
    """By the name of a function or class: the keywords that none of that name does without."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, _Function):
                keywords = {
                    each.arg
                    for each, default in zip(
                        node.args.kwonlyargs, node.args.kw_defaults, strict=True
                    )
                    if default is None
                }
                plain = node.args.args[: len(node.args.args) - len(node.args.defaults)]
                name, needed = node.name, keywords | {each.arg for each in plain}
            elif isinstance(node, ast.ClassDef):
                fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
                init = [
                    each
                    for each in node.body
                    if isinstance(each, ast.FunctionDef) and each.name == "__init__"
                ]
                name = node.name
                needed = {ast.unparse(each.target) for each in fields if each.value is None}
                for each in init:
                    needed = {
                        argument.arg
                        for argument, default in zip(
                            each.args.kwonlyargs, each.args.kw_defaults, strict=True
                        )
                        if default is None
                    }
            else:
                continue
            found[name] = found[name] & needed if name in found else needed
    return found


@dataclass(slots=True)
class _Finder(ast.NodeVisitor):
    path: Path
    required: dict[str, set[str]]
    source: bytes = b""
    found: list[Mutant] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _functions: list[_Function] = field(default_factory=list)
    _classes: list[str] = field(default_factory=list)
    _statement: range = range(0)
    _names: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.source = self.path.read_bytes()
        self._starts = [0]
        for line in self.source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    # --- places in the text ---------------------------------------------------------------

    def _span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt | ast.keyword)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self._starts[node.lineno - 1] + node.col_offset,
            self._starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.source[start:end].decode()

    def _replace(self, operator: str, start: int, end: int, new: str) -> None:
        before = self.source[start:end]
        new += "\n" * (before.count(b"\n") - new.count("\n")) if new == "pass" else ""
        source = self.source[:start] + new.encode() + self.source[end:]
        line = self.source[:start].count(b"\n") + 1
        self.found.append(
            Mutant(
                path=self.path,
                line=line,
                operator=operator,
                old=self.source.splitlines()[line - 1].decode().strip(),
                new=source.splitlines()[line - 1].decode().strip(),
                source=source,
                lines=self._statement,
                names=self._names,
            )
        )

    def _instead(self, operator: str, node: ast.AST, new: str) -> None:
        self._replace(operator, *self._span(node), new)

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace an operator: the only text between two operands but brackets and comments."""
        start, end = self._span(left)[1], self._span(right)[0]
        gap = re.sub(rb"#[^\n]*", lambda each: b" " * len(each.group()), self.source[start:end])
        pattern = rb"\s+".join(re.escape(word.encode()) for word in old.split())
        match = re.search(pattern, gap)
        assert match is not None, (self.path, gap)
        self._replace(f"{old} to {new}", start + match.start(), start + match.end(), new)

    # --- statements -----------------------------------------------------------------------

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.pattern):
            return  # has a grammar of its own
        if isinstance(node, ast.stmt) and not isinstance(node, ast.ClassDef):
            self._enter_statement(node)
            if _does_nothing(node):
                return
            self._removals(node)
        ast.NodeVisitor.visit(self, node)  # `super()` does not know a class with slots

    def _enter_statement(self, node: ast.stmt) -> None:
        body = getattr(node, "body", None)
        if isinstance(node, ast.Match):
            body = [node.cases[0].pattern]
        end = body[0].lineno - 1 if body else node.end_lineno
        assert end is not None
        self._statement = range(node.lineno, max(node.lineno, end) + 1)
        self._names = frozenset()
        if not self._functions:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            named = {each.id for each in targets if isinstance(each, ast.Name)}
            self._names = frozenset(named | set(self._classes[-1:])) or frozenset({""})

    def _removals(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(value=ast.Call() | ast.Await()) if "checkpoint" not in self._text(node):
                self._instead("removed", node, "pass")
            case ast.Assign() if self._was_set_before(node):
                self._instead("removed", node, "pass")
            case ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break() | ast.Delete():
                self._instead("removed", node, "pass")
            case ast.Return(value=None):
                self._instead("removed", node, "pass")
            case ast.Return(value=ast.Constant(value=None)):
                pass
            case ast.Return(value=ast.expr() as value):
                self._instead("return None", value, "None")
            case _:
                pass

    def _was_set_before(self, node: ast.Assign) -> bool:
        """Without it there would be another value, rather than a name that is not there."""
        if not self._functions or self._functions[-1].name == "__init__":
            return False
        named = {each.id for each in node.targets if isinstance(each, ast.Name)}
        if len(named) < len(node.targets):
            return True
        arguments = {
            each.arg for each in ast.walk(self._functions[-1].args) if isinstance(each, ast.arg)
        }
        return bool(named & arguments) or any(
            isinstance(each, ast.Name)
            and each.id in named
            and isinstance(each.ctx, ast.Store)
            and each.lineno < node.lineno
            for each in ast.walk(self._functions[-1])
        )

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def _visit_function(self, node: _Function) -> None:
        assert node.end_lineno is not None
        if node.name == "__repr__":
            return
        # A default is evaluated at import, and matters to those who run the body.
        self._statement = range(node.body[0].lineno, node.end_lineno + 1)
        self._functions.append(node)
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for each in node.body:
            self.visit(each)
        self._functions.pop()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._classes.append(node.name)
        for each in node.body:
            self.visit(each)
        self._classes.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None and "TypeAlias" not in ast.unparse(node.annotation):
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self._condition(node.test)
            self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for each in node.ifs:
            self._condition(each)
        self.generic_visit(node)

    # --- expressions ----------------------------------------------------------------------

    def _condition(self, node: ast.expr) -> None:
        if not isinstance(node, ast.Constant):
            self._instead("always true", node, f"(({self._text(node)}) or True)")
            self._instead("always false", node, f"(({self._text(node)}) and False)")

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right, kind in zip(operands, operands[1:], node.ops, strict=False):
            old, others = _COMPARISONS[type(kind)]
            for new in others:
                self._between(left, right, old, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, old, new)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._instead("not dropped", node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in _ARITHMETIC:
            self._between(node.left, node.right, *_ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC:
            old, new = _ARITHMETIC[type(node.op)]
            self._between(node.target, node.value, f"{old}=", f"{new}=")
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Where things stand inside of one is not known before Python 3.12."""

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._instead(f"{value} to {not value}", node, str(not value))
        elif isinstance(value, int | float):
            self._instead(f"{self._text(node)} to one more", node, f"({self._text(node)} + 1)")
        elif isinstance(value, str) and _WORD.match(value) and "\n" not in self._text(node):
            text = self._text(node)
            self._instead("another word", node, f"{text[:-1]}_{text[-1]}")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        if name in _SAID_ONLY or _is_logging(node):
            return
        if isinstance(node.func, ast.Name) and name in _FUNCTIONS:
            self._instead(f"{name} to {_FUNCTIONS[name]}", node.func, _FUNCTIONS[name])
        for keyword in node.keywords:
            self._without(node, keyword, name)
        self.generic_visit(node)

    def _without(self, call: ast.Call, keyword: ast.keyword, name: str) -> None:
        needed = self.required.get(name, set())
        if keyword.arg is None or keyword.arg in needed | _KEYWORDS_OF_NO_BUG:
            return
        arguments = sorted((*call.args, *call.keywords), key=self._span)
        at = arguments.index(keyword)
        operator = f"without {keyword.arg}="
        if at + 1 < len(arguments):
            start, end = self._span(keyword)[0], self._span(arguments[at + 1])[0]
            self._replace(operator, start, end, "")
        elif at > 0:
            start, end = self._span(arguments[at - 1])[1], self._span(keyword)[1]
            self._replace(operator, start, end, "")
        else:
            start, end = self._span(call.func)[1], self._span(call)[1]
            self._replace(operator, start, end, "()")


def _does_nothing(node: ast.stmt) -> bool:
    """Docstrings, assertions, imports, lines of the log, and what no object ever runs."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Call() as call):
            return _is_logging(call)
        case ast.Assign(targets=[ast.Name(id="__all__" | "__slots__")]):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError")):
            return True
        case _:
            return False


def _is_logging(call: ast.Call) -> bool:
    node: ast.expr = call
    while isinstance(node, ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and node.id == "logger"
