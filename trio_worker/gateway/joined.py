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


class _Delta(msgspec.Struct):
    content: str = ""


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
    delta: _Delta = msgspec.field(default_factory=_Delta)
    text: str = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: tuple[_Choice]


_chunks = msgspec.json.Decoder(_Chunk)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class JoinedAnswer:
    """What a stream has said so far: no more pieces than tokens were asked for."""

    def __init__(self, *, is_chat: bool, has_logprobs: bool) -> None:
        self._is_chat = is_chat
        self._texts: list[str] = []
        self._logprobs = _Logprobs() if has_logprobs else None

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, body: bytes) -> None:
        """A chunk, but not the last. Raises `InternalError` if it is none."""
        self._take(body)

    def closing(self, body: bytes) -> bytes:
        """The whole answer, of which `body` is the last chunk. Raises as `add`."""
        finish_reason = self._take(body)
        fields: dict[str, Any] = dict(_read(_fields, body))
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": self.text, "refusal": None}
        else:
            choice["text"] = self.text
        choice |= {"logprobs": self._joined_logprobs(), "finish_reason": finish_reason}
        # Where they are already, so the order remains.
        fields["object"] = "chat.completion" if self._is_chat else "text_completion"
        fields["choices"] = [choice]
        return msgspec.json.encode(fields)

    def _take(self, body: bytes) -> str | None:
        """Take the chunk's content; its finish reason."""
        choice: _Choice = _read(_chunks, body).choices[0]
        if content := choice.delta.content if self._is_chat else choice.text:
            self._texts.append(content)
        if self._logprobs is not None and choice.logprobs is not None:
            self._logprobs.add(choice.logprobs)
        return choice.finish_reason

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
        raise InternalError("what a worker sent is no chunk of an answer") from exc
