"""What every engine must do for answers that are to have a form, as functions like the others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace

from support.engine_conformance import PROMPTS, SEEDED, Run, admits, request, run_all
from trio_worker.errors import InvalidRequest
from trio_worker.ports import Engine
from trio_worker.protocol.prompt import FREE, Choice, Constraint, JsonSchema, Regex, Wanted
from trio_worker.protocol.turn import Admit, FinishReason, RequestId

SCHEMAS: dict[str, Any] = {
    "enum": {"enum": ["one", 2, None]},
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z]{1,4}$"},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
    },
}
MAX_TOKENS = 80
"""More than any answer has that keeps to one of these, were its every byte a token."""


async def guided(
    engine: Engine, constraint: Constraint, *, seeds: int = 3, name: str = "guided"
) -> list[Admit]:
    asked = dataclasses.replace(request(PROMPTS[0]), wanted=Wanted(constraint=constraint))
    prompt = await engine.tokenise(asked)
    assert prompt.form != FREE
    return [
        Admit(
            request_id=RequestId(f"{name}/{seed}"),
            prompt=prompt.tokens,
            produced=(),
            max_tokens=MAX_TOKENS,
            sampling=replace(SEEDED, seed=seed),
            stop=(),
            form=prompt.form,
        )
        for seed in range(seeds)
    ]


def schema(value: Any) -> JsonSchema:
    return JsonSchema(schema=json.dumps(value))


def said(run: Run) -> str:
    return "".join(run.texts)


async def check_an_answer_that_ends_keeps_to_what_was_asked_for(engine: Engine) -> None:
    await engine.wait_ready()
    for each in SCHEMAS.values():
        for run in (await run_all(engine, await guided(engine, schema(each)))).values():
            assert run.finish is FinishReason.STOP
            jsonschema.validate(json.loads(said(run)), each)
    for run in (await run_all(engine, await guided(engine, Choice(options=("a", "bcd"))))).values():
        assert (run.finish, said(run)) in {("stop", "a"), ("stop", "bcd")}
    for run in (await run_all(engine, await guided(engine, Regex(pattern="x[0-9]{3}")))).values():
        assert run.finish is FinishReason.STOP
        assert said(run)[:1] == "x"
        assert len(said(run)) == 4


async def check_an_answer_that_is_cut_off_says_so(engine: Engine) -> None:
    await engine.wait_ready()
    whole = await guided(engine, Regex(pattern="x{40}"), seeds=1)
    (run,) = (await run_all(engine, whole)).values()
    length = len(run.tokens)
    assert (said(run), run.finish) == ("x" * 40, FinishReason.STOP)
    (cut,) = (await run_all(engine, [replace(whole[0], max_tokens=length - 1)])).values()
    assert cut.finish is FinishReason.LENGTH
    assert cut.tokens == run.tokens[:-1]


async def check_a_guided_answer_is_the_same_in_company_and_gone_on_from_any_token(
    engine: Engine,
) -> None:
    await engine.wait_ready()
    sequences = await guided(engine, schema(SCHEMAS["object"]))
    company = [*await guided(engine, schema(SCHEMAS["enum"]), name="other"), *await admits(engine)]
    runs = await run_all(engine, [*sequences, *company])
    for sequence in sequences:
        undisturbed = runs[sequence.request_id]
        (alone,) = (await run_all(engine, [sequence])).values()
        assert alone == undisturbed
        for cut in range(1, len(alone.tokens)):
            back = replace(sequence, produced=tuple(alone.tokens[:cut]))
            (rest,) = (await run_all(engine, [back])).values()
            assert rest.tokens == alone.tokens[cut:]
            assert rest.finish == alone.finish
            assert said(alone).endswith(said(rest))


async def check_a_free_answer_is_the_same_beside_a_guided_one(engine: Engine) -> None:
    await engine.wait_ready()
    free = await admits(engine)
    alone = await run_all(engine, free)
    together = await run_all(engine, [*await guided(engine, schema(SCHEMAS["object"])), *free])
    assert {each.request_id: together[each.request_id] for each in free} == alone


async def check_a_form_that_cannot_be_had_is_refused_by_its_field(engine: Engine) -> None:
    await engine.wait_ready()
    refused: list[tuple[Constraint, str, str]] = [
        (schema({"type": "array", "uniqueItems": True}), "response_format", "uniqueItems"),
        (schema({"allOf": [{"enum": [1]}, {"enum": [2]}]}), "response_format", ""),
        (Regex(pattern="(unclosed"), "grammar", ""),
    ]
    for constraint, field, said_why in refused:
        asked = dataclasses.replace(request(PROMPTS[0]), wanted=Wanted(constraint=constraint))
        with pytest.raises(InvalidRequest, match=f"{field}.*{said_why}") as caught:
            await engine.tokenise(asked)
        assert str(caught.value.details["field"]).startswith(field)


FORM_CHECKS: tuple[Callable[[Engine], Awaitable[None]], ...] = (
    check_an_answer_that_ends_keeps_to_what_was_asked_for,
    check_an_answer_that_is_cut_off_says_so,
    check_a_guided_answer_is_the_same_in_company_and_gone_on_from_any_token,
    check_a_free_answer_is_the_same_beside_a_guided_one,
    check_a_form_that_cannot_be_had_is_refused_by_its_field,
)
