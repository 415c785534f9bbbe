"""What is shown of a configuration: its values in effect, the JSON Schema, the reference."""

from __future__ import annotations

from typing import Any

import msgspec

from trio_worker.config import generated
from trio_worker.config.catalogue import KEYS, ROOT
from trio_worker.config.keys import quoted
from trio_worker.config.loading import Loaded
from trio_worker.config.secrets import is_in_file


def effective_yaml(loaded: Loaded) -> str:
    """A cluster.yaml with every key, its value in effect, and behind it where that comes from.

    Where no secret is set, it is loaded to the same configuration. In the place of a secret stands
    `***`, or null if it was read from a file, which is named in its own key.
    """
    config = loaded.config
    from_files = [name for name in ("password", "token") if is_in_file(config.nats, name)]
    nats = msgspec.structs.replace(config.nats, **dict.fromkeys(from_files))

    def remark(path: str) -> str:
        if path in [f"nats.{name}" for name in from_files]:
            return f"hidden, from {path}_file"
        source = loaded.sources.get(path)
        if source is not None:
            return quoted(source)
        derived = KEYS[path].derived if path in KEYS else None
        return f"default, {derived}" if derived else "default"

    return generated.filled(ROOT, msgspec.structs.replace(config, nats=nats), remark)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of cluster.yaml."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "cluster.yaml of trio-worker",
        "type": "object",
        "properties": {"cluster": generated.schema(ROOT)},
        "required": ["cluster"],
        "additionalProperties": False,
    }


def reference_markdown() -> str:
    """Every key with its values, default and meaning, in one table per section."""
    return generated.markdown(ROOT)
