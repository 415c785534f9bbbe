"""What a caller asked for, after every check that needs nothing but the request itself."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from trio_worker.errors import InvalidRequest
from trio_worker.protocol.prompt import ANYTHING, Message, Wanted
from trio_worker.protocol.turn import RequestId, Sampling

SEED_END = 2**53
"""Seeds are below this: the largest range that JSON numbers carry exactly everywhere."""
CHOICES_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. Exactly one of `prompt` and `messages` is set."""

    request_id: RequestId
    prompt: str | None
    messages: tuple[Message, ...]
    max_tokens: int | None
    """None: as many as the default and the context allow."""
    fit_max_tokens: bool
    """Whether `max_tokens` is cut down to what the context leaves, rather than refused."""
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    priority: int
    """The level; 0 is the most urgent."""
    timeout_s: float
    """From arrival to the terminal message."""
    caller: str | None
    """Who asks, as the subject says or else the request, which proves nothing; None: nobody."""
    wanted: Wanted = ANYTHING
    """What the answer is to be like."""
    choices: int = 1
    """How many answers are wanted, up to `CHOICES_MAX`; each has a row of its own in the batch."""
    include_usage: bool = False
    """Whether a stream ends with a message for the usage alone."""

    def sampling_of(self, choice: int) -> Sampling:
        """Each choice has a seed of its own: those of the request and after it."""
        if choice == 0:
            return self.sampling
        seed = (self.sampling.seed + choice) % SEED_END
        return msgspec.structs.replace(self.sampling, seed=seed)

    @property
    def is_chat(self) -> bool:
        return self.prompt is None

    @property
    def text_field(self) -> str:
        """The one of `prompt` and `messages` that is set, as an error's `details.field`."""
        return "messages" if self.is_chat else "prompt"

    def check_vocabulary(self, size: int) -> None:
        """Raise `InvalidRequest` if a token that is named is none of the model's `size`."""
        for token, _ in self.sampling.logit_bias:
            if token >= size:
                raise InvalidRequest(
                    f"logit_bias: {token} is no token of this model, which has 0 to {size - 1}",
                    details={"field": "logit_bias", "vocabulary_size": size},
                )
