"""A choice of an answer that is not streamed: put together output by output."""

from __future__ import annotations

from trio_worker.protocol.prompt import Piece, Reasoning
from trio_worker.protocol.turn import FinishReason, Output, TokenLogprob


class WholeChoice:
    """Its state is what has come of it; bound: the pieces of `max_tokens` tokens."""

    def __init__(self) -> None:
        self.logprobs: list[TokenLogprob] = []
        self.offsets: list[int] = []
        """How many characters stand before each of `logprobs`."""
        self.beside: list[Piece] = []
        self.finish: FinishReason | None = None
        self._texts: list[str] = []
        self._length = 0

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def reasoning(self) -> str:
        return "".join(each.text for each in self.beside if isinstance(each, Reasoning))

    def add(self, output: Output) -> None:
        if output.logprobs:
            self.logprobs += output.logprobs
            self.offsets += [self._length] * len(output.logprobs)
        self._texts.append(output.text)
        self._length += len(output.text)
        self.beside += output.beside
        self.finish = output.finish
