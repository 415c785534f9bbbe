"""Calls of tools, as an answer tells them: part by part in a stream, or whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from trio_worker.protocol.prompt import CallArguments, CallBegun, Piece
from trio_worker.protocol.turn import RequestId

_ID_BYTES = 12


class _FunctionDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str


class CallDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to a call; `id`, `type` and the name come with the first."""

    index: int
    id: str | None = None
    type: str | None = None
    function: _FunctionDelta


class _Called(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class Call(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: str = "function"
    function: _Called


class CallIds:
    """The ids of the calls of one choice."""

    def __init__(self, request_id: RequestId, choice: int) -> None:
        self._of = f"{request_id}.{choice}"

    def of(self, begun: CallBegun) -> str:
        """The model's own, or one that follows from the request, the choice and the index."""
        if begun.id is not None:
            return begun.id
        seed = f"{self._of}.{begun.index}".encode()
        return "call_" + hashlib.blake2b(seed, digest_size=_ID_BYTES).hexdigest()


def call_deltas(beside: Sequence[Piece], ids: CallIds) -> tuple[CallDelta, ...] | None:
    """What one token adds to the calls, an entry a call; None: nothing.

    A client puts the entries of a chunk where their indices say: two of one call would be two.
    """
    begun: dict[int, CallBegun] = {}
    arguments: dict[int, str] = {}
    for piece in beside:
        if isinstance(piece, CallBegun):
            begun[piece.index] = piece
            arguments.setdefault(piece.index, "")
        elif isinstance(piece, CallArguments):
            arguments[piece.index] = arguments.get(piece.index, "") + piece.text
    if not arguments:
        return None
    return tuple(
        CallDelta(index=index, function=_FunctionDelta(arguments=text))
        if index not in begun
        else CallDelta(
            index=index,
            id=ids.of(begun[index]),
            type="function",
            function=_FunctionDelta(name=begun[index].name, arguments=text),
        )
        for index, text in arguments.items()
    )


def whole_calls(beside: Sequence[Piece], ids: CallIds) -> tuple[Call, ...]:
    """The calls that all these pieces make, in the order in which they began."""
    begun = [piece for piece in beside if isinstance(piece, CallBegun)]
    arguments: dict[int, list[str]] = {piece.index: [] for piece in begun}
    for piece in beside:
        if isinstance(piece, CallArguments):
            arguments[piece.index].append(piece.text)
    return tuple(
        Call(id=ids.of(each), function=_Called(each.name, "".join(arguments[each.index])))
        for each in begun
    )
