"""Reads a request: bytes in, a checked `Request` out.

It goes in three steps, so that an error reply can name the request's id whenever the body
had a usable one: `parse_body` (bytes → fields under their canonical names), `request_id_of`, and
`to_request` (fields → a checked `Request`). Whatever the bytes are, the outcome is a value or a
`WorkerError`; nothing else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import msgspec

from trio_worker.core.priority import NAMES, level_of
from trio_worker.core.request import Request
from trio_worker.errors import InvalidRequest, ModelNotFound, PayloadTooLarge
from trio_worker.protocol.turn import RequestId, Sampling
from trio_worker.wire.native.faults import place_and_fault, refused
from trio_worker.wire.native.fields import (
    CALLER,
    FIELD_NAMES,
    REQUEST_ID,
    RequestFields,
    RequestLimits,
)
from trio_worker.wire.native.messages import messages_of
from trio_worker.wire.native.wanted import wanted_of

Fields: TypeAlias = dict[str, Any]

_HALF_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_OTHER_SPELLINGS = {
    "maxTokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "modelId": "model",
    "requestId": "request_id",
    "topP": "top_p",
}
_OPENAIS_CALLERS = ("safety_identifier", "user")
"""OpenAI's fields for who asks. Any text may be in them: the first that is a `caller` is taken."""
WITHOUT_EFFECT = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "service_tier", "store"}
)
"""OpenAI's fields that would not change the answer: whatever is in them, they are passed over."""
_LOGIT_BIAS_MAX = 1024
_SAMPLING_AS_ASKED = tuple(
    name
    for name in Sampling.__annotations__
    if name not in {"logit_bias", "seed", "logprobs", "top_logprobs"}
)
"""What `Sampling` takes from the field of the same name as it is."""


def parse_body(body: bytes, limits: RequestLimits) -> Fields:
    """The fields of a request under their canonical names, without nulls and what has no effect.

    Raises `PayloadTooLarge` before looking at a body over the limit, and `InvalidRequest` if it
    is not a JSON object, or spells one field twice.
    """
    if len(body) > limits.max_body_bytes:
        raise PayloadTooLarge(
            f"the request has {len(body)} bytes; this worker takes {limits.max_body_bytes}",
            details={"bytes": len(body), "limit": limits.max_body_bytes},
        )
    try:
        decoded: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        hint = ""
        if _HALF_SURROGATE.search(body):
            hint = " (half of a surrogate pair, \\ud800 to \\udfff by itself, is not text)"
        raise InvalidRequest(f"the request is not JSON: {exc}{hint}") from exc
    except RecursionError:
        raise InvalidRequest(
            "the request is not usable: its brackets are nested too deep"
        ) from None
    if not isinstance(decoded, dict):
        raise InvalidRequest(f"the request is {_json_name(decoded)}; expected a JSON object")
    fields: Fields = {}
    spelled: dict[str, str] = {}
    key: str
    for key, value in decoded.items():
        name = _OTHER_SPELLINGS.get(key, key)
        if name in spelled:
            raise InvalidRequest(
                f"{spelled[name]} and {key} are spellings of one field; send one of them",
                details={"field": name},
            )
        spelled[name] = key
        if value is not None and name not in WITHOUT_EFFECT:
            fields[name] = value
    _settle_caller(fields)
    return fields


def _settle_caller(fields: Fields) -> None:
    """Leave `caller` alone to say who asks."""
    for name in _OPENAIS_CALLERS:
        value = fields.pop(name, None)
        if isinstance(value, str) and CALLER.match(value):
            fields.setdefault("caller", value)


def request_id_of(fields: Fields) -> RequestId | None:
    """The request's id if it has one that may be used as a subject token."""
    value = fields.get("request_id")
    if isinstance(value, str) and REQUEST_ID.match(value):
        return RequestId(value)
    return None


