"""What waits to be published: against a list, in every order of calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from trio_worker.errors import MessageTooLarge
from trio_worker.nats.outbox import Outbox, Share
from trio_worker.nats.parcel import address
from trio_worker.ports import Message

LOOSE_LIMIT = 100
LARGEST = 500


def new_outbox(loose_limit_bytes: int, on_put: Callable[[], None] = lambda: None) -> Outbox:
    return Outbox(loose_limit_bytes=loose_limit_bytes, max_payload=lambda: LARGEST, on_put=on_put)


def open_share(outbox: Outbox, subject: str = "s") -> Share:
    return outbox.open_share(address(subject, None, {}))


def size_of(message: Message) -> int:
    return len(message.subject) + len(message.body)


def message(size: int, subject: str = "s") -> Message:
    """One that counts for `size` bytes."""
    return Message(subject=subject, body=bytes(size - len(subject)))


class OutboxMachine(RuleBasedStateMachine):
    """The model: a list of (message, whose it is, or None), and a mark with what was before it."""

    def __init__(self) -> None:
        super().__init__()
        self.puts = 0
        self.outbox = new_outbox(LOOSE_LIMIT, self.count)
        self.shares = [open_share(self.outbox, f"s{number}") for number in range(3)]
        self.model: list[tuple[Message, Share | None]] = []
        self.expected_puts = 0
        self.dropped = 0
        self.mark = self.outbox.mark()
        self.before_mark: list[tuple[Message, Share | None]] = []
        self.names = 0

    def count(self) -> None:
        self.puts += 1
        assert self.outbox.mark() == self.puts, "it is told when the parcel is there"

    def new_message(self, size: int, subject: str = "loose") -> Message:
        """No other has its body, of which it has at least four bytes."""
        self.names += 1
        new = message(size, subject)
        return replace(new, body=b"%0*d" % (len(new.body), self.names))

    def held_by(self, share: Share | None) -> int:
        return sum(size_of(each) for each, owner in self.model if owner is share)

    def is_held(self, new: Message, share: Share | None) -> None:
        self.model.append((new, share))
        self.expected_puts += 1

    @rule(size=st.integers(9, 60))
    def put_a_loose_one(self, size: int) -> None:
        new = self.new_message(size)
        fits = self.held_by(None) + size <= LOOSE_LIMIT
        assert self.outbox.publish(new) is fits
        if fits:
            self.is_held(new, None)
        else:
            self.dropped += 1

    @rule(index=st.integers(0, 2), size=st.integers(6, 60))
    def put_one_of_a_share(self, index: int, size: int) -> None:
        new = self.new_message(size, f"s{index}")
        self.shares[index].publish(new.body, {})
        self.is_held(new, self.shares[index])

    @rule(index=st.integers(0, 2))
    def put_one_that_is_too_large(self, index: int) -> None:
        new = self.new_message(LARGEST + 1 + len("loose"))
        with pytest.raises(MessageTooLarge):
            self.outbox.publish(new)
        with pytest.raises(MessageTooLarge):
            self.shares[index].publish(new.body, {})

    @rule()
    def take(self) -> None:
        taken = self.outbox.take()
        if not self.model:
            assert taken is None
            return
        expected, _ = self.model.pop(0)
        assert taken is not None
        assert taken.envelope.subject == expected.subject
        assert (taken.body, taken.size) == (expected.body, size_of(expected))

    @rule(index=st.integers(0, 2))
    def discard(self, index: int) -> None:
        share = self.shares[index]
        share.discard()
        self.model = [each for each in self.model if each[1] is not share]

    @rule()
    def set_the_mark(self) -> None:
        self.mark = self.outbox.mark()
        self.before_mark = list(self.model)

    @invariant()
    def the_sums_are_those_of_the_list(self) -> None:
        assert len(self.outbox) == len(self.model)
        assert self.outbox.unpublished_bytes == sum(size_of(each) for each, _ in self.model)
        assert self.outbox.dropped == self.dropped
        assert self.puts == self.expected_puts
        for share in self.shares:
            assert share.unpublished_bytes == self.held_by(share)
        waiting = [each for each in self.before_mark if each in self.model]
        assert self.outbox.is_past(self.mark) is (not waiting)


TestOutbox = OutboxMachine.TestCase


def test_loose_parcels_may_fill_their_room_to_the_byte() -> None:
    outbox = new_outbox(10)
    assert outbox.publish(message(4))
    assert outbox.publish(message(6))
    assert not outbox.publish(message(1))
    assert outbox.take() is not None
    assert outbox.publish(message(4))
    assert (outbox.dropped, outbox.unpublished_bytes) == (1, 10)


def test_a_share_has_no_bound_of_its_own() -> None:
    """Its owner reads what it holds, and decides."""
    outbox = new_outbox(0)
    share = open_share(outbox)
    share.publish(b"12345", {})
    assert share.unpublished_bytes == outbox.unpublished_bytes == 6
    share.discard()
    assert share.unpublished_bytes == outbox.unpublished_bytes == 0
    assert outbox.take() is None
