"""What the stages need from the world, as Protocols, and the values that cross them.

Each port has two implementations that pass the same conformance tests: the real one in a
room of its own, and one in `simulated/` that runs in the event loop, also on a mock clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from trio_util import AsyncBool

from trio_worker.core.memory import MemoryReading
from trio_worker.core.request import Request
from trio_worker.protocol.prompt import Prompt
from trio_worker.protocol.turn import (
    EngineInfo,
    Report,
    Work,
)

# --- the broker ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, in either direction."""

    subject: str
    body: bytes = b""
    reply: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Subscription(Protocol):
    """Interest in one subject."""

    async def drain(self) -> None:
        """End the interest; what the server had already sent still reaches the sink.

        Returns when the last of it has. Cancelled: the interest has ended all the same, but
        messages under way may be lost. Never raises because the connection is gone.
        """


class Outlet(Protocol):
    """One answer's share of the outbox: it goes to one subject, and is counted apart."""

    @property
    def unpublished_bytes(self) -> int:
        """Bytes published here that have not been handed to the connection yet."""

    def publish(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Put a message into the outbox; it leaves in order, as soon as there is a connection.

        `headers` are those that the outlet does not have already; they come behind these.
        Synchronous: when this returns, the message will be sent unless the process dies or
        `discard` is called. Raises `MessageTooLarge` (headers counted) and `ValueError` for what
        is no header name, and then nothing is sent.
        """

    def discard(self) -> None:
        """Forget what this outlet has not handed to the connection yet."""


class Broker(Protocol):
    """A connection to the message system, open for as long as the context that made it."""

    @property
    def max_payload(self) -> int:
        """The largest message the server takes, in bytes, headers counted."""

    def new_inbox(self) -> str:
        """A fresh reply subject, below `_INBOX.`."""

    async def subscribe(
        self, subject: str, sink: Callable[[Message], None], *, group: str | None = None
    ) -> Subscription:
        """Hand every message on `subject` to `sink`, in order of arrival.

        `sink` runs inside the receiving callback: it must not wait and must not raise.
        Wildcards are allowed; members of one `group` share the messages between them.
        Returns when the server knows of the interest.
        """

    def open_outlet(
        self, subject: str, *, reply: str | None = None, headers: Mapping[str, str]
    ) -> Outlet:
        """For messages that have all this in common: it is checked and encoded once.

        Raises `ValueError` for what is no subject or no header name.
        """

    def publish(self, message: Message) -> None:
        """As `Outlet.publish`, for messages that belong to no request.

        The share of these is bounded too: past its bound they are dropped and counted.
        """

    async def flush(self) -> None:
        """Return when the server has taken everything published so far. Bound it outside."""

    async def wait_lost(self) -> str:
        """Return, with the reason, only if the connection has ended for good."""

    def statistics(self) -> BrokerStatistics: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerStatistics:
    """A reading of the connection."""

    url: str
    """Without credentials."""
    connected: bool
    reconnects: int
    received: int
    """Messages handed to a sink."""
    published: int
    dropped: int
    """Messages that were never sent: the outbox was full, or the connection ended."""
    unpublished_bytes: int
    """Waiting in the outbox."""
    slow_consumers: int
    """How often the client library threw away a message because ours were not taken."""


# --- the engine ---------------------------------------------------------------------------


class EngineState(StrEnum):
    LOADING = "loading"
    """For the first time."""
    READY = "ready"
    RESTARTING = "restarting"
    """It was lost, and the next one is not ready yet."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatistics:
    """A reading of the engine; `info` is None until the model has been loaded once."""

    state: EngineState
    pid: int | None
    restarts: int
    info: EngineInfo | None
    restarts_by_reason: Mapping[str, int] = field(default_factory=dict)


class Turn(Protocol):
    """One turn that has begun."""

    async def report(self) -> Report:
        """What the turn has done, once it has; a checkpoint also where that is so already.

        Asked for in the order in which the turns began. Raises `EngineLost` if the engine is lost
        before: then everything it held is gone, and all turns that had begun are lost with it.
        Cancelled: the turn goes on, and its report may be asked for again.
        """


class Engine(Protocol):
    """Computes tokens for a batch; `tokenise` may overlap its turns.

    Up to `TURNS_UNDER_WAY_MAX` turns may have begun before the report of the first is taken: then
    the engine goes from one to the next without waiting to be told. What holds of them:

    1. They are done one after the other, in the order in which they began, and each has a report,
       which says what the engine holds after just this turn.
    2. What a turn removes is gone, and its room free, before what it admits comes in; so the
       engine never holds more than the one who plans knows of.
    3. A sequence that ends by itself leaves in that turn. Later ones, begun without knowing of
       it, compute nothing for it, and to remove it there changes nothing.
    4. Each may take as long as any turn, from when it began or the one before was reported,
       whichever is later.
    5. What the engine has computed and not reported is lost with it; who comes back with the
       tokens that were reported says what it would have said.
    """

    @property
    def ready(self) -> AsyncBool:
        """Whether a turn can be taken now; to be watched, not to be set."""

    @property
    def info(self) -> EngineInfo | None:
        """Of the model that was loaded last; None before the first is."""

    async def wait_ready(self) -> EngineInfo:
        """Return once the engine can take a turn. Leaves nothing behind when cancelled."""

    async def tokenise(self, request: Request) -> Prompt:
        """The prompt's tokens, through the chat template if there are messages, and its form.

        Waits while the engine is down. Raises `InvalidRequest`, with `details.field`, if the
        template refuses the messages, what they hold is no text, or no answer of this model can
        have the form that is wanted, and `EngineFailed` if the
        template does not come to an end with them, or if tokenising this request brings the engine
        down.
        Cancelled: the result is thrown away.
        """

    def begin(self, work: Work) -> Turn:
        """Have the next turn done, behind those that have begun.

        Synchronous and quick: when this returns the engine has been told, and what is done until
        the report is asked for is done while it computes. Never raises because the engine is
        unavailable: the turn is lost then, as its report says.
        """

    def recycle(self) -> None:
        """Replace the engine by a fresh one, as planned: outside the budget of restarts.

        Synchronous. A turn that is under way, and those that are begun before the new engine is
        ready, are lost for the reason `planned`.
        """

    def pardon(self, crashes: int) -> None:
        """Give this many of the latest crashes back to the budget: one request was guilty."""

    def statistics(self) -> EngineStatistics: ...


# --- the machine --------------------------------------------------------------------------


class MemoryProbe(Protocol):
    def read(self, engine_pid: int | None) -> MemoryReading:
        """Read now; costs some milliseconds at most. A vanished process counts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine, as others on the network may know it."""

    hostname: str
    address: str
    """An IP address of it, v4 or v6."""
    cpu_percent: Callable[[], float]
    """How busy its processors have been since the last call."""


# --- who looks on -------------------------------------------------------------------------


class ProgressSink(Protocol):
    """Told how far something long has come."""

    def __call__(self, step: str, done: int, total: int, unit: str, /) -> None:
        """`done` of `total` units of this step; a total of 0 where nobody knows it."""


# --- the operating system -----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """All that is so at a moment."""

    ready: bool = False
    stopping: bool = False
    alive: bool = False
    """For the watchdog."""
    status: str | None = None
    """One line for people; None leaves the last one."""
    extend_timeout_s: float | None = None
    """The start or the stop that is under way may last this much longer from now."""


class ServiceManager(Protocol):
    """Who started this process and would start it again, such as systemd; or nobody."""

    @property
    def watchdog_s(self) -> float | None:
        """It kills a process that it hears nothing of for this long; None: it does not watch."""

    def notify(self, notice: Notice) -> None:
        """Tell it what is so now. Synchronous; never waits and never raises.

        A notice may be lost, so every notice says all that is so.
        """


class StackSampler(Protocol):
    """Looks where the event loop's thread is, at a moment when the loop cannot look itself."""

    def arm(self, after_s: float) -> None:
        """Take one sample `after_s` from now, unless `arm` or `disarm` is called before."""

    def disarm(self) -> str | None:
        """Take none any more; returns the stack of the one that was taken since `arm`.

        One line per frame, innermost first: file, line and function, never a value.
        """
