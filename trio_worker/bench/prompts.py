"""What is asked: prompts of which none comes twice, and the fields of a request."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

SUBJECTS = (
    "a lighthouse keeper and the sea",
    "the city of Paris and its history",
    "a bicycle race through the mountains",
    "a river and the people who live on it",
    "the weather on a small island",
    "a baker who rises before dawn",
    "a train that crosses the desert",
    "a good teacher and a bad pupil",
)

WORDS = (
    "the sea was calm and blue that day when old men went out to fish for their supper while "
    "young boys ran along the sand looking for wood rope glass or bread"
)
"""Short and common: about a token each."""


def stories(name: str, number: int) -> list[str]:
    """Prompts with long answers, unlike those of any other name from the first words on."""
    return [
        f"{name}.{i}: write a long story about {SUBJECTS[i % len(SUBJECTS)]}."
        for i in range(number)
    ]


def words(number: int, *, seed: int) -> str:
    """This many words, which are as many tokens or nearly; others for every seed."""
    words = WORDS.split()
    drawn = random.Random(seed)  # noqa: S311 - no secret
    return " ".join(drawn.choice(words) for _ in range(number))


def request_for(prompt: str, *, system: str | None = None, **fields: object) -> Mapping[str, Any]:
    """Greedy and streamed, unless the fields say otherwise; in no hurry."""
    return {
        "messages": messages_for(prompt, system),
        "temperature": 0,
        "stream": True,
        "timeout_ms": 600_000,
        **fields,
    }


def messages_for(prompt: str, system: str | None = None) -> list[Mapping[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": prompt}]
