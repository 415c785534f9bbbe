"""What a client asks for, as a worker understands it.

Rule 1: nothing that would change the answer is passed over: a worker gets it, or it is refused.
Rule 2: what clients send by habit and has no effect here is taken, and named in the reply.
Rule 3: ranges are the worker's to check; here is only what it cannot say in OpenAI's words.
Rule 4: what comes out is a value or a `WorkerError` with the field's name, whatever the bytes are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.json_body import Object, quoted, read_object
from trio_worker.gateway.keys import Key
from trio_worker.gateway.messages import to_wire
from trio_worker.gateway.models import Limits
from trio_worker.gateway.terms import caller_of, priority_of, timeout_ms_of
from trio_worker.wire.native import SEED_END

IGNORED_FIELDS = "x-ignored-fields"
"""The header of a reply that names what was sent without effect."""
_IGNORED_MAX = 32
"""Names in that header."""
_TOKENS_MAX = 2**31 - 1
"""What is asked for where no worker's limit is known: more than any has."""
_PRESENTABLE = re.compile(r"\A[A-Za-z0-9_.-]{1,64}\Z")
_QUOTED_MAX = 256
"""Characters of a fault's description, which may quote what the caller sent."""


class Endpoint(StrEnum):
    """Where requests are sent to: the path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class UnknownFields(StrEnum):
    """What becomes of a field that OpenAI does not have either."""

    REFUSE = "refuse"
    IGNORE = "ignore"


class Effect(StrEnum):
    """What becomes of a known field."""

    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"
    """Unless it holds one of `HARMLESS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for all requests; taken from the configuration once."""

    body_limit_bytes: int
    timeout_ms: int
    """Of a request that names none."""
    unknown_fields: UnknownFields = UnknownFields.REFUSE


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request of a client, read."""

    endpoint: Endpoint
    fields: Object
    """What to send to a worker, but for `request_id`."""
    model: str | None
    stream: bool
    timeout_ms: int
    include_usage: bool
    """Whether the stream is to end with a chunk that holds nothing but the usage."""
    service_tier: str | None
    """To be said again in a chat's answer."""
    ignored: tuple[str, ...]
    """The names of what was sent without effect."""

    def ignored_header(self) -> dict[str, str]:
        """The header that names what was sent without effect, if anything was."""
        names = [name for name in self.ignored if _PRESENTABLE.match(name)][:_IGNORED_MAX]
        return {IGNORED_FIELDS: ", ".join(names)} if names else {}


_Count: TypeAlias = Annotated[int, Meta(ge=1)]
_Tier: TypeAlias = Literal["auto", "default", "flex", "scale", "priority", "fast"]


class _StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Any = UNSET
    continuous_usage_stats: Any = UNSET


class _Common(Struct, frozen=True, kw_only=True):
    """What both endpoints understand."""

    model: str | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    min_p: float | UnsetType = UNSET
    repetition_penalty: float | UnsetType = UNSET
    presence_penalty: float | UnsetType = UNSET
    frequency_penalty: float | UnsetType = UNSET
    logit_bias: dict[str, float] | UnsetType = UNSET
    seed: Annotated[int, Meta(ge=-1, lt=SEED_END)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    service_tier: _Tier | None = None
    priority: int | str | None = None
    timeout_ms: _Count | None = None
    user: Any = None
    safety_identifier: Any = None


class _Chat(_Common, frozen=True, kw_only=True):
    messages: Any
    logprobs: bool | UnsetType = UNSET
    top_logprobs: int | UnsetType = UNSET


class _Completion(_Common, frozen=True, kw_only=True):
    prompt: Any
    logprobs: int | UnsetType = UNSET


_SHAPES: dict[Endpoint, type[_Chat | _Completion]] = {
    Endpoint.CHAT: _Chat,
    Endpoint.COMPLETIONS: _Completion,
}
_HANDED_ON = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
)
"""What a worker has under the same name and in the same form, for both endpoints."""
_WITHOUT_EFFECT = frozenset(
    {
        *("metadata", "moderation", "store", "reasoning_effort", "verbosity"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("function_call", "parallel_tool_calls", "tool_choice"),
    }
)
"""Taken whatever they hold; the last three because without tools there is nothing to choose."""
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tools": ([],),
    "web_search_options": (),
}
"""What no worker can do yet, with the values that ask for nothing of it."""
_CHOICE_OF = {"tools": "tool_choice", "functions": "function_call"}


def known_fields(endpoint: Endpoint) -> frozenset[str]:
    """The names that are no unknown fields there, refused ones too."""
    return frozenset(effects(endpoint))


def effects(endpoint: Endpoint) -> dict[str, Effect]:
    """What becomes of each field that is known there."""
    return {
        **dict.fromkeys(_SHAPES[endpoint].__struct_fields__, Effect.HONOURED),
        **dict.fromkeys(_WITHOUT_EFFECT, Effect.IGNORED),
        **dict.fromkeys(HARMLESS, Effect.REFUSED),
    }


def read_request(
    endpoint: Endpoint,
    body: bytes,
    headers: Mapping[str, str],
    *,
    key: Key,
    rules: Rules,
    limits_of: Callable[[str | None], Limits],
) -> Asked:
    """What is asked for. Names of headers are in lower case.

    `limits_of` is called with the name of the model, None for any, and may raise `ModelNotFound`.
    Raises `InvalidRequest`, with the name in `details.field`, and `PayloadTooLarge`.
    """
    given = read_object(body, limit_bytes=rules.body_limit_bytes)
    ignored = _check_names(endpoint, given, rules.unknown_fields)
    ignored |= _check_unsupported(given)
    asked = _shaped(endpoint, given)
    limits = limits_of(asked.model)
    names = {"safety_identifier": asked.safety_identifier, "user": asked.user}
    caller, unused_names = caller_of(names, key)
    timeout_ms = timeout_ms_of(
        asked.timeout_ms,
        headers,
        silence_ends_it=not asked.stream,
        default_ms=rules.timeout_ms,
        limit_ms=limits.timeout_ms,
    )
    content, unused = _content(asked, ignore_unknown=rules.unknown_fields is UnknownFields.IGNORE)
    ignored |= unused | unused_names | _check_stream_options(asked)
    fields: Object = {
        **content,
        **_sampling(asked),
        "fit_max_tokens": True,
        "priority": priority_of(
            asked.priority, asked.service_tier, headers, key=key, levels=limits.priority_levels
        ),
        "timeout_ms": timeout_ms,
        "stream": asked.stream,
    }
    optional = {
        "model": asked.model,
        "max_tokens": _max_tokens(asked, limits),
        "caller": caller,
    }
    fields.update((name, value) for name, value in optional.items() if value is not None)
    return Asked(
        endpoint=endpoint,
        fields=fields,
        model=asked.model,
        stream=asked.stream,
        timeout_ms=timeout_ms,
        include_usage=asked.stream_options is not None and bool(asked.stream_options.include_usage),
        service_tier=asked.service_tier,
        ignored=tuple(sorted(ignored)),
    )


def _check_names(endpoint: Endpoint, given: Object, unknown_fields: UnknownFields) -> set[str]:
    """The unknown fields, if they are to be ignored."""
    known = known_fields(endpoint)
    unknown = [name for name in given if name not in known]
    if unknown and unknown_fields is UnknownFields.REFUSE:
        raise _unknown_field(endpoint, unknown[0])
    return set(unknown)


def _unknown_field(endpoint: Endpoint, name: str) -> InvalidRequest:
    other = Endpoint.COMPLETIONS if endpoint is Endpoint.CHAT else Endpoint.CHAT
    near = difflib.get_close_matches(quoted(name), sorted(known_fields(endpoint)), n=1)
    hint = ""
    if name in known_fields(other):
        hint = f"; it is one of {other}"
    elif near:
        hint = f"; did you mean {near[0]}?"
    return InvalidRequest(
        f"{quoted(name)} is not a field of {endpoint}{hint}", details={"field": quoted(name)}
    )


def _check_unsupported(given: Object) -> set[str]:
    """What is there but has no effect; what would have one that no worker can give is refused."""
    ignored = {name for name in given if name in _WITHOUT_EFFECT}
    for name, harmless in HARMLESS.items():
        if name not in given or given[name] in harmless:
            continue
        if name in _CHOICE_OF and given.get(_CHOICE_OF[name]) == "none":
            ignored.add(name)
            continue
        instead = " or ".join(msgspec.json.encode(value).decode() for value in harmless)
        raise _invalid(
            name,
            "this server cannot do that yet; leave it out" + (instead and f", or send {instead}"),
        )
    return ignored


def _shaped(endpoint: Endpoint, given: Object) -> _Chat | _Completion:
    needed = "messages" if endpoint is Endpoint.CHAT else "prompt"
    if needed not in given:
        raise _invalid(needed, "it is needed, and not there")
    try:
        return msgspec.convert(given, _SHAPES[endpoint])
    except msgspec.ValidationError as exc:
        # `Expected … - at `$.a[0].b``; the last such words, for others may be the caller's own.
        what, _, path = str(exc).rpartition(" - at `$.")
        where = path.removesuffix("`")
        raise _invalid(quoted(where), what[:_QUOTED_MAX]) from exc


