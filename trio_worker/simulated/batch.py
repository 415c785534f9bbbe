"""What a simulated engine computes: answers that depend on the prompt and the seed, and no time.

A token of an answer that may be anything is a word and a space; a prompt has a token for each word
between white space. What is said is worked out in `speech.py`.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from trio_worker.grammar.matching import Grammars
from trio_worker.markup.reader import AnswerReader
from trio_worker.protocol.prompt import Piece
from trio_worker.protocol.turn import (
    Admit,
    FinishReason,
    Output,
    Prefill,
    RequestId,
    TokenLogprob,
    Work,
)
from trio_worker.simulated.speech import STYLE, Speaker, word

SHORTEST_PREFIX = 16
"""As in the real one: fewer tokens are computed as fast as they are copied."""


class KeptCaches:
    """Token strings whose caches are kept after their sequence has left; bounded, LRU."""

    def __init__(self, limit_tokens: int) -> None:
        self._limit = limit_tokens
        self._entries: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self.tokens = 0

    def find(self, wanted: tuple[int, ...]) -> int:
        """How many of the first tokens need not be computed; the last one always is."""
        best: tuple[int, ...] = ()
        length = SHORTEST_PREFIX - 1
        for entry in self._entries:
            if entry[0] == wanted[0]:
                common = _common(entry, wanted[:-1])
                if common > length:
                    best, length = entry, common
        if not best:
            return 0
        self._entries.move_to_end(best)
        return length

    def keep(self, tokens: tuple[int, ...]) -> None:
        """As the real one does: of what begins alike and goes on, the longest."""
        if not SHORTEST_PREFIX <= len(tokens) <= self._limit:
            return
        for entry in [each for each in self._entries if each[0] == tokens[0]]:
            length = len(entry)
            if entry[: len(tokens)] == tokens:
                return
            if tokens[:length] == entry:
                del self._entries[entry]
                self.tokens -= length
        self._entries[tokens] = None
        self.tokens += len(tokens)
        while self.tokens > self._limit:
            oldest, _ = self._entries.popitem(last=False)
            self.tokens -= len(oldest)

    def clear(self) -> None:
        self._entries.clear()
        self.tokens = 0


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with, by halves: slices are compared much faster than tokens."""
    alike, length = 0, min(len(one), len(other))
    while alike < length:
        end = (alike + length + 1) // 2
        if one[alike:end] == other[alike:end]:
            alike = end
        else:
            length = end - 1
    return alike


class Resident:
    """A sequence in the engine: how far its prefill is, and what it will say."""

    def __init__(self, admit: Admit, speaker: Speaker, kept: KeptCaches) -> None:
        self.admit = admit
        self.to_prefill = len(admit.prompt) + len(admit.produced)
        self.cached = kept.find(admit.prompt + admit.produced)
        self.prefilled = self.cached
        self.position = 0
        self._speech = speaker.speech(
            admit.prompt, admit.form, seed=admit.sampling.seed, max_tokens=admit.max_tokens
        )
        self._is_read = admit.form.finds_reasoning or bool(admit.form.tools)
        self._reader = AnswerReader(STYLE, admit.form)
        self._text = ""
        """Without what is reasoned and called."""
        self._waiting: list[TokenLogprob] = []
        """Of tokens that may yet turn out to be of the text."""
        for _ in admit.produced:
            self._read_next()
        self._shown = self._safe_end()

    @property
    def held(self) -> int:
        """Tokens in its cache."""
        return self.prefilled + self.position - len(self.admit.produced)

    def computed(self) -> tuple[int, ...]:
        """Those tokens."""
        everything = (*self.admit.prompt, *self.admit.produced)
        if not self.decoding:
            return everything[: self.prefilled]
        return everything + tuple(self._speech.tokens[len(self.admit.produced) : self.position])

    @property
    def decoding(self) -> bool:
        return self.prefilled == self.to_prefill

    def step(self) -> Output:
        """The next token."""
        token = self._speech.tokens[self.position]
        was_reasoning = self._reader.is_reasoning
        pieces, logprobs, is_over = self._read_next()
        finish = None
        if is_over:
            finish = FinishReason.STOP
        elif self.position == len(self._speech.tokens):
            finish = FinishReason.STOP if self._speech.ends else FinishReason.LENGTH
            rest = self._reader.finish(is_cut=not self._speech.ends)
            self._text += rest.content
            pieces += rest.pieces
            logprobs += tuple(self._waiting)
        stops = [at for stop in self.admit.stop if (at := self._text.find(stop)) >= 0]
        end = self._safe_end()
        if stops:
            finish, end = FinishReason.STOP, min(stops)
        elif finish is not None:
            end = len(self._text)
        if finish is FinishReason.STOP and self._reader.has_called:
            finish = FinishReason.TOOL_CALLS
        text, self._shown = self._text[self._shown : end], end
        return Output(
            request_id=self.admit.request_id,
            token=token,
            text=text,
            finish=finish,
            logprobs=logprobs,
            beside=pieces,
            is_reasoning=was_reasoning or self._reader.is_reasoning,
        )

    def _read_next(self) -> tuple[tuple[Piece, ...], tuple[TokenLogprob, ...], bool]:
        """Take the next token apart: its pieces, what is told of tokens, whether it is over."""
        token, said = self._speech.tokens[self.position], self._speech.text_at(self.position)
        self.position += 1
        if self.admit.sampling.logprobs:
            self._waiting.append(self._logprob(token, said))
        content, is_over = said, False
        pieces: tuple[Piece, ...] = ()
        if self._is_read:
            reading = self._reader.feed(said)
            content, pieces, is_over = reading.content, reading.pieces, reading.is_over
        self._text += content
        told: tuple[TokenLogprob, ...] = ()
        if content:
            told = tuple(self._waiting)
        if content or not self._reader.holds_back:
            self._waiting.clear()
        return pieces, told, is_over

    def _safe_end(self) -> int:
        """Where the text ends that no stop string can reach back into."""
        held = 0
        for stop in self.admit.stop:
            for length in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:length]):
                    held = length
                    break
        return len(self._text) - held

    def _logprob(self, token: int, said: str) -> TokenLogprob:
        value = -math.log(2)
        others = range(token, token + self.admit.sampling.top_logprobs)
        return TokenLogprob(
            token=said,
            logprob=value,
            top=tuple(
                (said if other == token else f"{word(other)} ", value * (1 + other - token))
                for other in others
            ),
        )


