"""What is logged while a test looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loguru import logger


@contextmanager
def logged(level: str, *, of: str | None = None) -> Iterator[list[Any]]:
    """loguru's records from this level on, of one module or of all."""
    records: list[Any] = []
    sink = logger.add(lambda message: records.append(message.record), level=level, filter=of)
    try:
        yield records
    finally:
        logger.remove(sink)


def texts(records: list[Any]) -> list[str]:
    return [record["message"] for record in records]
