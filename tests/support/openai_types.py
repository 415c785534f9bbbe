"""Answers, held against the types of OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from openai import BaseModel

OURS = {"worker", "max_model_len", "reasoning_content"}
"""Fields that we add to OpenAI's."""

_Model = TypeVar("_Model", bound=BaseModel)


def strays(value: object) -> Iterator[str]:
    """The names of fields that the types do not have."""
    if isinstance(value, BaseModel):
        yield from value.model_extra or ()
        for name in type(value).model_fields:
            yield from strays(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            yield from strays(each)


def check(kind: type[BaseModel], body: bytes | str) -> None:
    """Strictly, and without a field more."""
    read = kind.model_validate_json(body, strict=True)
    assert {*strays(read)} <= OURS


def checked(value: _Model) -> _Model:
    """What the client made of an answer, which it does not check by itself."""
    check(type(value), value.to_json())
    return value
