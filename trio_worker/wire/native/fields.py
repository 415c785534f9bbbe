"""The fields that a request may have, and what a worker allows of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from trio_worker.core.request import CHOICES_MAX, SEED_END
from trio_worker.wire.native.constraints import GrammarField, ResponseFormat
from trio_worker.wire.native.messages import ChatMessage
from trio_worker.wire.native.tools import ToolChoiceField, ToolField

REQUEST_ID = re.compile(r"\A[A-Za-z0-9_-]{1,128}\Z")
CALLER = re.compile(r"\A[A-Za-z0-9_-]{1,64}\Z")

_StopString: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
_Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class _StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Without effect: nothing of ours is padded."""


class RequestFields(Struct, frozen=True, forbid_unknown_fields=True):
    """Every field a request may have; the order is the one of the documentation."""

    request_id: Annotated[str, Meta(pattern=REQUEST_ID.pattern)] | None = None
    model: str | None = None
    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    fit_max_tokens: bool = False
    n: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] = 1
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=0, lt=SEED_END)] | None = None
    stop: _StopString | Annotated[list[_StopString], Meta(max_length=16)] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    logprobs: bool | Annotated[int, Meta(ge=0, le=5)] = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    response_format: ResponseFormat | None = None
    grammar: GrammarField | None = None
    tools: list[ToolField] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: _Effort | None = None
    enable_thinking: bool | None = None
    max_reasoning_tokens: Annotated[int, Meta(ge=0)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: int | str | None = None
    timeout_ms: Annotated[int, Meta(ge=1)] | None = None
    caller: Annotated[str, Meta(pattern=CALLER.pattern)] | None = None


FIELD_NAMES = RequestFields.__struct_fields__


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What this worker allows and assumes; taken from the configuration once."""

    model_name: str
    max_tokens_limit: int
    default_timeout_ms: int
    timeout_limit_ms: int
    max_body_bytes: int
    priority_levels: int
    default_buffered: int
    """The level of a request with `stream: false` that names none."""
    default_streaming: int
    takes_tools: bool = True
    allows_lark: bool = False
    """Whether a caller's own grammars are taken: no limit holds for how long they may take."""
