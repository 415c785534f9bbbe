"""The models there are: what workers say of themselves, and how OpenAI's clients are told.

A model is served by any number of workers, and any of them may get a request for it; so the least
that one of them allows is what holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import msgspec

from trio_worker.errors import ModelNotFound
from trio_worker.gateway.json_body import quoted

_LEVELS = 3
"""The levels of priority where no worker has said how many it has."""
_LISTED_MAX = 16
"""Names of models in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one worker says of itself."""

    worker_id: str
    model: str
    since: int
    """When it was first heard of, in seconds since 1970."""
    context_length: int | None = None
    max_tokens_limit: int | None = None
    timeout_limit_ms: int | None = None
    priority_levels: int = _LEVELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What every worker that may get a request allows; None is not known."""

    max_tokens: int | None = None
    timeout_ms: int | None = None
    priority_levels: int = _LEVELS


_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]


class _Metadata(msgspec.Struct, frozen=True):
    """All text, as ADR-32 wants it; read as the numbers they are."""

    worker_id: str
    model: str
    context_length: _Count | None = None
    max_tokens_limit: _Count | None = None
    timeout_limit_ms: _Count | None = None
    priority_levels: _Count = _LEVELS


class _Info(msgspec.Struct, frozen=True):
    metadata: dict[str, Any]


def read_offer(info: bytes, *, since: int) -> Offer | None:
    """What an answer to `$SRV.INFO` says; None if it is not a worker's."""
    try:
        metadata = msgspec.json.decode(info, type=_Info).metadata
        said = msgspec.convert(metadata, _Metadata, strict=False)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return Offer(since=since, **msgspec.structs.asdict(said))


def limits_of(offers: Sequence[Offer], model: str | None) -> Limits:
    """What holds for a request for `model`; for any worker if that is None.

    Raises `ModelNotFound` if workers are known and none serves it. Where none is known, nothing is:
    one may just be starting.
    """
    if not offers:
        return Limits()
    candidates = offers if model is None else _serving(offers, model)
    return Limits(
        max_tokens=_least(offer.max_tokens_limit for offer in candidates),
        timeout_ms=_least(offer.timeout_limit_ms for offer in candidates),
        priority_levels=min(offer.priority_levels for offer in candidates),
    )


def list_body(offers: Sequence[Offer]) -> bytes:
    """The body of `GET /v1/models`, by name."""
    names = sorted({offer.model for offer in offers})
    return msgspec.json.encode(
        {"object": "list", "data": [_model(_serving(offers, name)) for name in names]}
    )


def model_body(offers: Sequence[Offer], model: str) -> bytes:
    """The body of `GET /v1/models/{id}`. Raises `ModelNotFound`."""
    return msgspec.json.encode(_model(_serving(offers, model)))


def _model(offers: Sequence[Offer]) -> dict[str, Any]:
    return {
        "id": offers[0].model,
        "object": "model",
        "created": min(offer.since for offer in offers),
        "owned_by": "trio-worker",
        "max_model_len": _least(offer.context_length for offer in offers),
    }


def _serving(offers: Sequence[Offer], model: str) -> list[Offer]:
    serving = [offer for offer in offers if offer.model == model]
    if not serving:
        names = sorted({offer.model for offer in offers})
        more = ", …" if len(names) > _LISTED_MAX else ""
        there = ", ".join(names[:_LISTED_MAX]) + more if names else "no worker is known"
        raise ModelNotFound(
            f"no worker serves the model {quoted(model)}; there is: {there}",
            details={"field": "model"},
        )
    return serving


def _least(values: Iterable[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)
