"""What waits to be published: a queue with one account per caller.

Rules:

1. Parcels leave in the order they came, whoever published them.
2. A parcel of a share leaves the queue by `take` or by `discard`, never otherwise: a share is
   bounded by its owner, who reads `unpublished_bytes`.
3. Parcels that belong to no share hold at most `loose_limit_bytes` together; what comes on top
   is dropped and counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from trio_worker.nats.parcel import Envelope, Parcel, Sendable, seal


class Account:
    """What is in an outbox for one of those who publish. Kept by the outbox."""

    __slots__ = ("numbers", "unpublished_bytes")

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.unpublished_bytes = 0


class Share(Account):
    """The account of one answer; it is the `Outlet` of either broker."""

    __slots__ = ("_envelope", "_outbox")

    def __init__(self, outbox: Outbox, envelope: Envelope) -> None:
        super().__init__()
        self._outbox = outbox
        self._envelope = envelope

    def publish(self, body: bytes, headers: Mapping[str, str]) -> None:
        """As `Outlet.publish`. Raises as `Envelope.seal` does."""
        outbox = self._outbox
        outbox.put(self._envelope.seal(body, headers, max_payload=outbox.max_payload()), self)

    def discard(self) -> None:
        """Forget what was published here and has not been taken."""
        self._outbox.discard(self)


class Outbox:
    """The queue. Its state: the parcels by number of arrival, and what they add up to.

    Args:
        loose_limit_bytes: for all parcels together that belong to no share.
        max_payload: says what the server takes at present, in bytes.
        on_put: is called when there is one parcel more.
    """

    def __init__(
        self,
        *,
        loose_limit_bytes: int,
        max_payload: Callable[[], int],
        on_put: Callable[[], None],
    ) -> None:
        self._loose_limit_bytes = loose_limit_bytes
        self.max_payload = max_payload
        self._on_put = on_put
        self._entries: OrderedDict[int, tuple[Parcel, Account]] = OrderedDict()
        self._next_number = 0
        self._loose = Account()
        """The account of what belongs to nobody."""
        self.unpublished_bytes = 0
        self.dropped = 0
        """Loose parcels that found no room."""

    def __len__(self) -> int:
        return len(self._entries)

    def open_share(self, envelope: Envelope) -> Share:
        return Share(self, envelope)

    def publish(self, message: Sendable) -> bool:
        """Put what belongs to no share; False if it was dropped. Raises as `seal` does."""
        parcel = seal(message, max_payload=self.max_payload())
        if self._loose.unpublished_bytes + parcel.size > self._loose_limit_bytes:
            self.dropped += 1
            return False
        self.put(parcel, self._loose)
        return True

    def put(self, parcel: Parcel, account: Account) -> None:
        """Put a parcel on this account, behind all others."""
        number = self._next_number
        self._next_number += 1
        self._entries[number] = (parcel, account)
        account.numbers.add(number)
        account.unpublished_bytes += parcel.size
        self.unpublished_bytes += parcel.size
        self._on_put()

    def discard(self, share: Share) -> None:
        """Forget every parcel of `share` that has not been taken."""
        for number in share.numbers:
            del self._entries[number]
        self.unpublished_bytes -= share.unpublished_bytes
        share.numbers.clear()
        share.unpublished_bytes = 0

    def take(self) -> Parcel | None:
        """The oldest parcel, which leaves the queue; None if there is none."""
        if not self._entries:
            return None
        number, (parcel, account) = self._entries.popitem(last=False)
        account.numbers.remove(number)
        account.unpublished_bytes -= parcel.size
        self.unpublished_bytes -= parcel.size
        return parcel

    def mark(self) -> int:
        """A point in the queue behind everything that is in it now."""
        return self._next_number

    def is_past(self, mark: int) -> bool:
        """Whether everything before `mark` has left the queue."""
        return not self._entries or next(iter(self._entries)) >= mark
