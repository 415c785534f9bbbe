"""Choices of an answer that is not streamed, as they come to be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from trio_worker.protocol.prompt import Piece
from trio_worker.protocol.turn import FinishReason, Output, RequestId, TokenLogprob
from trio_worker.wire.native import WholeChoice


def whole_choice(
    texts: Sequence[str],
    logprobs: Sequence[TokenLogprob] = (),
    *,
    finish: FinishReason = FinishReason.STOP,
    beside: Sequence[Piece] = (),
) -> WholeChoice:
    """What comes of one output for each text; all of `beside` is with the last."""
    choice = WholeChoice()
    for place, (text, logprob) in enumerate(zip_longest(texts, logprobs)):
        is_last = place == len(texts) - 1
        choice.add(
            Output(
                request_id=RequestId("r"),
                token=1,
                text=text,
                finish=finish if is_last else None,
                logprobs=() if logprob is None else (logprob,),
                beside=tuple(beside) if is_last else (),
            )
        )
    choice.finish = finish
    return choice
