"""What a caller asked for, after every check that needs nothing but the request itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

from trio_worker.errors import InvalidRequest

RequestId = NewType("RequestId", str)


class FinishReason(StrEnum):
    """Why a completed answer ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The defaults switch everything off: greedy decoding."""

    temperature: float = 0.0
    """0…2; 0 is greedy."""
    top_p: float = 1.0
    """(0, 1]; 1 is off."""
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    """0 is off."""
    repetition_penalty: float = 1.0
    """1 is off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, added to its logit)."""
    seed: int = 0
    """0 ≤ seed < 2^53. A token is a function of (seed, position) and the logits alone."""
    logprobs: bool = False
    top_logprobs: int = 0
    """How many alternatives to report beside each token; 0…20, only with `logprobs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. Exactly one of `prompt` and `messages` is set."""

    request_id: RequestId
    prompt: str | None
    messages: tuple[ChatMessage, ...]
    max_tokens: int | None
    """None: as many as the default and the context allow."""
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    priority: int
    """The level; 0 is the most urgent."""
    timeout_s: float
    """From arrival to the terminal message."""

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
