"""OpenAI's own client for Python, unmodified: on Trio, on asyncio, and blocking."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import openai
import pytest
import trio
from openai import AsyncOpenAI, OpenAI, omit
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from support.clients_rig import FAILING, KEY, LONG, MODEL, PATIENCE_S, Front, open_front
from support.nats_rig import wait_until
from support.openai_types import check, checked
from support.peers import in_asyncio

pytestmark = [
    pytest.mark.nats,
    # On Trio it leaves what it reads with to the garbage collector: it stops at `[DONE]`.
    pytest.mark.filterwarnings(
        r"ignore:Async generator .(openai|httpx2|httpcore2)\.:ResourceWarning"
    ),
]

Work: TypeAlias = Callable[[AsyncOpenAI], Awaitable[None]]
Loop: TypeAlias = Callable[..., Awaitable[None]]


def say(words: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": words}]


async def on_trio(front: Front, work: Work, **options: Any) -> None:
    with trio.fail_after(PATIENCE_S):
        async with AsyncOpenAI(**_options(front, options)) as client:
            await work(client)


async def on_asyncio(front: Front, work: Work, **options: Any) -> None:
    async def main() -> None:
        async with AsyncOpenAI(**_options(front, options)) as client:
            await work(client)

    await in_asyncio(main, within_s=PATIENCE_S)


def _options(front: Front, options: dict[str, Any]) -> dict[str, Any]:
    return {"base_url": front.base_url, "api_key": KEY, "max_retries": 0, **options}


async def blocking(front: Front, work: Callable[[OpenAI], None], **options: Any) -> None:
    def main() -> None:
        with OpenAI(**_options(front, {"timeout": PATIENCE_S, **options})) as client:
            work(client)

    await trio.to_thread.run_sync(main)


def keys_file(folder: Path, limits: str = "") -> str:
    """A file with `KEY` in it."""
    path = folder / "keys"
    path.write_text(f"anna {hashlib.sha256(KEY.encode()).hexdigest()} {limits}\n")
    return str(path)


both_loops = pytest.mark.parametrize("run", [on_trio, on_asyncio])


# --- answers --------------------------------------------------------------------------------


@both_loops
async def test_a_whole_answer_and_a_stream(run: Loop) -> None:
    async def work(client: AsyncOpenAI) -> None:
        same: dict[str, Any] = {"model": MODEL, "messages": say("hello there"), "seed": 3}
        raw = await client.chat.completions.with_raw_response.create(**same, max_tokens=5)
        check(ChatCompletion, raw.text)
        whole = checked(raw.parse())
        assert raw.request_id == raw.headers["x-request-id"]
        assert whole.id == f"chatcmpl-{raw.request_id}"
        assert raw.headers["x-worker-id"] == "w1"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 5

        ask: Any = partial(client.chat.completions.create, **same, max_tokens=5, stream=True)
        usage_too = await ask(stream_options={"include_usage": True})
        *chunks, usage = [checked(chunk) async for chunk in usage_too]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == "length"
        assert (usage.choices, usage.usage) == ([], whole.usage)

        chunks = [checked(chunk) async for chunk in await ask()]
        assert all(chunk.choices for chunk in chunks), "no usage, since nobody has asked for it"

    async with open_front() as front:
        await run(front, work)


async def test_a_client_that_blocks() -> None:
    def work(client: OpenAI) -> None:
        whole = client.chat.completions.create(model=MODEL, messages=say("hi"), max_tokens=3)
        assert checked(whole).choices[0].finish_reason == "length"
        with client.chat.completions.create(
            model=MODEL, messages=say("hi"), max_tokens=3, stream=True
        ) as stream:
            assert [checked(chunk) for chunk in stream][-1].choices[0].finish_reason == "length"
        assert [checked(each).id for each in client.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=say("hi"))

    async with open_front() as front:
        await blocking(front, work)


@both_loops
async def test_the_streaming_helper_puts_an_answer_together(run: Loop) -> None:
    async def work(client: AsyncOpenAI) -> None:
        ask = partial(client.chat.completions.stream, model=MODEL, messages=say("hello"), seed=3)
        async with ask(stop=[" "], logprobs=True, top_logprobs=2) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
        assert kinds >= {"chunk", "content.delta", "content.done", "logprobs.content.delta"}
        assert final.choices[0].finish_reason == "stop"
        assert final.choices[0].message.content
        with pytest.raises(openai.LengthFinishReasonError):
            async with ask(max_tokens=3) as stream:
                await stream.get_final_completion()

    async with open_front() as front:
        await run(front, work)


@both_loops
async def test_logprobs(run: Loop) -> None:
    async def work(client: AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(
            model=MODEL, messages=say("hi"), max_tokens=3, logprobs=True, top_logprobs=2
        )
        logprobs = checked(whole).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [len(each.top_logprobs) for each in logprobs.content] == [2, 2, 2]

        raw = await client.completions.with_raw_response.create(
            model=MODEL, prompt="once upon", max_tokens=3, logprobs=2
        )
        check(Completion, raw.text)
        of_text = raw.parse().choices[0].logprobs
        assert of_text is not None
        assert of_text.tokens is not None
        assert "".join(of_text.tokens) == raw.parse().choices[0].text
        chunks = [
            chunk
            async for chunk in await client.completions.create(
                model=MODEL, prompt="once upon", max_tokens=3, logprobs=2, stream=True
            )
        ]
        assert "".join(each.choices[0].text for each in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"

    async with open_front() as front:
        await run(front, work)


@both_loops
async def test_models(run: Loop) -> None:
    async def work(client: AsyncOpenAI) -> None:
        (listed,) = [checked(model) async for model in client.models.list()]
        assert checked(await client.models.retrieve(MODEL)) == listed
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other/one")
        assert caught.value.code == "model_not_found"

    async with open_front() as front:
        await run(front, work)


async def test_what_a_program_appends_is_taken_back() -> None:
    """The message as the client has it, with all its empty fields."""

    async def work(client: AsyncOpenAI) -> None:
        messages: list[Any] = say("hi")
        for _ in range(3):
            whole = await client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=3
            )
            messages += [whole.choices[0].message, *say("and then?")]

    async with open_front() as front:
        await on_trio(front, work)


# --- errors ---------------------------------------------------------------------------------


@both_loops
async def test_what_is_wrong_with_a_request_names_its_field(run: Loop) -> None:
    async def work(client: AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=say("hi"), modalities=["text", "audio"]
            )
        assert (caught.value.param, caught.value.type) == ("modalities", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=say("hi"), extra_body={"temprature": 1}
            )
        assert "did you mean temperature" in caught.value.message
        with pytest.raises(openai.NotFoundError) as not_found:
            await client.chat.completions.create(model="other", messages=say("hi"), stream=True)
        assert not_found.value.code == "model_not_found"
        assert MODEL in not_found.value.message
        with pytest.raises(openai.NotFoundError, match="chat completions"):
            await client.responses.create(model=MODEL, input="hi")

    async with open_front() as front:
        await run(front, work, max_retries=2)
        retried = [name for name in await front.counts() if "retried" in name]
    assert not retried


@both_loops
async def test_what_is_too_large_is_refused_before_it_is_sent(run: Loop) -> None:
    async def work(client: AsyncOpenAI) -> None:
        for _ in range(3):
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(model=MODEL, messages=say("x" * 5_000_000))
            assert (caught.value.status_code, caught.value.code) == (413, "payload_too_large")

    async with open_front() as front:
        await run(front, work, max_retries=2)
        assert not [name for name in await front.counts() if "retried" in name]


async def test_without_a_key_nothing_is_answered(tmp_path: Path) -> None:
    async def wrong(client: AsyncOpenAI) -> None:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model=MODEL, messages=say("hi"))
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()

    async def right(client: AsyncOpenAI) -> None:
        await client.chat.completions.create(model=MODEL, messages=say("hi"), max_tokens=1)

    async with open_front(keys_file=keys_file(tmp_path)) as front:
        await on_trio(front, wrong, api_key="another")
        await on_trio(front, right)


async def test_a_failure_of_the_engine_is_not_tried_again() -> None:
    async def work(client: AsyncOpenAI) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=MODEL, messages=say(FAILING))
        assert (caught.value.status_code, caught.value.code) == (500, "engine_failed")
        # After the status has been sent it comes as an event.
        with pytest.raises(openai.APIError) as in_stream:
            async for _ in await client.chat.completions.create(
                model=MODEL, messages=say(FAILING), stream=True
            ):
                pass
        assert in_stream.value.code == "engine_failed"

    async with open_front() as front:
        await on_trio(front, work, max_retries=2)
        assert [name for name in await front.counts() if "retried" in name] == []


async def test_a_stream_that_the_gateway_cannot_end_is_an_error() -> None:
    async def work(client: AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model=MODEL, messages=say("hi"), max_tokens=LONG, stream=True
        )
        with pytest.raises(openai.APIConnectionError):
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    front.drain.begin()

    async with open_front(drain_timeout_ms=0) as front:
        await on_trio(front, work)
        await front.until_cancelled(1)


# --- trying again ---------------------------------------------------------------------------


async def test_what_is_refused_for_now_is_tried_again_when_it_is_said_to_be(
    tmp_path: Path,
) -> None:
    async def work(client: AsyncOpenAI) -> None:
        patient = client.with_options(max_retries=1).chat.completions
        async with await patient.create(
            model=MODEL, messages=say("long"), max_tokens=LONG, stream=True
        ) as running:
            await anext(aiter(running))
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(model=MODEL, messages=say("hi"))
            assert caught.value.code == "too_many_requests"
            headers = caught.value.response.headers
            assert headers["x-should-retry"] == "true"
            wait_ms = int(headers["retry-after-ms"])
            assert 0 < wait_ms <= 1000 * int(headers["retry-after"])
            began_at = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    partial(patient.create, model=MODEL, messages=say("hi"), max_tokens=1)
                )
                await front.until_counted("gateway_answers_total{status=429}", 2)
                await running.close()
            assert trio.current_time() - began_at > wait_ms / 1000
        assert (await front.counts())["gateway_retried_total{retries=1}"] == 1

    async with open_front(keys_file=keys_file(tmp_path, "medium 1")) as front:
        await on_trio(front, work)


async def test_where_nats_is_gone_the_client_comes_back_later() -> None:
    async def work(client: AsyncOpenAI) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                partial(
                    client.chat.completions.create,
                    model=MODEL,
                    messages=say("hi"),
                    max_tokens=1,
                )
            )
            await front.until_counted("gateway_answers_total{status=503}", 1)
            front.nats.start()

    async with open_front() as front:
        front.nats.end()
        await wait_until(lambda: not front.broker.statistics().connected)
        await on_trio(front, work, max_retries=2)
        assert (await front.counts())["gateway_answers_total{status=200}"] == 1


@both_loops
async def test_what_takes_too_long_is_said_before_the_client_gives_up(run: Loop) -> None:
    """Else it would ask again, and have the same computed once more."""

    async def work(client: AsyncOpenAI) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=say("hi"), max_tokens=LONG, timeout=2
            )
        assert (caught.value.status_code, caught.value.code) == (504, "request_timeout")
        with pytest.raises(openai.APIError) as in_stream:
            async for _ in await client.chat.completions.create(
                model=MODEL,
                messages=say("hi"),
                max_tokens=LONG,
                stream=True,
                extra_body={"timeout_ms": 300},
            ):
                pass
        assert in_stream.value.code == "request_timeout"

    async with open_front() as front:
        await run(front, work, max_retries=2)
        counts = await front.counts()
    assert counts["gateway_answers_total{status=504}"] == 1
    assert counts["gateway_answers_total{status=broken}"] == 1
    assert not any("retried" in each for each in counts)


# --- leaving early ----------------------------------------------------------------------------


@both_loops
async def test_a_client_that_gives_up_ends_the_request_at_the_worker(run: Loop) -> None:
    """It does not say how long it waits, and has it tried again."""

    async def work(client: AsyncOpenAI) -> None:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(
                model=MODEL,
                messages=say("hi"),
                max_tokens=LONG,
                timeout=0.8,
                extra_headers={"X-Stainless-Read-Timeout": omit},
            )

    async with open_front() as front:
        await run(front, work, max_retries=1)
        await front.until_cancelled(2)
        counts = await front.counts()
    assert counts["gateway_callers_left_total"] == 2
    assert counts["gateway_retried_total{retries=1}"] == 1


@both_loops
async def test_a_stream_that_is_closed_early_ends_at_the_worker(run: Loop) -> None:
    async def work(client: AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(
            model=MODEL, messages=say("hi"), max_tokens=LONG, stream=True
        )
        seen = 0
        async for chunk in stream:
            seen += bool(chunk.choices[0].delta.content)
            if seen == 3:
                break
        await stream.close()

    async with open_front() as front:
        await run(front, work)
        await front.until_cancelled(1)
        await front.until_counted("gateway_callers_left_total", 1)


async def test_a_cancelled_scope_ends_the_request_at_the_worker() -> None:
    async def work(client: AsyncOpenAI) -> None:
        for cancelled, stream in enumerate((True, False), start=1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read, client, stream)
                await front.until_computing()
                nursery.cancel_scope.cancel()
            await front.until_cancelled(cancelled)

    async def read(client: AsyncOpenAI, stream: bool) -> None:  # noqa: FBT001
        answer: Any = await client.chat.completions.create(
            model=MODEL, messages=say("hi"), max_tokens=LONG, stream=stream
        )
        async for _ in answer:
            pass

    async with open_front() as front:
        await on_trio(front, work)
        await front.until_counted("gateway_callers_left_total", 2)


async def test_many_at_a_time_over_few_connections() -> None:
    async def work(client: AsyncOpenAI) -> None:
        async def ask(number: int) -> None:
            whole = await client.chat.completions.create(
                model=MODEL, messages=say(f"number {number}"), max_tokens=2
            )
            assert checked(whole).usage

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(ask, number)

    async with open_front() as front:
        await on_trio(front, work)
        assert (await front.counts())["gateway_answers_total{status=200}"] == 40
