"""Which worker a prompt belongs to: an order of the fleet that all of it compute alike.

Rendezvous hashing: every worker has a score for every key, and the highest comes first; one that
comes or goes moves only the keys that are its own. A prompt has two keys. The two best by the
first, that of the system prompt, hold what all its conversations have in common; which of the two
comes first goes by the second, that of the conversation's beginning, so that a conversation stays
where it is, and the prompts of one large tenant are spread over two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

HOMES = 2
"""How many workers hold the same system prompt, while they have room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixKeys:
    """Digests of how a prompt begins."""

    system: bytes
    """Of what it has in common with other conversations."""
    conversation: bytes
    """Of what stays the same over all turns of one conversation."""


def digest(*parts: bytes) -> bytes:
    """Of these parts, one after the other, such that no two sequences of parts are alike."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        hashed.update(len(part).to_bytes(8))
        hashed.update(part)
    return hashed.digest()


def in_order(keys: PrefixKeys, workers: Iterable[str]) -> list[str]:
    """The workers' ids, the one that the prompt belongs to first."""
    by_system = sorted(workers, key=lambda worker: _score(keys.system, worker), reverse=True)
    homes = sorted(
        by_system[:HOMES], key=lambda worker: _score(keys.conversation, worker), reverse=True
    )
    return homes + by_system[HOMES:]


def _score(key: bytes, worker: str) -> tuple[bytes, str]:
    return blake2b(key + worker.encode(), digest_size=8).digest(), worker
