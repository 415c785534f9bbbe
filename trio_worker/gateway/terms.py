"""On what terms a request is served: in whose name, how urgently, and for how long.

What the body says comes before what the headers say, and nobody gets more than its key allows.
Names of headers are in lower case.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from trio_worker.core.priority import NAMES, level_of
from trio_worker.errors import InvalidRequest
from trio_worker.gateway.json_body import quoted
from trio_worker.gateway.keys import CALLER, Key

_DEFAULT_PRIORITY = "medium"
"""Streamed or not: else programs that send batches of whole requests would overtake people."""
_PRIORITY_OF_TIER = {"flex": "low", "priority": "high", "fast": "high"}
_MARGIN_S = 1.0
"""By how much an error of ours is to come before a client stops waiting for it."""
_LEVEL = re.compile(r"\A[0-9]{1,4}\Z")
_TIMEOUT_MS = re.compile(r"\A[0-9]{1,12}\Z")


def caller_of(names: Mapping[str, Any], key: Key) -> tuple[str | None, set[str]]:
    """In whose name a worker is asked, and which of the fields did not say so.

    `names` are the fields that may; OpenAI lets them hold any text.
    """
    caller = key.caller
    ignored = set()
    for field, name in names.items():
        if caller is None and isinstance(name, str) and CALLER.match(name):
            caller = name
        elif name is not None:
            ignored.add(field)
    return caller, ignored


def priority_of(
    asked: int | str | None,
    tier: str | None,
    headers: Mapping[str, str],
    *,
    key: Key,
    levels: int,
) -> int | str:
    """How urgent a request is. Raises `InvalidRequest` for what is no priority."""
    field, wanted = "priority", asked
    if wanted is None and (header := headers.get("x-priority")) is not None:
        field, wanted = "X-Priority", int(header) if _LEVEL.match(header) else header
    if wanted is None:
        wanted = _PRIORITY_OF_TIER.get(tier or "", _DEFAULT_PRIORITY)
    if isinstance(wanted, str) and wanted in NAMES:
        level = level_of(wanted, levels)
    elif isinstance(wanted, int) and 0 <= wanted < levels:
        level = wanted
    else:
        what = f"{quoted(str(wanted))!r} is none of {', '.join(NAMES)}, 0…{levels - 1}"
        raise InvalidRequest(f"{field}: {what}", details={"field": field})
    if key.most_urgent is not None and level < level_of(key.most_urgent, levels):
        return key.most_urgent
    return wanted


def timeout_ms_of(
    asked: int | None,
    headers: Mapping[str, str],
    *,
    silence_ends_it: bool,
    default_ms: int,
    limit_ms: int | None,
) -> int:
    """How long the client waits, within what workers allow, where that is known.

    `silence_ends_it` says that nothing is sent before the answer is whole, so that a client
    which does not wait longer for a byte does not wait longer for the answer. Raises
    `InvalidRequest` for a header of ours that is no time.
    """
    wanted = asked if asked is not None else _timeout_header_ms(headers)
    if wanted is None and silence_ends_it:
        wanted = _read_timeout_ms(headers)
    if wanted is None:
        wanted = default_ms
    return wanted if limit_ms is None else min(wanted, limit_ms)


def _timeout_header_ms(headers: Mapping[str, str]) -> int | None:
    text = headers.get("x-timeout-ms")
    if text is None:
        return None
    if not _TIMEOUT_MS.match(text) or int(text) == 0:
        raise InvalidRequest(
            "X-Timeout-Ms: expected a number of milliseconds", details={"field": "X-Timeout-Ms"}
        )
    return int(text)


def _read_timeout_ms(headers: Mapping[str, str]) -> int | None:
    """What a client that stops reading leaves for the answer; its header is in seconds.

    Nobody writes it by hand, so what is not a time is passed over.
    """
    try:
        silence_s = float(headers.get("x-stainless-read-timeout", ""))
    except ValueError:
        return None
    if not (math.isfinite(silence_s) and 0 < silence_s < 1e9):
        return None
    return max(1, round(1000 * max(silence_s - _MARGIN_S, silence_s / 2)))
