"""A whole answer, put together from the chunks of a stream.

Workers are asked for streams even where the caller wants the answer whole: one that says nothing
for a while is gone, and another one can be asked, while a whole answer could only be waited for
until the deadline. Nor does its length have to fit into one message.

Rule: what comes out is what the worker would have written, byte by byte.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trio_worker.errors import InternalError


class _Function(msgspec.Struct):
    name: str = ""
    arguments: str = ""


class _Call(msgspec.Struct):
    """The first piece of a call has all but its arguments; those follow."""

    index: int
    id: str = ""
    function: _Function = msgspec.field(default_factory=_Function)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str = ""
    tool_calls: list[_Call] = []


class _Logprobs(msgspec.Struct):
    """Both forms: a chat has `content`, a completion all others."""

    content: list[msgspec.Raw] = []
    tokens: list[msgspec.Raw] = []
    token_logprobs: list[msgspec.Raw] = []
    top_logprobs: list[msgspec.Raw] | None = None
    text_offset: list[msgspec.Raw] = []

    def add(self, more: _Logprobs) -> None:
        self.content += more.content
        self.token_logprobs += more.token_logprobs
        self.text_offset += more.text_offset
        self.tokens += more.tokens
        if more.top_logprobs is not None:
            self.top_logprobs = self.top_logprobs or []
            self.top_logprobs += more.top_logprobs


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta = msgspec.field(default_factory=_Delta)
    text: str = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice]


_chunks = msgspec.json.Decoder(_Chunk)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NO_CHUNK = "what a worker sent is no chunk of an answer"


class JoinedAnswer:
    """What a stream has said so far: no more pieces than tokens were asked for."""

    def __init__(self, *, is_chat: bool, has_logprobs: bool, choices: int = 1) -> None:
        self._is_chat = is_chat
        self._choices = [
            _JoinedChoice(is_chat=is_chat, has_logprobs=has_logprobs) for _ in range(choices)
        ]

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self._choices[0].text

    def add(self, body: bytes) -> None:
        """A chunk, but not the last. Raises `InternalError` if it is none."""
        if not self._take(body):
            raise InternalError(_NO_CHUNK)

    def closing(self, body: bytes) -> bytes:
        """The whole answer, of which `body` is the last chunk. Raises as `add`."""
        self._take(body)
        fields: dict[str, Any] = dict(_read(_fields, body))
        if any(choice.finish_reason is None for choice in self._choices):
            raise InternalError("a worker has ended its answer before all of it had ended")
        # Where they are already, so the order remains.
        fields["object"] = "chat.completion" if self._is_chat else "text_completion"
        fields["choices"] = [choice.whole(index) for index, choice in enumerate(self._choices)]
        return msgspec.json.encode(fields)

    def _take(self, body: bytes) -> bool:
        """Take what the chunk has of each choice; whether it has anything of any."""
        chunk: _Chunk = _read(_chunks, body)
        for piece in chunk.choices:
            if not 0 <= piece.index < len(self._choices):
                raise InternalError(_NO_CHUNK)
            self._choices[piece.index].take(piece)
        return bool(chunk.choices)


class _JoinedChoice:
    """One of the answers to a request."""

    def __init__(self, *, is_chat: bool, has_logprobs: bool) -> None:
        self.finish_reason: str | None = None
        self._is_chat = is_chat
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []
        self._arguments: list[list[str]] = []
        """Of each call."""
        self._logprobs = _Logprobs() if has_logprobs else None

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def take(self, piece: _Choice) -> None:
        """Raises `InternalError` for more of a call that has not begun."""
        delta = piece.delta
        if content := delta.content if self._is_chat else piece.text:
            self._texts.append(content)
        if delta.reasoning_content:
            self._reasoning.append(delta.reasoning_content)
        for call in delta.tool_calls:
            self._take_call(call)
        if self._logprobs is not None and piece.logprobs is not None:
            self._logprobs.add(piece.logprobs)
        self.finish_reason = piece.finish_reason or self.finish_reason

    def _take_call(self, call: _Call) -> None:
        if call.index == len(self._calls):
            self._calls.append(call)
            self._arguments.append([])
        if not 0 <= call.index < len(self._calls):
            raise InternalError(_NO_CHUNK)
        self._arguments[call.index].append(call.function.arguments)

    def whole(self, index: int) -> dict[str, Any]:
        text: str | None = self.text
        logprobs = self._joined_logprobs()
        if self._calls and not text:
            # There is no text, rather than an empty one, nor any token of it.
            text = logprobs = None
        part = {"message": self._message(text)} if self._is_chat else {"text": text}
        ending = {"logprobs": logprobs, "finish_reason": self.finish_reason}
        return {"index": index, **part, **ending}

    def _message(self, content: str | None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": "".join(arguments)},
                }
                for call, arguments in zip(self._calls, self._arguments, strict=True)
            ]
        return message

    def _joined_logprobs(self) -> dict[str, Any] | None:
        joined = self._logprobs
        if joined is None:
            return None
        if self._is_chat:
            return {"content": joined.content, "refusal": None}
        return {
            "tokens": joined.tokens,
            "token_logprobs": joined.token_logprobs,
            "top_logprobs": joined.top_logprobs,
            "text_offset": joined.text_offset,
        }


def _read(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise InternalError(_NO_CHUNK) from exc
