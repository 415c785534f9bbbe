"""What a client asks for, as a worker understands it.

Rule 1: nothing that would change the answer is passed over: a worker gets it, or it is refused.
Rule 2: what clients send by habit and has no effect here is taken, and named in the reply.
Rule 3: ranges, and what is within a tool or a schema, are the worker's to check; here is only what
it cannot say in OpenAI's words.
Rule 4: what comes out is a value or a `WorkerError` with the field's name, whatever the bytes are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec import UNSET

from trio_worker.gateway import messages, structured
from trio_worker.gateway.json_body import Object, invalid, read_object
from trio_worker.gateway.keys import Key
from trio_worker.gateway.models import Limits
from trio_worker.gateway.shapes import Chat, Common, Completion, Endpoint, UnknownFields, shaped
from trio_worker.gateway.terms import caller_of, priority_of, timeout_ms_of

IGNORED_FIELDS = "x-ignored-fields"
"""The header of a reply that names what was sent without effect."""
_IGNORED_MAX = 32
"""Names in that header."""
_TOKENS_MAX = 2**31 - 1
"""What is asked for where no worker's limit is known: more than any has."""
_PRESENTABLE = re.compile(r"\A[A-Za-z0-9_.-]{1,64}\Z")


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
    choices: int = 1
    """Answers to it."""
    spelled: structured.Spelled = structured.AS_IT_IS
    """What the client calls the places of `fields`, where it calls them otherwise."""

    def ignored_header(self) -> dict[str, str]:
        """The header that names what was sent without effect, if anything was."""
        names = [name for name in self.ignored if _PRESENTABLE.match(name)][:_IGNORED_MAX]
        return {IGNORED_FIELDS: ", ".join(names)} if names else {}


_HANDED_ON = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    *("grammar", "n", "response_format"),
)
"""What a worker has under the same name and in the same form, for both endpoints."""
_HANDED_ON_OF_CHATS = (
    *("top_logprobs", "reasoning_effort", "max_reasoning_tokens"),
    *("enable_thinking", "chat_template_kwargs"),
)
_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_OF_NO_TOOL = ("auto", "none")
"""The choices that ask for nothing, where the list of tools is empty."""


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
    ignore_unknown = rules.unknown_fields is UnknownFields.IGNORE
    asked, ignored = shaped(endpoint, given, ignore_unknown=ignore_unknown)
    constraint, spelled = structured.to_wire(given)
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
    content, unused = _content(asked, ignore_unknown=ignore_unknown)
    ignored |= unused | unused_names | _check_stream_options(asked)
    fields: Object = {
        **content,
        **_handed_on(asked),
        **constraint,
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
        choices=asked.n or 1,
        spelled=spelled,
    )


def _check_stream_options(asked: Common) -> set[str]:
    options = asked.stream_options
    if options is None:
        return set()
    if not asked.stream:
        raise invalid("stream_options", "only together with stream: true")
    unused = ("include_obfuscation", "continuous_usage_stats")
    return {f"stream_options.{name}" for name in unused if getattr(options, name) is not UNSET}


def _content(asked: Chat | Completion, *, ignore_unknown: bool) -> tuple[Object, set[str]]:
    """What the answer is to, and the names of what had no effect in it."""
    if isinstance(asked, Chat):
        wire, unused = messages.to_wire(asked.messages, ignore_unknown=ignore_unknown)
        tools, idle = _tools(asked)
        return {"messages": wire, **tools}, unused | idle
    prompt = asked.prompt
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise invalid("prompt", "expected text, or an array of one text")
    return {"prompt": prompt}, set()


def _tools(asked: Chat) -> tuple[Object, set[str]]:
    """The tools, and what is said of them; and the names of what says nothing of no tools."""
    said = {name: getattr(asked, name) for name in _OF_TOOLS}
    said = {name: value for name, value in said.items() if value is not UNSET}
    if said.get("tools") != []:
        return said, set()
    del said["tools"]
    idle = {name for name, value in said.items() if name != "tool_choice" or value in _OF_NO_TOOL}
    return {name: value for name, value in said.items() if name not in idle}, idle


def _handed_on(asked: Chat | Completion) -> Object:
    names = (*_HANDED_ON, *(_HANDED_ON_OF_CHATS if isinstance(asked, Chat) else ()))
    values: Object = {name: getattr(asked, name) for name in names}
    if asked.seed is not None and asked.seed >= 0:
        values["seed"] = asked.seed
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    # No text at all ends nothing.
    values["stop"] = [each for each in stop if each] or UNSET
    return {name: value for name, value in values.items() if value is not UNSET}


def _max_tokens(asked: Common, limits: Limits) -> int | None:
    """The tokens asked for, no more than a worker allows; None is as many as it allows."""
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens", "it is the old name of max_completion_tokens; send one of them")
    wanted = new if old is None else old
    return None if wanted is None else min(wanted, limits.max_tokens or _TOKENS_MAX)
