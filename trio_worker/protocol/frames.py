"""What the worker and the engine process say to each other.

A frame's body is a MessagePack array that begins with the name of what it is. Frames go over a
socket pair passed by file descriptor: nothing a library prints can corrupt them.

There are two lines, on each of which every question is answered, in order: `control` (Hello, then
Work after Work, each answered by a Report, on the engine's MLX thread) and `tokenise`, on which
several questions may be under way. While the model loads
the engine sends `Progress` frames on the control line, then its `EngineInfo` or `LoadFailed`.
"""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import msgspec

from trio_worker.protocol.framing import FrameError, framed
from trio_worker.protocol.prompt import ANYTHING, Message, Prompt, Wanted
from trio_worker.protocol.turn import EngineInfo, Report, Work
from trio_worker.protocol.value import Value

PREWARMING = "prewarming"
"""The `step` of the last `Progress`: from here on the engine computes, and must not take long."""
_T = TypeVar("_T")


# --- worker → engine ----------------------------------------------------------------------


class Hello(Value, frozen=True, kw_only=True, tag=True):
    """The first frame: what to load, and how to behave until the end of the process."""

    model: str
    model_name: str | None
    max_batch_size: int
    prewarm: bool
    prewarm_prompt: str
    prewarm_max_tokens: int
    prefix_cache_bytes: int
    wired_limit_bytes: int | None = None
    """Metal's wired limit; None leaves it as the system has it."""
    allocator_cache_bytes: int | None = None
    """How much freed memory the allocator may keep; None leaves MLX's own limit."""
    answer_within_s: float = 60.0
    """An answer on either line that takes longer is not waited for."""
    general_tool_prompt: bool = False
    """A template that knows no tools is told of them in general words, rather than refused."""


class Tokenise(Value, frozen=True, kw_only=True, tag=True):
    """Exactly one of `prompt` and `messages` is set."""

    prompt: str | None
    messages: tuple[Message, ...] | None
    wanted: Wanted = ANYTHING


# --- engine → worker ----------------------------------------------------------------------


class Progress(Value, frozen=True, kw_only=True, tag=True):
    """A step of loading; `done` of `total` in `unit`; 0 for what nobody knows."""

    step: str
    done: int
    total: int
    unit: str


class LoadFailed(Value, frozen=True, kw_only=True, tag=True):
    """The model cannot be loaded, and trying again would not help."""

    message: str


class Tokenised(Value, frozen=True, kw_only=True, tag=True):
    prompt: Prompt


class TokeniseFailed(Value, frozen=True, kw_only=True, tag=True):
    """This input is refused; `message` says why."""

    message: str
    field: str | None = None
    """The place in the request that is at fault; None: the prompt or the messages."""
    is_models_fault: bool = False
    """The template takes more time or memory than it may: nobody's input is to blame."""


ToEngine: TypeAlias = Hello | Work | Tokenise
FromEngine: TypeAlias = Progress | EngineInfo | LoadFailed | Report | Tokenised | TokeniseFailed

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(frame: ToEngine | FromEngine) -> bytes:
    """The frame's bytes, its length before them."""
    return framed(_encoder.encode(frame))


def decode_to_engine(body: bytes) -> ToEngine:
    return _decode(_to_engine, body)


def decode_from_engine(body: bytes) -> FromEngine:
    return _decode(_from_engine, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise FrameError(f"not a frame: {exc}") from exc