def _check_stream_options(asked: _Common) -> set[str]:
    options = asked.stream_options
    if options is None:
        return set()
    if not asked.stream:
        raise _invalid("stream_options", "only together with stream: true")
    unused = ("include_obfuscation", "continuous_usage_stats")
    return {f"stream_options.{name}" for name in unused if getattr(options, name) is not UNSET}


def _content(asked: _Chat | _Completion, *, ignore_unknown: bool) -> tuple[Object, set[str]]:
    """What the answer is to, and the names of what had no effect in it."""
    if isinstance(asked, _Chat):
        messages, unused = to_wire(asked.messages, ignore_unknown=ignore_unknown)
        return {"messages": messages}, unused
    prompt = asked.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise _invalid("prompt", "expected text, or an array of one text")
    return {"prompt": prompt}, set()


def _sampling(asked: _Chat | _Completion) -> Object:
    values: Object = {name: getattr(asked, name) for name in _HANDED_ON}
    if isinstance(asked, _Chat):
        values["top_logprobs"] = asked.top_logprobs
    if asked.seed is not None and asked.seed >= 0:
        values["seed"] = asked.seed
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    # No text at all ends nothing.
    values["stop"] = [each for each in stop if each] or UNSET
    return {name: value for name, value in values.items() if value is not UNSET}


def _max_tokens(asked: _Common, limits: Limits) -> int | None:
    """The tokens asked for, no more than a worker allows; None is as many as it allows."""
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise _invalid(
            "max_tokens", "it is the old name of max_completion_tokens; send one of them"
        )
    wanted = new if old is None else old
    return None if wanted is None else min(wanted, limits.max_tokens or _TOKENS_MAX)


def _invalid(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {what}", details={"field": name})
