"""Tokens per second: together against one at a time, and with every kind of sampling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from trio_worker.bench.figures import print_comparison, say
from trio_worker.bench.prompts import stories
from trio_worker.bench.setup import Setup
from trio_worker.grammar import schema
from trio_worker.grammar.matching import grammars_of_bytes

CONCURRENT = 8
REBUILT_TOKENS = 2000
REBUILDINGS = 9

PLAIN: Sequence[Mapping[str, Any]] = ({},)

HALF_DRAWN: Sequence[Mapping[str, Any]] = ({}, {"temperature": 1.0})

HALF_SEEDED: Sequence[Mapping[str, Any]] = ({}, {"temperature": 1.0, "seed": 1})

ALL_DIFFERENT: Sequence[Mapping[str, Any]] = (
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_p": 0.9},
    {"temperature": 1.2, "seed": 3, "top_k": 40},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05},
    {"repetition_penalty": 1.2},
    {"temperature": 0.9, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"logit_bias": {"100": -5.0}, "logprobs": True, "top_logprobs": 2},
)


LONG_LIST = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer"},
            "colour": {"enum": ["red", "green", "blue"]},
        },
        "required": ["name", "age", "colour"],
        "additionalProperties": False,
    },
}
"""Longer than any answer, so that all of a comparison are equally long."""

HELD: Mapping[str, Any] = {
    "temperature": 1.0,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "people", "schema": LONG_LIST},
    },
}
DRAWN: Mapping[str, Any] = {"temperature": 1.0}


async def batching(setup: Setup) -> None:
    """What it gains to decode together."""
    async with setup.worker() as worker:

        async def rate(concurrent: int, number: int) -> float:
            prompts = stories(f"{number}/{concurrent}", CONCURRENT)
            return await worker.rate(prompts, setup.max_tokens, concurrent=concurrent)

        await print_comparison(
            f"{CONCURRENT} requests together against one at a time, tokens/s",
            partial(rate, CONCURRENT),
            partial(rate, 1),
            rounds=setup.rounds,
            required="4.0",
        )
        say(f"  on {worker.device}; the largest batch had {worker.largest_batch} requests")


async def seeds(setup: Setup) -> None:
    """What it costs that some draw by a seed of their own."""
    await _compare_samplings(
        setup,
        "half of the requests seeded against none, tokens/s",
        HALF_SEEDED,
        HALF_DRAWN,
        required="0.95",
    )


async def forms(setup: Setup) -> None:
    """What it costs that answers are held to a schema, and what it costs those beside them."""
    await _compare_samplings(
        setup,
        "every request held to a schema against none, tokens/s",
        (HELD,),
        (DRAWN,),
        required="0.85",
    )
    await _compare_samplings(
        setup,
        "half of the requests held to a schema against none, tokens/s",
        (DRAWN, HELD),
        (DRAWN,),
        required="0.9",
    )
    say(f"  a matcher again from {REBUILT_TOKENS} tokens: {1000 * _rebuilding_s():.1f} ms")


def _rebuilding_s() -> float:
    """Seconds it takes to bring a sequence that comes back to where it was in its schema.

    Of single bytes, which are the most tokens that an answer can be cut into.
    """
    grammars = grammars_of_bytes(time.perf_counter)
    grammar = f"start: {schema.lark(LONG_LIST)}\n"
    people = ", ".join('{"name": "somebody", "age": 42, "colour": "green"}' for _ in range(100))
    produced = list(f"[{people}".encode())[:REBUILT_TOKENS]
    grammars.check(grammar)
    taken = []
    for _ in range(REBUILDINGS):
        began_at = time.perf_counter()
        grammars.matcher(grammar, produced)
        taken.append(time.perf_counter() - began_at)
    return statistics.median(taken)


async def mixing(setup: Setup) -> None:
    """What it costs that everybody samples differently."""
    await _compare_samplings(
        setup,
        "every request with sampling of its own against all greedy, tokens/s",
        ALL_DIFFERENT,
        PLAIN,
        required=None,
    )


async def _compare_samplings(
    setup: Setup,
    title: str,
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    *,
    required: str | None,
) -> None:
    async with setup.worker() as worker:

        async def rate(name: str, samplings: Sequence[Mapping[str, Any]], number: int) -> float:
            prompts = stories(f"{number}/{name}", 2 * CONCURRENT)
            return await worker.rate(
                prompts, setup.max_tokens, concurrent=CONCURRENT, samplings=samplings
            )

        await print_comparison(
            title,
            partial(rate, "ours", ours),
            partial(rate, "theirs", theirs),
            rounds=setup.rounds,
            required=required,
        )
