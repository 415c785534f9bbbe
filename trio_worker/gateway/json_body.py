"""Reads a body: any bytes are a JSON object, or an error that says why they are none.

Stricter than a parser has to be: what two readers could understand in two ways is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import msgspec

from trio_worker.errors import InvalidRequest, PayloadTooLarge

Object: TypeAlias = dict[str, Any]

_HALF_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEPTH_MAX = 200
"""Brackets within brackets. An encoder takes fewer the more calls it is called from."""
_TOO_DEEP = "the body is not usable: its brackets are nested too deep"
_QUOTED_MAX = 64
"""Characters of what the caller sent that an error repeats."""


class _Repeated(Exception):
    """One object has a name twice."""


def read_object(body: bytes, *, limit_bytes: int) -> Object:
    """The fields of a JSON object, nulls left out: null means absent.

    Raises `PayloadTooLarge` before looking at a body over the limit, and `InvalidRequest` for what
    is not JSON, for numbers out of range (there is no NaN in JSON), for text with half of a
    surrogate pair, for a name twice in one object, and for brackets nested too deep.
    """
    if len(body) > limit_bytes:
        raise PayloadTooLarge(
            f"the body has {len(body)} bytes; at most {limit_bytes} are taken",
            details={"bytes": len(body), "limit": limit_bytes},
        )
    try:
        decoded: Any = msgspec.json.decode(body)
        # The parser keeps the last of two fields of one name, and another one might the first.
        json.loads(body, object_pairs_hook=_refuse_repeated)
    except _Repeated as exc:
        raise InvalidRequest(f"{quoted(str(exc))} is there twice in one object") from None
    except RecursionError:
        raise InvalidRequest(_TOO_DEEP) from None
    except (msgspec.MsgspecError, ValueError) as exc:
        hint = ""
        if _HALF_SURROGATE.search(body):
            hint = " (half of a surrogate pair, \\ud800 to \\udfff by itself, is not text)"
        raise InvalidRequest(f"the body is not JSON: {exc}{hint}") from exc
    if not isinstance(decoded, dict):
        raise InvalidRequest("the body is JSON, but not an object: {…}")
    if is_too_deep(decoded):
        raise InvalidRequest(_TOO_DEEP)
    return {name: value for name, value in decoded.items() if value is not None}


def is_too_deep(value: Any) -> bool:
    """Whether it has more brackets within brackets than can be written again anywhere."""
    level, depth = [value], 0
    while level and depth < _DEPTH_MAX:
        within = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for each in chain.from_iterable(within) if isinstance(each, (dict, list))]
        depth += 1
    return bool(level)


def invalid(where: str, what: str) -> InvalidRequest:
    """What is wrong at a place in the body, which `details.field` names."""
    return InvalidRequest(f"{where}: {what}", details={"field": where})


def quoted(text: str) -> str:
    """The beginning of what a caller sent, fit for a message."""
    return text if len(text) <= _QUOTED_MAX else f"{text[:_QUOTED_MAX]}…"


def _refuse_repeated(pairs: Sequence[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise _Repeated(name)
        seen.add(name)
