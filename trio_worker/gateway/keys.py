"""Who may ask: keys of the API, by their hashes, and what each may have.

A file has a line for each key: `caller sha256-of-the-key [most-urgent-priority [concurrent]]`.
The keys themselves are nowhere, and nothing of a line or of a header is repeated in an error: what
somebody wrote in the wrong place may be a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from trio_worker.core.priority import NAMES
from trio_worker.errors import ConfigError
from trio_worker.gateway.errors import Refusal, Refused

CALLER = re.compile(r"\A[A-Za-z0-9_-]{1,64}\Z")
"""What a worker takes as the name of a caller."""
_SHA256 = re.compile(r"\A[0-9a-fA-F]{64}\Z")
_CONCURRENT = re.compile(r"\A[1-9][0-9]{0,5}\Z")
_LINE = "caller sha256-of-the-key [most-urgent-priority [concurrent]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What the holder of a key may have."""

    caller: str | None
    """The name of whoever holds it; None is anybody."""
    most_urgent: str | None = None
    """No request of the caller's is more urgent than this: `high`, `medium` or `low`."""
    concurrent: int | None = None
    """How many of the caller's requests may run at a time."""
    digest: bytes = field(default=b"", repr=False)


ANYBODY = Key(caller=None)
"""Whoever calls where there are no keys."""


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys; none at all lets everybody in, whatever they present."""

    keys: tuple[Key, ...] = field(default=(), repr=False)

    def who(self, presented: str | None) -> Key | None:
        """Whose key `presented` is; None if it is nobody's.

        It takes as long for every key that there is, and for every one that there is not.
        """
        if not self.keys:
            return ANYBODY
        digest = hashlib.sha256((presented or "").encode("utf-8", "surrogatepass")).digest()
        holder = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                holder = key
        return None if presented is None else holder

    def admit(self, headers: Mapping[str, str]) -> Key:
        """Whose key is in the headers of a call. Raises `Refused`."""
        holder = self.who(presented_key(headers))
        if holder is None:
            raise Refused(
                Refusal.INVALID_API_KEY,
                "this server wants a key that it knows: "
                "Authorization: Bearer <key>, or x-api-key: <key>",
                headers={"www-authenticate": "Bearer"},
            )
        return holder


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in the headers of a call, whose names are in lower case."""
    scheme, _, credentials = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key", "").strip() or None


def parse_keys(text: str, *, name: str) -> Keys:
    """What is in a file of keys; `name` is how errors call it.

    Raises `ConfigError` with a sentence for each line that is wrong. A file without a key is one
    of them: it would let everybody in.
    """
    keys: list[Key] = []
    problems: list[str] = []
    lines: dict[bytes, int] = {}
    """Where each key was first."""
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        fault = _fault(words)
        if fault is None:
            key = _key(*words)
            first = lines.setdefault(key.digest, number)
            if first == number:
                keys.append(key)
                continue
            fault = f"the same key as in line {first}"
        problems.append(f"{name}, line {number}: {fault}")
    if not keys and not problems:
        problems.append(f"{name}: there is no key in it; a line is `{_LINE}`")
    if problems:
        raise ConfigError(*problems)
    return Keys(tuple(keys))


class RunningRequests:
    """How many requests of each caller run now, on this gateway: all its state."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()

    @contextmanager
    def another(self, key: Key) -> Iterator[None]:
        """Counts a request while the block runs. Raises `Refused` if the caller has enough."""
        if key.caller is None:
            yield
            return
        if key.concurrent is not None and self._running[key.caller] >= key.concurrent:
            raise Refused(
                Refusal.TOO_MANY_REQUESTS,
                f"{key.concurrent} requests of {key.caller} are running, as many as it may have; "
                "wait for one to end",
            )
        self._running[key.caller] += 1
        try:
            yield
        finally:
            self._running[key.caller] -= 1
            if not self._running[key.caller]:
                del self._running[key.caller]

    def statistics(self) -> dict[str, int]:
        """The number of running requests by the caller's name."""
        return dict(self._running)


def _key(caller: str, sha256: str, most_urgent: str = "", concurrent: str = "") -> Key:
    return Key(
        caller=caller,
        most_urgent=most_urgent or None,
        concurrent=int(concurrent) if concurrent else None,
        digest=bytes.fromhex(sha256),
    )


def _fault(words: list[str]) -> str | None:
    """What is wrong with a line, without a word of it."""
    if not 2 <= len(words) <= 4:
        return f"{len(words)} words; expected `{_LINE}`"
    if not CALLER.match(words[0]):
        return "the caller is not 1 to 64 of A-Z a-z 0-9 _ -"
    if not _SHA256.match(words[1]):
        return (
            "the second word is not the SHA-256 of a key, 64 hexadecimal digits: "
            '`printf %s "$KEY" | shasum -a 256` prints it'
        )
    if len(words) > 2 and words[2] not in NAMES:
        return f"the most urgent priority is none of {', '.join(NAMES)}"
    if len(words) > 3 and not _CONCURRENT.match(words[3]):
        return "the number of concurrent requests is not 1 to 999999"
    return None
