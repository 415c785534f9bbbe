"""One request as its caller drives it: what to send and when, and what each message means.

Pure: `now` is passed in, in seconds of any clock. `on_trio` and `on_asyncio` do the sending
and the waiting.

Rule 1: one deadline holds for all attempts; each tells the worker what is left of it.
Rule 2: once content has been handed out, the request is not sent again.
Rule 3: every attempt carries the same request id, so that no worker runs it twice at a time.
Rule 4: that one worker has no room says nothing about the others: where any may answer, the first
retry goes out at once, since the queue group picks a member anew. Later ones wait as they are told.
Rule 5: where nobody listens, a worker may be starting again, so the request is sent again and
again, but for no longer than a grace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import msgspec

from trio_worker.errors import (
    BY_CODE,
    ErrorCode,
    InternalError,
    MessageLost,
    NoWorker,
    RequestTimeout,
    WorkerError,
)
from trio_worker.wire import native, subjects

RETRY_S = 0.25
"""On average: the wait before asking again where no worker listens, or an answer has a gap."""
NOBODY_LISTENS_GRACE_S = 5.0
"""How long it is asked again where no worker listens: a restart that loads a small model."""
LAST_WORD_S = 1.0
"""How long after the deadline the worker's own error about it is waited for."""
NO_ROOM_HERE = frozenset(
    {ErrorCode.QUEUE_FULL, ErrorCode.WORKER_DRAINING, ErrorCode.RESOURCE_LIMIT_EXCEEDED}
)
"""True of the worker that says it; another one may have room."""
_NO_ANSWER = (msgspec.MsgspecError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a message raises that is not a worker's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One message of an answer."""

    choice: int
    """Which of them the next three are of; the first, where the message holds all or none."""
    text: str
    reasoning: str
    """What the model thinks before it answers."""
    finish_reason: str | None
    usage: Mapping[str, Any] | None
    """With the last message: token counts as OpenAI names them."""
    worker: Mapping[str, Any] | None
    """With the last message: what the worker says about how it served the request."""
    body: Mapping[str, Any]
    """The whole message."""
    headers: Mapping[str, str]


def check_caller(caller: str) -> None:
    """Raise `ValueError` if this cannot be the name of a caller."""
    if not native.CALLER.match(caller):
        raise ValueError(f"{caller!r} is no caller's name: expected up to 64 of A-Z a-z 0-9 _ -")


def join(chunks: Sequence[Chunk]) -> Chunk:
    """The last chunk, with what all have said of the first choice."""
    of_first = [chunk for chunk in chunks if chunk.choice == 0]
    return replace(
        chunks[-1],
        choice=0,
        text="".join(chunk.text for chunk in of_first),
        reasoning="".join(chunk.reasoning for chunk in of_first),
        finish_reason=next((each.finish_reason for each in of_first if each.finish_reason), None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Persistence:
    """How long, and how often, a request is asked for."""

    timeout_ms: int | None
    """For requests that name none. None leaves it to the worker; then nothing but the caller bounds
    the wait."""
    attempts: int
    """How often the request is sent while workers answer that it may be; asking again where nobody
    listens does not count."""
    nobody_listens_grace_s: float
    """How long it is asked again where nobody listens; 0 is never, and infinite is until the
    deadline."""


class Exchange:
    """One request and its answer, over all attempts.

    Args:
        request: the fields of the wire format; one without a `request_id` gets `request_id`.
        caller: in whose name it is sent, on the subject that names it; to a certain worker it
            goes as the field, which proves nothing.
    """

    def __init__(
        self,
        request: Mapping[str, Any],
        *,
        request_id: str,
        worker_id: str | None,
        persistence: Persistence,
        rng: Random,
        now: float,
        caller: str | None = None,
    ) -> None:
        self._request = dict(request)
        if caller is not None:
            self._request["caller"] = caller
        self._rng = rng
        self._attempts_left = persistence.attempts
        self._another_may_have_room = worker_id is None
        self._grace_s = persistence.nobody_listens_grace_s
        self._nobody_since: float | None = None
        """When the server first said that nobody listens, with no worker's word after it."""
        self._timeout_s = self._settle_timeout(persistence.timeout_ms)
        self._deadline = now + self._timeout_s
        self._next_sequence = 0
        self._content_was_handed_out = False
        self._at_work = False
        """A worker may have the request."""
        self.subject = subjects.for_request(
            worker_id=worker_id, model=request.get("model"), caller=caller
        )
        self.request_id = self._settle_id(request_id)
        self.control_subject: str | None = None
        """Known from a worker's first message on."""
        self.ended = False
        """Nothing more will come: the last message has come, or an error was raised."""
        self.resend_at: float | None = now
        """When to send `body` (again)."""

    @property
    def gives_up_at(self) -> float:
        """When waiting for the next message is over; infinite without a timeout."""
        return self._deadline + LAST_WORD_S

    @property
    def may_be_sent_again(self) -> bool:
        """Whether another attempt may follow this one."""
        return self._attempts_left > 1 and not self._content_was_handed_out

    def body(self, now: float) -> bytes:
        """The request as it is to be sent now."""
        if math.isfinite(self._deadline):
            # Rounding must not make it more than was asked for: that may be all a worker allows.
            most_ms = round(1000 * self._timeout_s)
            left_ms = math.ceil(1000 * (self._deadline - now))
            self._request["timeout_ms"] = max(1, min(left_ms, most_ms))
        self.resend_at = None
        self._at_work = True
        self._next_sequence = 0
        return msgspec.json.encode(self._request)

    def take(
        self, body: bytes, headers: Mapping[str, str], reply: str | None, now: float
    ) -> Chunk | None:
        """What a message says; None if the request is to be sent again at `resend_at`.

        Raises the `WorkerError` of an error reply, `NoWorker` if nobody has listened for the
        grace or until the deadline, and `MessageLost` if one is missing.
        """
        if not self.accept(body, headers, reply, now):
            return None
        try:
            chunk = _chunk(msgspec.json.decode(body, type=dict[str, Any]), headers)
        except _NO_ANSWER as exc:
            raise self._no_answer(exc) from exc
        if _says_something(chunk):
            self.content_is_handed_out()
        return chunk

    def accept(
        self, body: bytes, headers: Mapping[str, str], reply: str | None, now: float
    ) -> bool:
        """Take note of a message; whether it is part of the answer, which is left unread.

        Whoever hands it on says so by `content_is_handed_out`, if there is content in it. False
        if the request is to be sent again at `resend_at`. Raises as `take`.
        """
        if headers.get("Status") == "503":
            self._at_work = False
            self._ask_again_or_end(now)
            return False
        self._nobody_since = None
        self.control_subject = reply or self.control_subject
        terminal = headers.get(native.Header.TERMINAL)
        if terminal is not None:
            self._at_work = False
        try:
            if terminal == "error":
                self._fail(error_of(msgspec.json.decode(body, type=dict[str, Any])), now)
                return False
            sequence = int(headers.get(native.Header.SEQUENCE, -1))
        except _NO_ANSWER as exc:
            raise self._no_answer(exc) from exc
        if sequence != self._next_sequence:
            raise self._end(
                MessageLost(
                    f"message {self._next_sequence} of the answer was lost; {sequence} came instead"
                )
            )
        self._next_sequence += 1
        self.ended = terminal is not None
        return True

    def content_is_handed_out(self) -> None:
        """From now on the request is not sent again."""
        self._content_was_handed_out = True

    def give_up(self) -> WorkerError:
        """What to raise when nothing has come until `gives_up_at`."""
        return self._end(
            RequestTimeout(
                f"no answer on {self.subject} within {self._timeout_s:g} s, nor a worker's word "
                "about it: it may be gone, or the server may not let this account ask",
                details={"stage": "client"},
            )
        )

    def begin_again(self, lost: MessageLost, now: float) -> None:
        """Plan to ask once more, since a message is missing; raise `lost` if that may not be.

        Whoever calls has sent `cancel_message`, and has to keep what is still said to this attempt
        apart from what is said to the next one. A worker that lives has a moment to take note.
        """
        self._at_work = False
        self._attempts_left -= 1
        resend_at = now + RETRY_S * self._rng.uniform(0.5, 1.5)
        may_be = self._attempts_left > 0 and not self._content_was_handed_out
        if not may_be or resend_at >= self._deadline:
            raise self._end(lost)
        self.ended = False
        self.resend_at = resend_at
        self.control_subject = None

    def cancel_message(self) -> tuple[str, bytes] | None:
        """The subject and body that end the request; None if no worker can have it.

        By its id where no message of the worker has named its control subject yet.
        """
        if not self._at_work:
            return None
        if self.control_subject is not None:
            return self.control_subject, native.CANCEL_BODY
        return subjects.CANCEL, native.cancel_by_id(self.request_id)

    def _ask_again_or_end(self, now: float) -> None:
        """Plan to send what nobody has taken, or raise `NoWorker`."""
        if self._nobody_since is None:
            self._nobody_since = now
        delay_s = RETRY_S * self._rng.uniform(0.5, 1.5)
        if now + delay_s >= min(self._nobody_since + self._grace_s, self._deadline):
            raise self._end(
                NoWorker(
                    f"nobody listens on {self.subject} (asked for "
                    f"{now - self._nobody_since:.1f} s): no worker runs there, or none is ready yet"
                )
            )
        self.resend_at = now + delay_s

    def _fail(self, error: WorkerError, now: float) -> None:
        """Plan another attempt, or raise the error if there is none."""
        self._attempts_left -= 1
        if error.retryable and self._attempts_left > 0 and not self._content_was_handed_out:
            # Not before the worker's estimate, and not all callers at the same moment.
            delay_s = (error.retry_after_ms or 1000) / 1000 * self._rng.uniform(1.0, 1.5)
            if self._another_may_have_room and error.code in NO_ROOM_HERE:
                self._another_may_have_room = False
                delay_s = 0.0
            if now + delay_s < self._deadline:
                self.resend_at = now + delay_s
                self.control_subject = None
                return
        raise self._end(error)

    def _no_answer(self, exc: Exception) -> WorkerError:
        return self._end(InternalError(f"what came on {self.subject} is no answer: {exc}"))

    def _end(self, error: WorkerError) -> WorkerError:
        self.ended = True
        return error

    def _settle_timeout(self, timeout_ms: int | None) -> float:
        asked = self._request.get("timeout_ms")
        if asked is None:
            asked = timeout_ms
        # What is not a time is sent as it is: the worker refuses it.
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
            return math.inf
        return asked / 1000

    def _settle_id(self, request_id: str) -> str:
        for spelling in ("request_id", "requestId"):
            if self._request.get(spelling) is not None:
                return str(self._request[spelling])
        self._request.pop("requestId", None)
        self._request["request_id"] = request_id
        return request_id


def error_of(body: Mapping[str, Any]) -> WorkerError:
    """The error that an error reply's body tells of. Raises as reading what is none does."""
    fields = body["error"]
    cls = BY_CODE.get(fields["code"], InternalError)
    error = cls(
        fields.get("message", "an error without a message"),
        details=fields.get("details"),
        retryable=fields.get("retryable"),
    )
    error.retry_after_ms = fields.get("retry_after_ms")
    return error


def _chunk(body: Mapping[str, Any], headers: Mapping[str, str]) -> Chunk:
    choice = _first_choice(body)
    content = _content(choice)
    return Chunk(
        choice=choice.get("index", 0),
        text=choice.get("text") or content.get("content") or "",
        reasoning=content.get("reasoning_content") or "",
        finish_reason=choice.get("finish_reason"),
        usage=body.get("usage"),
        worker=body.get("worker"),
        body=body,
        headers=headers,
    )


def _says_something(chunk: Chunk) -> bool:
    """Whether it is more than a sign of life."""
    choice = _first_choice(chunk.body)
    beside = (choice.get("logprobs"), _content(choice).get("tool_calls"))
    return any((chunk.text, chunk.reasoning, chunk.finish_reason, *beside))


def _first_choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Empty where there is nothing but the usage."""
    choices = body["choices"]
    return choices[0] if choices or not body.get("usage") else {}


def _content(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    return choice.get("delta") or choice.get("message") or {}
