"""What the sources say: values laid one over the other, where each came from, what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trio_worker.config.keys import quoted


class Values:
    """What the sources said so far: the tree, where each part came from, and the problems."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []
        self.is_partial = False
        """Whether the file could not be read, so that nothing can be said about pairs."""

    def complain(self, path: str, sentence: str, *, beside: Sequence[str] = ()) -> None:
        """Note a problem at `path`; of values that do not go together, `beside` are the others."""
        given = [self.origins[each] for each in (path, *beside) if each in self.origins]
        origin = given[0] if given else self.origin(path)
        self.problems.append(f"{quoted(path)}: {sentence}{f' ({origin})' if origin else ''}")

    def origin(self, path: str) -> str:
        """Where the value at `path`, or the nearest part around it, came from."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path.rpartition(".")[0]
        return ""

    def put(self, path: str, value: object, origin: str) -> None:
        """Lay one value over what is there; does nothing below what is no mapping."""
        *parents, leaf = path.split(".")
        level = self.tree
        for name in parents:
            if level.get(name) is None:
                level[name] = {}
            level = level[name]
            if not isinstance(level, dict):
                return
        level[leaf] = value
        self.origins[path] = origin

    def at(self, path: str) -> object:
        """The value at `path`, or None."""
        value: object = self.tree
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value
