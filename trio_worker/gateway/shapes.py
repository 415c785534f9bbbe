"""The fields that a request may have, and what becomes of each.

One is honoured, and has a shape; is taken although nothing follows from it; or is refused, unless
it asks for nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.json_body import Object, invalid, quoted
from trio_worker.wire.native import SEED_END
from trio_worker.wire.native.faults import place_and_fault


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


_Count: TypeAlias = Annotated[int, Meta(ge=1)]
_Tier: TypeAlias = Literal["auto", "default", "flex", "scale", "priority", "fast"]


class _StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Any = UNSET
    continuous_usage_stats: Any = UNSET


class Common(Struct, frozen=True, kw_only=True):
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
    n: Annotated[int, Meta(ge=1, le=128)] | UnsetType = UNSET
    response_format: Any = UNSET
    grammar: Any = UNSET
    structured_outputs: Any = UNSET
    guided_json: Any = UNSET
    guided_regex: Any = UNSET
    guided_choice: Any = UNSET
    guided_grammar: Any = UNSET
    service_tier: _Tier | None = None
    priority: int | str | None = None
    timeout_ms: _Count | None = None
    user: Any = None
    safety_identifier: Any = None


class Chat(Common, frozen=True, kw_only=True):
    """What is asked with messages; what is within a tool the worker looks at."""

    messages: Any
    logprobs: bool | UnsetType = UNSET
    top_logprobs: int | UnsetType = UNSET
    tools: Any = UNSET
    tool_choice: Any = UNSET
    parallel_tool_calls: Any = UNSET
    reasoning_effort: Any = UNSET
    max_reasoning_tokens: Any = UNSET
    enable_thinking: Any = UNSET
    chat_template_kwargs: Any = UNSET


class Completion(Common, frozen=True, kw_only=True):
    """What is asked with a text to go on with."""

    prompt: Any
    logprobs: int | UnsetType = UNSET


_SHAPES: dict[Endpoint, type[Chat | Completion]] = {
    Endpoint.CHAT: Chat,
    Endpoint.COMPLETIONS: Completion,
}
_WITHOUT_EFFECT = frozenset(
    {
        *("metadata", "moderation", "store", "reasoning_effort", "verbosity"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("function_call", "parallel_tool_calls", "tool_choice"),
    }
)
"""Taken whatever they hold, where they are not honoured: a prompt has no tools to choose from, nor
a template that might look at the effort."""
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "suffix": ("",),
    "tools": ([],),
    "web_search_options": (),
}
"""What is not to be had where it is not honoured, with the values that ask for nothing of it."""
_INSTEAD = {"functions": "the old form of tools; send those"}
_CHOICE_OF = {"tools": "tool_choice", "functions": "function_call"}
"""Of what is refused: the field that may say to leave it be."""


def known_fields(endpoint: Endpoint) -> frozenset[str]:
    """The names that are no unknown fields there, refused ones too."""
    return frozenset(effects(endpoint))


def effects(endpoint: Endpoint) -> dict[str, Effect]:
    """What becomes of each field that is known there."""
    return {
        **dict.fromkeys(HARMLESS, Effect.REFUSED),
        **dict.fromkeys(_WITHOUT_EFFECT, Effect.IGNORED),
        **dict.fromkeys(_SHAPES[endpoint].__struct_fields__, Effect.HONOURED),
    }


def shaped(
    endpoint: Endpoint, given: Object, *, ignore_unknown: bool
) -> tuple[Chat | Completion, set[str]]:
    """The fields that are honoured, and the names of those that are there without effect.

    Raises `InvalidRequest`, with the name in `details.field`.
    """
    ignored = _unknown(endpoint, given, ignore_unknown=ignore_unknown)
    ignored |= _unsupported(endpoint, given)
    needed = "messages" if endpoint is Endpoint.CHAT else "prompt"
    if needed not in given:
        raise invalid(needed, "it is needed, and not there")
    try:
        return msgspec.convert(given, _SHAPES[endpoint]), ignored
    except msgspec.ValidationError as exc:
        where, what = place_and_fault(exc)
        raise invalid(quoted(where), what) from exc


def _unknown(endpoint: Endpoint, given: Object, *, ignore_unknown: bool) -> set[str]:
    """The unknown fields, if they are to be ignored."""
    known = known_fields(endpoint)
    unknown = [name for name in given if name not in known]
    if unknown and not ignore_unknown:
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


def _unsupported(endpoint: Endpoint, given: Object) -> set[str]:
    """What is there but has no effect; what would have one that no worker can give is refused."""
    by_name = effects(endpoint)
    ignored = {name for name in given if by_name.get(name) is Effect.IGNORED}
    for name in given:
        if by_name.get(name) is not Effect.REFUSED or given[name] in HARMLESS[name]:
            continue
        if name in _CHOICE_OF and given.get(_CHOICE_OF[name]) == "none":
            ignored.add(name)
            continue
        raise invalid(name, _INSTEAD.get(name) or _not_to_be_had(name))
    return ignored


def _not_to_be_had(name: str) -> str:
    values = " or ".join(msgspec.json.encode(value).decode() for value in HARMLESS[name])
    return "this server cannot do that; leave it out" + (values and f", or send {values}")