def to_request(
    fields: Fields, limits: RequestLimits, *, request_id: RequestId, draw_seed: Callable[[], int]
) -> Request:
    """The checked request. Raises `InvalidRequest`, with `details.field`, or `ModelNotFound`.

    `request_id` is used where the caller sent none, and `draw_seed` where there is no seed.
    """
    for name in fields:
        if name not in FIELD_NAMES:
            raise _unknown_field(name)
    try:
        asked = msgspec.convert(fields, RequestFields)
    except msgspec.ValidationError as exc:
        raise _invalid_field(exc) from exc
    if asked.model is not None and asked.model != limits.model_name:
        raise ModelNotFound(
            f"this worker serves the model {limits.model_name}, not {asked.model[:128]}",
            details={"model": limits.model_name},
        )
    if (asked.prompt is None) == (asked.messages is None):
        how = "neither is" if asked.prompt is None else "both are"
        raise InvalidRequest(
            f"send exactly one of messages and prompt; {how} there", details={"field": "messages"}
        )
    return Request(
        request_id=request_id,
        prompt=asked.prompt,
        messages=messages_of(asked.messages or ()),
        max_tokens=_max_tokens(asked, limits.max_tokens_limit),
        fit_max_tokens=asked.fit_max_tokens,
        sampling=_sampling(asked, draw_seed),
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        stream=asked.stream,
        priority=_level(asked, limits),
        timeout_s=(
            _at_most("timeout_ms", asked.timeout_ms, limits.timeout_limit_ms)
            or limits.default_timeout_ms
        )
        / 1000,
        caller=asked.caller,
        wanted=wanted_of(asked, limits),
        choices=asked.n,
        include_usage=_include_usage(asked),
    )


def _unknown_field(name: str) -> InvalidRequest:
    known = (*FIELD_NAMES, *_OTHER_SPELLINGS, *_OPENAIS_CALLERS, *sorted(WITHOUT_EFFECT))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InvalidRequest(
        f"{name[:64]} is not a field of a request{hint}", details={"field": name[:64]}
    )


def _invalid_field(exc: msgspec.ValidationError) -> InvalidRequest:
    where, what = place_and_fault(exc)
    return refused(f"{where}: {what}", where.removesuffix("[...]"))


def _json_name(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _max_tokens(asked: RequestFields, limit: int) -> int | None:
    if asked.fit_max_tokens:
        return limit if asked.max_tokens is None else min(asked.max_tokens, limit)
    return _at_most("max_tokens", asked.max_tokens, limit)


def _at_most(name: str, value: int | None, limit: int) -> int | None:
    if value is not None and value > limit:
        raise InvalidRequest(
            f"{name}: {value} is over this worker's limit of {limit}",
            details={"field": name, "limit": limit},
        )
    return value


def _sampling(asked: RequestFields, draw_seed: Callable[[], int]) -> Sampling:
    return Sampling(
        **{name: getattr(asked, name) for name in _SAMPLING_AS_ASKED},
        logit_bias=_logit_bias(asked.logit_bias or {}),
        seed=asked.seed if asked.seed is not None else draw_seed(),
        logprobs=asked.logprobs is not False,
        top_logprobs=_top_logprobs(asked),
    )


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if len(bias) > _LOGIT_BIAS_MAX:
        raise InvalidRequest(
            f"logit_bias: {len(bias)} entries; at most {_LOGIT_BIAS_MAX} are taken",
            details={"field": "logit_bias", "limit": _LOGIT_BIAS_MAX},
        )
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise InvalidRequest(
                f"logit_bias: {token[:64]!r} is not the number of a token",
                details={"field": "logit_bias"},
            )
    return tuple(sorted((int(token), value) for token, value in bias.items()))


def _top_logprobs(asked: RequestFields) -> int:
    """How many likely tokens to report; completions have the number in `logprobs` itself."""
    if isinstance(asked.logprobs, bool):
        if asked.top_logprobs and not asked.logprobs:
            raise InvalidRequest(
                "top_logprobs: needs logprobs: true beside it", details={"field": "top_logprobs"}
            )
        return asked.top_logprobs
    if asked.prompt is None:
        raise InvalidRequest(
            "logprobs: with messages it is true or false; the number is top_logprobs",
            details={"field": "logprobs"},
        )
    if asked.top_logprobs:
        raise InvalidRequest(
            "top_logprobs: logprobs has the number already; send one of them",
            details={"field": "top_logprobs"},
        )
    return asked.logprobs


def _include_usage(asked: RequestFields) -> bool:
    options = asked.stream_options
    if options is not None and not asked.stream:
        raise refused(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            "stream_options",
        )
    return options is not None and bool(options.include_usage)


def _level(asked: RequestFields, limits: RequestLimits) -> int:
    priority, levels = asked.priority, limits.priority_levels
    if priority is None:
        return limits.default_streaming if asked.stream else limits.default_buffered
    if isinstance(priority, str):
        if priority in NAMES:
            return level_of(priority, levels)
    elif 0 <= priority < levels:
        return priority
    raise InvalidRequest(
        f"priority: {str(priority)[:64]!r} is none of high, medium, low, 0…{levels - 1}",
        details={"field": "priority", "levels": levels},
    )
