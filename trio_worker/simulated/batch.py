"""What a simulated engine computes: words that depend on the prompt and the seed, and no time.

A token is a word and a space; a prompt has a token for each word between white space.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import OrderedDict

from trio_worker.protocol.turn import (
    Admit,
    FinishReason,
    Output,
    Prefill,
    RequestId,
    TokenLogprob,
    Work,
)

SHORTEST_PREFIX = 16
"""As in the real one: fewer tokens are computed as fast as they are copied."""
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "so", "tu")


def word(token: int) -> str:
    """The word of a token: its digits as syllables."""
    return "".join(_SYLLABLES[int(digit)] for digit in str(token))


def answer_tokens(prompt: tuple[int, ...], seed: int, count: int, vocabulary: int) -> list[int]:
    """The first `count` tokens of the answer to `prompt` under `seed`."""
    base = hashlib.blake2b(repr((prompt, seed)).encode(), digest_size=8).digest()
    return [
        zlib.crc32(base + position.to_bytes(8, "big")) % vocabulary for position in range(count)
    ]


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
        if not SHORTEST_PREFIX <= len(tokens) <= self._limit:
            return
        if tokens in self._entries:
            self._entries.move_to_end(tokens)
            return
        self._entries[tokens] = None
        self.tokens += len(tokens)
        while self.tokens > self._limit:
            oldest, _ = self._entries.popitem(last=False)
            self.tokens -= len(oldest)

    def clear(self) -> None:
        self._entries.clear()
        self.tokens = 0


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(at for at in range(length) if one[at] != other[at])


class Resident:
    """A sequence in the engine: how far its prefill is, and what it will say."""

    def __init__(self, admit: Admit, vocabulary: int, kept: KeptCaches) -> None:
        self.admit = admit
        self.to_prefill = len(admit.prompt) + len(admit.produced)
        self.cached = kept.find(admit.prompt + admit.produced)
        self.prefilled = self.cached
        self.position = len(admit.produced)
        self._tokens = answer_tokens(
            admit.prompt, admit.sampling.seed, admit.max_tokens, vocabulary
        )
        self._text = "".join(f"{word(token)} " for token in admit.produced)
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
        return everything + tuple(self._tokens[len(self.admit.produced) : self.position])

    @property
    def decoding(self) -> bool:
        return self.prefilled == self.to_prefill

    def step(self) -> Output:
        """The next token."""
        token = self._tokens[self.position]
        self.position += 1
        self._text += f"{word(token)} "
        finish = FinishReason.LENGTH if self.position == self.admit.max_tokens else None
        stops = [at for stop in self.admit.stop if (at := self._text.find(stop)) >= 0]
        end = self._safe_end()
        if stops:
            finish, end = FinishReason.STOP, min(stops)
        elif finish is not None:
            end = len(self._text)
        text, self._shown = self._text[self._shown : end], end
        return Output(
            request_id=self.admit.request_id,
            token=token,
            text=text,
            finish=finish,
            logprobs=(self._logprob(token),) if self.admit.sampling.logprobs else (),
        )

    def _safe_end(self) -> int:
        """Where the text ends that no stop string can reach back into."""
        held = 0
        for stop in self.admit.stop:
            for length in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:length]):
                    held = length
                    break
        return len(self._text) - held

    def _logprob(self, token: int) -> TokenLogprob:
        value = -math.log(2)
        others = range(token, token + self.admit.sampling.top_logprobs)
        return TokenLogprob(
            token=f"{word(token)} ",
            logprob=value,
            top=tuple((f"{word(other)} ", value * (1 + other - token)) for other in others),
        )


class SimulatedBatch:
    """The sequences that a simulated engine holds, and the caches kept of those that have left."""

    def __init__(self, *, vocabulary: int, prefix_cache_tokens: int) -> None:
        self._vocabulary = vocabulary
        self._residents: dict[RequestId, Resident] = {}
        self._kept = KeptCaches(prefix_cache_tokens)

    @property
    def residents(self) -> frozenset[RequestId]:
        return frozenset(self._residents)

    @property
    def held_tokens(self) -> int:
        """In the caches of all, and in those that are kept."""
        return sum(each.held for each in self._residents.values()) + self._kept.tokens

    def token_of(self, text: str) -> int:
        return zlib.crc32(text.encode()) % self._vocabulary

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """At least one, also for no words at all."""
        return tuple(self.token_of(each) for each in text.split()) or (0,)

    def with_a_word_of(self, words: frozenset[str]) -> list[RequestId]:
        """The sequences whose prompt holds one of them."""
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
            self._residents[admit.request_id] = Resident(admit, self._vocabulary, self._kept)

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
