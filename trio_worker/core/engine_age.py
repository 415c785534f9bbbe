"""How much an engine has computed since it started, and when it is to be replaced for that."""

from __future__ import annotations


class EngineAge:
    """Metal's count of buffers runs out after some 300,000 tokens; nothing else does.

    Its state: the tokens decoded since the engine started.
    """

    def __init__(self, *, most_tokens: int) -> None:
        self.tokens = 0
        self._most_tokens = most_tokens

    def decoded(self, tokens: int) -> None:
        self.tokens += tokens

    def restarted(self) -> None:
        """Another engine has taken its place, or is about to."""
        self.tokens = 0

    def is_over(self, accelerator: str | None) -> bool:
        return accelerator == "metal" and self.tokens >= self._most_tokens
