"""Files and batches with OpenAI's own client for Python, unmodified, before a whole worker."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import openai
import pytest
import trio
from openai import AsyncOpenAI
from openai.types import Batch, FileObject
from support.batch_rig import text_of
from support.clients_rig import FAILING, KEY, MODEL, PATIENCE_S, Front, open_front
from support.jobs_rig import JOBS_ON
from support.openai_types import checked

pytestmark = [
    pytest.mark.nats,
    pytest.mark.filterwarnings(
        r"ignore:Async generator .(openai|httpx2|httpcore2)\.:ResourceWarning"
    ),
]


def ask(custom_id: str, words: str, **more: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": words}], **more}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    }


async def with_client(front: Front, work: Callable[[AsyncOpenAI], Awaitable[None]]) -> None:
    with trio.fail_after(PATIENCE_S):
        async with AsyncOpenAI(base_url=front.base_url, api_key=KEY, max_retries=0) as client:
            await work(client)


async def begun(client: AsyncOpenAI, lines: Sequence[dict[str, Any]]) -> tuple[FileObject, Batch]:
    file = checked(await client.files.create(file=("night.jsonl", text_of(lines)), purpose="batch"))
    batch = await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"for": "a test"},
    )
    return file, checked(batch)


async def over(client: AsyncOpenAI, batch: Batch) -> Batch:
    """The batch, asked for until it is over: this is how its owner learns of it."""
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        await trio.sleep(0.1)
        batch = checked(await client.batches.retrieve(batch.id))
    return batch


async def test_a_file_becomes_a_batch_and_its_answers_are_those_of_single_requests() -> None:
    lines = [
        ask("one", "hello there", seed=3, max_tokens=5),
        ask("two", f"this is {FAILING}", max_tokens=5),
        ask("three", "good night", seed=4, max_tokens=6),
    ]

    async def work(client: AsyncOpenAI) -> None:
        file, batch = await begun(client, lines)
        assert (file.filename, file.bytes) == ("night.jsonl", len(text_of(lines)))
        batch = await over(client, batch)
        assert batch.status == "completed"
        assert batch.metadata == {"for": "a test"}
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        assert batch.usage is not None
        assert batch.usage.output_tokens == 11
        assert batch.completed_at is not None
        assert batch.created_at <= batch.completed_at <= batch.created_at + PATIENCE_S
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        text = (await client.files.content(batch.output_file_id)).text
        answers = {each["custom_id"]: each for each in map(json.loads, text.splitlines())}
        assert list(answers) == ["one", "three"]
        single = await client.chat.completions.create(**lines[0]["body"])
        body = answers["one"]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == single.choices[0].message.content
        (failure,) = (await client.files.content(batch.error_file_id)).text.splitlines()
        response = json.loads(failure)["response"]
        assert response["status_code"] == 500
        assert response["body"]["error"]["code"] == "engine_failed"
        assert [each.id async for each in client.batches.list()] == [batch.id]
        assert {each.id async for each in client.files.list(purpose="batch")} == {file.id}
        assert (await client.files.retrieve(batch.output_file_id)).purpose == "batch_output"
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)

    async with open_front(JOBS_ON) as front:
        await with_client(front, work)


async def test_a_batch_is_cancelled_and_a_wrong_file_fails() -> None:
    async def work(client: AsyncOpenAI) -> None:
        long = [ask(f"c{number}", f"story {number}", max_tokens=200) for number in range(100)]
        _, batch = await begun(client, long)
        cancelled = await over(client, checked(await client.batches.cancel(batch.id)))
        assert cancelled.status == "cancelled"
        assert cancelled.request_counts is not None
        assert cancelled.request_counts.completed < 100
        _, batch = await begun(client, [ask("a", "x"), ask("b", "x", stream=True)])
        failed = await over(client, batch)
        assert failed.status == "failed"
        assert failed.errors is not None
        assert failed.errors.data is not None
        assert [each.line for each in failed.errors.data] == [2]
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)

    async with open_front(JOBS_ON) as front:
        await with_client(front, work)


async def test_without_jetstream_the_client_is_told_what_to_enable() -> None:
    async def work(client: AsyncOpenAI) -> None:
        with pytest.raises(openai.InternalServerError, match=r"nats\.jetstream\.enabled"):
            await client.files.create(file=b"{}", purpose="batch")

    async with open_front() as front:
        await with_client(front, work)