class SimulatedBatch:
    """The sequences that a simulated engine holds, and the caches kept of those that have left."""

    def __init__(self, *, vocabulary: int, prefix_cache_tokens: int) -> None:
        self._speaker = Speaker(vocabulary)
        self._residents: dict[RequestId, Resident] = {}
        self._kept = KeptCaches(prefix_cache_tokens)

    @property
    def residents(self) -> frozenset[RequestId]:
        return frozenset(self._residents)

    @property
    def grammars(self) -> Grammars:
        """What an answer may be held to."""
        return self._speaker.grammars

    @property
    def held_tokens(self) -> int:
        """In the caches of all, and in those that are kept."""
        return sum(each.held for each in self._residents.values()) + self._kept.tokens

    def token_of(self, text: str) -> int:
        return self._speaker.token_of(text)

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """At least one, also for no words at all."""
        return tuple(map(self._speaker.token_of, text.split())) or (0,)

    def with_a_word_of(self, words: frozenset[str]) -> list[RequestId]:
        """The sequences whose prompt holds one of them."""
        if not words:
            return []
        tokens = {self.token_of(each) for each in words}
        return [
            request_id
            for request_id, each in self._residents.items()
            if tokens.intersection(each.admit.prompt)
        ]

    def clear(self) -> None:
        """Forget everything, as a process does that ends."""
        self._residents.clear()
        self._kept.clear()

    def take_in(self, work: Work) -> None:
        # Sorted: what is kept, and so what a later prefill costs, is not left to a set's order.
        for request_id in sorted(work.remove):
            self.let_go(request_id)
        if work.trim_caches:
            self._kept.clear()
        for admit in work.admit:
            assert admit.request_id not in self._residents, f"{admit.request_id} is here already"
            self._residents[admit.request_id] = Resident(admit, self._speaker, self._kept)

    def let_go(self, request_id: RequestId) -> None:
        """A sequence leaves, if it is here, and its cache may be kept."""
        if (resident := self._residents.pop(request_id, None)) is not None:
            self._kept.keep(resident.computed())

    def fail(self, request_id: RequestId) -> None:
        """A sequence leaves that cannot be computed: nothing of it is kept."""
        del self._residents[request_id]

    def decoding(self) -> list[Resident]:
        """Those whose prefill is done."""
        return [each for each in self._residents.values() if each.decoding]

    def prefill(self, budget: int) -> list[tuple[Prefill, int]]:
        """Spend the budget on the residents in order; returns each one's progress and share."""
        shares: list[tuple[Prefill, int]] = []
        for each in self._residents.values():
            count = min(budget, each.to_prefill - each.prefilled)
            if count:
                budget -= count
                each.prefilled += count
                progress = Prefill(
                    request_id=each.admit.request_id,
                    done=each.prefilled,
                    total=each.to_prefill,
                    cached=each.cached,
                )
                shares.append((progress, count))
        return shares

    def step(self, decoding: list[Resident]) -> tuple[Output, ...]:
        """One token of each of these; whoever has ended leaves."""
        outputs = tuple(each.step() for each in decoding)
        for output in outputs:
            if output.finish is not None:
                self.let_go(output.request_id)
        return outputs
