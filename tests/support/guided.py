"""Rows of the tiny model that are held to a form."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from support.batches import NO_END, PROMPTS, admit
from trio_worker.grammar.forms import grammar_of
from trio_worker.markup.style import PLAIN
from trio_worker.protocol.prompt import Choice, Form, JsonSchema, Regex, Wanted

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
NUMBERS = {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 4}

CONSTRAINTS = {
    "person": JsonSchema(schema=json.dumps(PERSON)),
    "numbers": JsonSchema(schema=json.dumps(NUMBERS)),
    "object": JsonSchema(schema='{"type": "object"}'),
    "regex": Regex(pattern="(the|and| )+[0-9]{2,40}"),
    "choice": Choice(options=("hello world", "hello", "thing")),
}

GUIDED: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("person", {}),
    "drawn": ("person", {"temperature": 1.0, "seed": 7}),
    "drawn apart": ("numbers", {"temperature": 1.0, "seed": 8}),
    "top_p": ("person", {"temperature": 1.2, "seed": 9, "top_p": 0.5}),
    "top_k": ("object", {"temperature": 1.5, "seed": 10, "top_k": 5}),
    "min_p": ("regex", {"temperature": 1.5, "seed": 11, "min_p": 0.2}),
    "penalised": ("object", {"repetition_penalty": 1.5, "frequency_penalty": 0.7}),
    "biased": ("regex", {"logit_bias": (*NO_END, (70, 3.0), (30, -3.0))}),
    "chosen": ("choice", {"temperature": 1.0, "seed": 12}),
    "logprobs": ("person", {"logprobs": True, "top_logprobs": 3, "temperature": 1.0, "seed": 14}),
}
"""Rows by how their tokens are chosen: the constraint, and the sampling."""

MAX_TOKENS = 60


def form(model: Any, constraint: Any) -> Form:
    return Form(grammar=grammar_of(Wanted(constraint=constraint), PLAIN, model.grammars))


def guided(model: Any, name: str) -> Any:
    constraint, settings = GUIDED[name]
    place = list(GUIDED).index(name) % len(PROMPTS)
    one = admit(name, PROMPTS[place], max_tokens=MAX_TOKENS, **settings)
    return msgspec.structs.replace(one, form=form(model, CONSTRAINTS[constraint]))


def all_guided(model: Any) -> list[Any]:
    return [guided(model, name) for name in GUIDED]
