"""What a client decides: when to send a request, and what each message means."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from support.nats_fixtures import nats_url_fixture  # noqa: F401 - a fixture
from support.peers import CONTROL, Reply, chunk, refusal

from trio_worker.calling.any_loop import AnswerOnAnyLoop
from trio_worker.calling.attempts import Chunk, Exchange, Persistence, join
from trio_worker.errors import (
    BY_CODE,
    ErrorCode,
    InternalError,
    MessageLost,
    NoWorker,
    QueueFull,
    RequestTimeout,
    WorkerDraining,
)
from trio_worker.wire import native, subjects


class Lowest(random.Random):
    """Draws the lower bound."""

    def uniform(self, a: float, b: float) -> float:
        return min(a, b)


def make_exchange(
    *,
    rng: random.Random | None = None,
    timeout_ms: int | None = 10_000,
    attempts: int = 3,
    grace_s: float = math.inf,
    worker_id: str | None = "w1",
    as_caller: str | None = None,
    **fields: Any,
) -> Exchange:
    return Exchange(
        {"prompt": "x", **fields},
        request_id="r",
        worker_id=worker_id,
        persistence=Persistence(
            timeout_ms=timeout_ms, attempts=attempts, nobody_listens_grace_s=grace_s
        ),
        rng=rng or random.Random(0),
        now=100.0,
        caller=as_caller,
    )


def take(exchange: Exchange, reply: Reply, now: float = 100.0) -> Chunk | None:
    return exchange.take(*reply, CONTROL, now)


def nobody(exchange: Exchange, now: float) -> Chunk | None:
    return exchange.take(b"", {"Status": "503"}, None, now)


def sent(exchange: Exchange, now: float = 100.0) -> Any:
    return json.loads(exchange.body(now))


@pytest.mark.parametrize("now", [100.0, 801.791, 16_348.652])
def test_no_rounding_asks_for_more_time_than_was_asked_for(now: float) -> None:
    exchange = Exchange(
        {"prompt": "x", "timeout_ms": 600_000},
        persistence=Persistence(timeout_ms=None, attempts=1, nobody_listens_grace_s=5.0),
        worker_id=None,
        request_id="r",
        rng=Lowest(),
        now=now,
    )
    assert sent(exchange, now)["timeout_ms"] == 600_000


def test_each_attempt_says_what_is_left_of_the_deadline_and_keeps_the_id() -> None:
    exchange = make_exchange()
    assert sent(exchange, 100.5) == {"prompt": "x", "request_id": "r", "timeout_ms": 9500}
    assert take(exchange, refusal("QUEUE_FULL"), 102.0) is None
    assert exchange.resend_at is not None
    assert 103.0 <= exchange.resend_at <= 103.5
    again = sent(exchange, 103.2)
    assert again == {"prompt": "x", "request_id": "r", "timeout_ms": 6800}
    assert exchange.resend_at is None


def test_what_the_caller_says_goes_before_what_the_client_assumes() -> None:
    exchange = make_exchange(timeout_ms=10_000, requestId="mine")
    assert exchange.request_id == "mine"
    assert "request_id" not in sent(exchange)
    given = Exchange(
        {"prompt": "x", "timeout_ms": 50, "request_id": None},
        request_id="r",
        worker_id=None,
        persistence=Persistence(timeout_ms=10_000, attempts=1, nobody_listens_grace_s=5.0),
        rng=random.Random(0),
        now=0.0,
    )
    assert sent(given, 0.0) == {"prompt": "x", "timeout_ms": 50, "request_id": "r"}
    assert given.gives_up_at == pytest.approx(1.05)


@pytest.mark.parametrize("wrong", [True, "soon", 0, -1, 1.5])
def test_a_timeout_that_is_none_is_left_to_the_worker_to_refuse(wrong: object) -> None:
    exchange = Exchange(
        {"prompt": "x", "timeout_ms": wrong},
        request_id="r",
        worker_id=None,
        persistence=Persistence(timeout_ms=10_000, attempts=1, nobody_listens_grace_s=5.0),
        rng=random.Random(0),
        now=0.0,
    )
    assert sent(exchange, 0.0)["timeout_ms"] == wrong
    assert exchange.gives_up_at == math.inf


def test_a_request_in_a_callers_name_goes_to_the_subject_that_names_it() -> None:
    anybody = make_exchange(worker_id=None, as_caller="app-a", caller="another")
    assert anybody.subject == "inference.by.app-a"
    assert sent(anybody, 100.0)["caller"] == "app-a"
    assert (
        make_exchange(worker_id=None, as_caller="app-a", model="m-1.2").subject
        == "inference.by.app-a.model.m-1.2"
    )
    certain = make_exchange(worker_id="w1", as_caller="app-a")
    assert certain.subject == "inference.w1"
    assert sent(certain, 100.0)["caller"] == "app-a"
    assert "caller" not in sent(make_exchange(), 100.0)


def test_a_request_goes_to_the_worker_the_model_or_anybody() -> None:
    assert make_exchange(worker_id="w1", model="m").subject == "inference.w1"
    assert make_exchange(worker_id=None, model="m-1.2").subject == "inference.model.m-1.2"
    assert make_exchange(worker_id=None).subject == "inference"
    assert make_exchange(worker_id=None, model="two words").subject == "inference"
    assert make_exchange(worker_id=None, model=["no", "name"]).subject == "inference"


@pytest.mark.parametrize("code", list(ErrorCode))
def test_an_error_is_retried_if_it_says_so_and_raised_as_its_class_otherwise(code: str) -> None:
    exchange = make_exchange(timeout_ms=None)
    sent(exchange)
    if BY_CODE[code].retryable:
        assert take(exchange, refusal(code)) is None
        assert exchange.resend_at is not None
        assert not exchange.ended
    else:
        with pytest.raises(BY_CODE[code]) as caught:
            take(exchange, refusal(code, retry_after_ms=None))
        assert (caught.value.message, caught.value.details) == ("no", {"depth": 3})
        assert exchange.ended
    assert exchange.cancel_message() is None


def test_retrying_ends_with_the_attempts() -> None:
    exchange = make_exchange(timeout_ms=None, attempts=2)
    sent(exchange)
    take(exchange, refusal("QUEUE_FULL"))
    sent(exchange)
    with pytest.raises(QueueFull) as caught:
        take(exchange, refusal("QUEUE_FULL", retry_after_ms=777))
    assert caught.value.retry_after_ms == 777


def test_retrying_ends_where_the_wait_would_pass_the_deadline() -> None:
    exchange = make_exchange(timeout_ms=5000)
    sent(exchange)
    with pytest.raises(WorkerDraining):
        take(exchange, refusal("WORKER_DRAINING", retry_after_ms=5000))


def test_nothing_is_sent_again_once_text_was_handed_out() -> None:
    exchange = make_exchange()
    sent(exchange)
    assert take(exchange, chunk(0)) is not None
    assert take(exchange, chunk(1, "so far")) is not None
    with pytest.raises(WorkerDraining):
        take(exchange, refusal("WORKER_DRAINING", sequence=2))


def test_an_opening_without_text_stands_in_no_retrys_way_and_numbering_begins_anew() -> None:
    exchange = make_exchange()
    sent(exchange)
    assert take(exchange, chunk(0)) is not None
    assert take(exchange, refusal("WORKER_DRAINING", sequence=1)) is None
    sent(exchange, 102.0)
    assert take(exchange, chunk(0), 102.0) is not None
    assert take(exchange, chunk(1, "all", terminal=True), 102.0) is not None
    assert exchange.ended


def ask_until_nobody_is_there(exchange: Exchange, now: float) -> tuple[float, int]:
    """When the exchange gave up, and how often it had been sent; nobody listens."""
    asked = 0
    while True:
        sent(exchange, now)
        asked += 1
        try:
            assert nobody(exchange, now) is None
        except NoWorker:
            return now, asked
        assert exchange.resend_at is not None
        assert 0.125 <= exchange.resend_at - now <= 0.375
        now = exchange.resend_at


@pytest.mark.parametrize(
    ("grace_s", "timeout_ms", "ends_at"),
    [(5.0, 30_000, 105.0), (5.0, None, 105.0), (5.0, 2000, 102.0), (math.inf, 10_000, 110.0)],
)
def test_where_nobody_listens_it_is_asked_for_the_grace_and_no_attempt_is_spent(
    grace_s: float, timeout_ms: int | None, ends_at: float
) -> None:
    exchange = make_exchange(attempts=1, grace_s=grace_s, timeout_ms=timeout_ms)
    gave_up_at, asked = ask_until_nobody_is_there(exchange, 100.0)
    assert ends_at - 0.375 <= gave_up_at < ends_at
    assert 3 * (ends_at - 100) <= asked <= 6 * (ends_at - 100)
    assert exchange.ended
    assert exchange.cancel_message() is None


def test_the_grace_and_the_deadline_are_over_when_they_are_reached() -> None:
    for grace_s, timeout_ms in ((0.125, 9000), (9.0, 125)):
        exchange = make_exchange(grace_s=grace_s, timeout_ms=timeout_ms, rng=Lowest())
        sent(exchange)
        with pytest.raises(NoWorker):
            nobody(exchange, 100.0)
        exchange = make_exchange(grace_s=grace_s + 0.01, timeout_ms=timeout_ms + 10, rng=Lowest())
        sent(exchange)
        assert nobody(exchange, 100.0) is None
        assert exchange.resend_at == 100.125


def test_without_a_grace_nobody_is_nobody_at_once() -> None:
    exchange = make_exchange(grace_s=0.0)
    sent(exchange)
    with pytest.raises(NoWorker, match=r"nobody listens on inference.w1 \(asked for 0.0 s\)"):
        nobody(exchange, 100.0)


def test_the_grace_begins_anew_once_a_worker_has_spoken() -> None:
    exchange = make_exchange(grace_s=5.0, timeout_ms=60_000)
    sent(exchange)
    nobody(exchange, 100.0)
    sent(exchange, 104.0)
    assert take(exchange, chunk(0), 104.0) is not None
    assert take(exchange, refusal("WORKER_DRAINING", sequence=1), 104.0) is None
    sent(exchange, 106.0)
    assert 110.6 <= ask_until_nobody_is_there(exchange, 106.0)[0] < 111.0


@pytest.mark.parametrize("code", ["QUEUE_FULL", "WORKER_DRAINING", "RESOURCE_LIMIT_EXCEEDED"])
def test_where_one_of_a_group_has_no_room_another_is_asked_at_once_and_later_ones_not(
    code: str,
) -> None:
    exchange = make_exchange(worker_id=None, attempts=4)
    sent(exchange)
    assert take(exchange, refusal(code)) is None
    assert exchange.resend_at == 100.0
    assert exchange.control_subject is None
    sent(exchange)
    assert take(exchange, refusal(code)) is None
    assert exchange.resend_at is not None
    assert 101.0 <= exchange.resend_at <= 101.5


def test_the_try_elsewhere_is_one_of_the_attempts() -> None:
    exchange = make_exchange(worker_id=None, attempts=2)
    sent(exchange)
    take(exchange, refusal("QUEUE_FULL"))
    sent(exchange)
    with pytest.raises(QueueFull):
        take(exchange, refusal("QUEUE_FULL"))


def test_a_retry_elsewhere_is_for_those_without_room_only() -> None:
    for code in ("INTERNAL", "REQUEST_TIMEOUT"):
        exchange = make_exchange(worker_id=None)
        sent(exchange)
        assert take(exchange, refusal(code)) is None
        assert exchange.resend_at is not None
        assert exchange.resend_at >= 101.0
        sent(exchange, 102.0)
        take(exchange, refusal("QUEUE_FULL"), 102.0)
        assert exchange.resend_at == 102.0, "it has not been tried yet"


def test_what_no_worker_can_hold_is_not_tried_elsewhere() -> None:
    exchange = make_exchange(worker_id=None)
    sent(exchange)
    body, headers = refusal("RESOURCE_LIMIT_EXCEEDED", retry_after_ms=None)
    with pytest.raises(BY_CODE["RESOURCE_LIMIT_EXCEEDED"]):
        take(exchange, (body.replace(b'"retryable": true', b'"retryable": false'), headers))


def test_a_retry_begins_anew_with_all_that_belongs_to_an_attempt() -> None:
    """The numbering, the control subject, and whether a worker has the request."""
    exchange = make_exchange(worker_id=None)
    sent(exchange)
    take(exchange, chunk(0))
    assert exchange.cancel_message() == (CONTROL, b"cancel")
    take(exchange, refusal("WORKER_DRAINING", sequence=1))
    assert exchange.cancel_message() is None, "between two attempts there is nobody to tell"
    assert not exchange.ended
    sent(exchange)
    assert exchange.cancel_message() == ("inference.cancel", b'{"request_id":"r"}')
    with pytest.raises(MessageLost, match=r"message 0 .* 1 came"):
        take(exchange, chunk(1))


def test_a_retry_may_be_due_until_the_deadline_and_no_later() -> None:
    for retry_after_ms, wait_ms in ((2000, 2000), (None, 1000)):
        error = refusal("INTERNAL", retry_after_ms=retry_after_ms)
        exchange = make_exchange(timeout_ms=wait_ms + 1, rng=Lowest())
        sent(exchange)
        assert take(exchange, error) is None
        assert exchange.resend_at == 100 + wait_ms / 1000
        exchange = make_exchange(timeout_ms=wait_ms, rng=Lowest())
        sent(exchange)
        with pytest.raises(InternalError):
            take(exchange, error)
    late = make_exchange(worker_id=None, timeout_ms=1000)
    sent(late)
    with pytest.raises(QueueFull):
        take(late, refusal("QUEUE_FULL"), 101.0)
    assert late.ended


def test_what_is_left_of_a_deadline_is_a_whole_millisecond_at_least() -> None:
    exchange = make_exchange(timeout_ms=1000)
    assert [sent(exchange, now)["timeout_ms"] for now in (100.0, 100.9991, 101.0, 200.0)] == [
        1000,
        1,
        1,
        1,
    ]
    assert exchange.gives_up_at == 102.0
    assert make_exchange(timeout_ms=1).gives_up_at == pytest.approx(101.001)
    assert "timeout_ms" not in sent(make_exchange(timeout_ms=None))


def test_giving_up_says_where_and_after_how_long() -> None:
    exchange = make_exchange(timeout_ms=1500)
    sent(exchange)
    error = exchange.give_up()
    assert isinstance(error, RequestTimeout)
    assert error.message.startswith("no answer on inference.w1 within 1.5 s, nor a worker's word")
    assert error.details == {"stage": "client"}
    assert exchange.ended
    assert exchange.cancel_message() is not None, "it may be at work all the same"


def test_log_probabilities_without_text_are_content_too() -> None:
    exchange = make_exchange()
    sent(exchange)
    choice: dict[str, Any] = {"text": "", "logprobs": {"content": []}, "finish_reason": None}
    take(exchange, (json.dumps({"choices": [choice]}).encode(), {"Sequence": "0"}))
    with pytest.raises(WorkerDraining):
        take(exchange, refusal("WORKER_DRAINING", sequence=1))


@pytest.mark.parametrize("sequence", [None, "-1", "1"])
def test_an_answer_begins_with_0(sequence: str | None) -> None:
    exchange = make_exchange()
    sent(exchange)
    body, headers = chunk(0)
    del headers["Sequence"]
    if sequence is not None:
        headers["Sequence"] = sequence
    with pytest.raises(MessageLost, match=rf"message 0 of .* lost; {sequence or -1} came instead"):
        take(exchange, (body, headers))


def test_a_control_subject_is_kept_where_a_later_message_names_none() -> None:
    exchange = make_exchange()
    sent(exchange)
    take(exchange, chunk(0))
    exchange.take(*chunk(1), None, 100.0)
    assert exchange.control_subject == CONTROL


def test_a_message_has_its_text_wherever_it_is_and_all_that_came_with_it() -> None:
    usage, worker = {"total_tokens": 3}, {"id": "w1"}
    parts: list[dict[str, Any]] = [
        {"delta": {"role": "assistant"}, "finish_reason": None},
        {"delta": {"content": "a"}},
        {"message": {"role": "assistant", "content": "b"}},
        {"text": "c", "finish_reason": "stop"},
    ]
    exchange, chunks = make_exchange(), []
    sent(exchange)
    for index, part in enumerate(parts):
        body = {"choices": [part], **({"usage": usage, "worker": worker} if index == 3 else {})}
        headers = {"Sequence": str(index)}
        came = take(exchange, (json.dumps(body).encode(), headers))
        assert came is not None
        assert (came.body, came.headers) == (body, headers)
        chunks.append(came)
    assert [each.text for each in chunks] == ["", "a", "b", "c"]
    assert [each.finish_reason for each in chunks] == [None, None, None, "stop"]
    assert [each.usage for each in chunks] == [None, None, None, usage]
    whole = join(chunks)
    assert (whole.text, whole.finish_reason, whole.worker) == ("abc", "stop", worker)


def test_an_error_of_a_code_that_is_not_known_yet_is_an_error_all_the_same() -> None:
    for retryable in (False, True):
        error = {"code": "NEW", "retryable": retryable, "details": None}
        exchange = make_exchange(attempts=1)
        sent(exchange)
        with pytest.raises(InternalError, match="an error without a message") as caught:
            take(exchange, (json.dumps({"error": error}).encode(), {"Terminal": "error"}))
        assert caught.value.retryable is retryable
        assert caught.value.details == {}
        assert caught.value.retry_after_ms is None


class Silent(AnswerOnAnyLoop):
    async def __anext__(self) -> Chunk:
        raise StopAsyncIteration


def test_an_answer_tells_of_its_exchange() -> None:
    exchange = make_exchange()
    answer = Silent(exchange)
    sent(exchange)
    assert (answer.request_id, answer.control_subject, answer.ended) == ("r", None, False)
    take(exchange, chunk(0, terminal=True))
    assert (answer.control_subject, answer.ended) == (CONTROL, True)


def test_the_callers_request_is_not_written_to() -> None:
    request: dict[str, Any] = {"prompt": "x", "requestId": None}
    exchange = make_exchange(**request)
    assert "requestId" not in sent(exchange)
    mine = {"prompt": "x"}
    Exchange(
        mine,
        request_id="r",
        worker_id=None,
        persistence=Persistence(timeout_ms=1000, attempts=1, nobody_listens_grace_s=5.0),
        rng=random.Random(0),
        now=0.0,
    ).body(0.0)
    assert mine == {"prompt": "x"}


def test_a_gap_is_an_error_and_the_worker_is_still_at_work() -> None:
    exchange = make_exchange()
    sent(exchange)
    take(exchange, chunk(0, "a"))
    with pytest.raises(MessageLost, match=r"message 1 .* 2 came"):
        take(exchange, chunk(2, "c"))
    assert exchange.ended
    assert exchange.cancel_message() == (CONTROL, b"cancel")


def lose_one(exchange: Exchange, now: float = 101.0) -> None:
    """A gap, after which it is asked once more."""
    with pytest.raises(MessageLost) as caught:
        take(exchange, chunk(7, "text"), now)
    exchange.begin_again(caught.value, now)


def test_after_a_gap_another_attempt_begins_anew_a_moment_later() -> None:
    exchange = make_exchange(rng=Lowest())
    exchange.body(100.0)
    lose_one(exchange)
    assert not exchange.ended
    assert exchange.cancel_message() is None, "whoever began again has cancelled"
    assert exchange.resend_at == pytest.approx(101.125)
    exchange.body(101.125)
    assert exchange.cancel_message() == (subjects.CANCEL, native.cancel_by_id("r"))
    assert take(exchange, chunk(0, "text")) is not None


def test_after_a_gap_there_is_no_other_attempt_once_something_was_handed_out() -> None:
    exchange = make_exchange()
    exchange.body(100.0)
    exchange.content_is_handed_out()
    with pytest.raises(MessageLost):
        lose_one(exchange)
    assert exchange.ended


@pytest.mark.parametrize(("attempts", "now"), [(1, 101.0), (3, 109.9)])
def test_after_a_gap_there_is_no_other_attempt_where_none_or_no_time_is_left(
    attempts: int, now: float
) -> None:
    exchange = make_exchange(rng=Lowest(), attempts=attempts)
    exchange.body(100.0)
    with pytest.raises(MessageLost):
        lose_one(exchange, now)
    assert exchange.cancel_message() is None


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b'{"choices": []}', b'{"choices": 1}', b'{"choices": [3]}']
)
@pytest.mark.parametrize("terminal", ["done", "error"])
def test_what_is_no_answer_is_an_error(body: bytes, terminal: str) -> None:
    exchange = make_exchange()
    sent(exchange)
    with pytest.raises(InternalError, match="no answer"):
        exchange.take(body, {"Sequence": "0", "Terminal": terminal}, None, 100.0)
    assert exchange.ended


def test_a_cancel_goes_by_the_id_until_the_control_subject_is_known() -> None:
    exchange = make_exchange()
    assert exchange.cancel_message() is None
    sent(exchange)
    assert exchange.cancel_message() == ("inference.cancel", b'{"request_id":"r"}')
    take(exchange, chunk(0))
    assert exchange.cancel_message() == (CONTROL, b"cancel")
    take(exchange, chunk(1, terminal=True))
    assert exchange.cancel_message() is None


# --- what agents get ------------------------------------------------------------------------


def message(sequence: int, *choices: dict[str, Any], **body: Any) -> Reply:
    terminal = {"Terminal": "done"} if body else {}
    written = json.dumps({"choices": choices, **body}).encode()
    return written, {"Sequence": str(sequence), **terminal}


@pytest.mark.parametrize(
    ("choice", "says_something"),
    [
        ({"delta": {}}, False),
        ({"delta": {"role": "assistant"}}, False),
        ({"delta": {"content": ""}, "finish_reason": None}, False),
        ({"delta": {"reasoning_content": "hm"}}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}}, True),
        ({"delta": {}, "finish_reason": "stop"}, True),
        ({"text": "", "logprobs": {"tokens": ["a"]}}, True),
    ],
)
def test_a_request_is_sent_again_only_where_nothing_was_said(
    choice: dict[str, Any], *, says_something: bool
) -> None:
    exchange = make_exchange()
    sent(exchange)
    assert take(exchange, message(0, choice)) is not None
    assert exchange.may_be_sent_again is not says_something


def test_several_choices_are_told_apart_and_the_first_is_the_answer() -> None:
    exchange = make_exchange()
    sent(exchange)
    said: list[dict[str, Any]] = [
        {"index": 1, "delta": {"content": "b"}},
        {"index": 0, "delta": {"reasoning_content": "hm"}},
        {"index": 0, "delta": {"content": "a"}},
        {"index": 0, "delta": {}, "finish_reason": "stop"},
        {"index": 1, "delta": {"content": "c"}, "finish_reason": "length"},
    ]
    chunks = [take(exchange, message(place, each)) for place, each in enumerate(said)]
    chunks.append(take(exchange, message(5, usage={"total_tokens": 5}, worker={"id": "w1"})))
    assert exchange.ended
    came = [each for each in chunks if each is not None]
    assert [(each.choice, each.text, each.reasoning) for each in came] == [
        *((1, "b", ""), (0, "", "hm"), (0, "a", ""), (0, "", ""), (1, "c", "")),
        (0, "", ""),
    ]
    whole = join(came)
    assert (whole.text, whole.reasoning, whole.finish_reason) == ("a", "hm", "stop")
    assert (whole.usage, whole.worker) == ({"total_tokens": 5}, {"id": "w1"})
