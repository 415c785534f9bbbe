"""Which messages end which request, and who is told."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from support.factories import make_admission, make_sequence
from support.worker_rig import running_worker, subject_of
from trio.testing import MockClock

from trio_worker.core.sequence import Ending, Event
from trio_worker.flow.door import Door
from trio_worker.monitoring.heartbeat import Heartbeat
from trio_worker.ports import Message
from trio_worker.protocol.turn import RequestId
from trio_worker.stages.control import Control, run_control

MINE = "_INBOX.mine"
"""Where the answer of the request that is meant goes."""
GONE = {"Status": "503", "Nats-Subject": MINE}


@dataclass
class Listening:
    """A broker, as far as control knows it: sinks by their subject, and what was said."""

    said: list[Message] = field(default_factory=list)
    sinks: dict[str, object] = field(default_factory=dict)

    def publish(self, message: Message) -> None:
        self.said.append(message)

    async def subscribe(self, subject: str, sink: object) -> None:
        self.sinks[subject] = sink


class Scene:
    """Two requests in flight, `meant` and `other`, and control over them."""

    def __init__(self) -> None:
        self.broker = Listening()
        self.door = Door(make_admission())
        self.meant, self.other = make_sequence("meant"), make_sequence("other")
        self.meant.reply_subject, self.other.reply_subject = MINE, "_INBOX.other"
        for sequence in (self.meant, self.other):
            self.door.admit(sequence)
        self.on_its_way: list[RequestId] = []
        self.control = Control(self.broker, self.door, ["_INBOX."], self._cancel_on_its_way)  # type: ignore[arg-type]

    def _cancel_on_its_way(self, request_id: RequestId) -> bool:
        """Nothing has been passed on."""
        self.on_its_way.append(request_id)
        return False

    @property
    def endings(self) -> dict[str, Ending]:
        """Of those whose scope was cancelled, once."""
        found: dict[str, Ending] = {}
        for sequence in (self.meant, self.other):
            if sequence.ending is not None:
                assert sequence.scope.reasons == [sequence.ending]  # type: ignore[attr-defined]
                found[sequence.request_id] = sequence.ending
        return found


@pytest.mark.parametrize(
    ("message", "ending"),
    [
        (Message(subject=subject_of("meant"), body=b"cancel"), Ending.CANCELLED),
        (Message(subject=subject_of("meant"), body=b"cancel", reply="orders"), Ending.CANCELLED),
        (Message(subject=subject_of("meant"), body=b"Cancel"), None),
        (Message(subject=subject_of("meant"), body=b"cancel it"), None),
        (Message(subject=subject_of("meant")), None),
        (Message(subject=subject_of("mean"), body=b"cancel"), None),
        (Message(subject=subject_of("meant.x"), body=b"cancel"), None),
        (Message(subject="inference.cancel", body=b'{"request_id": "meant"}'), Ending.CANCELLED),
        (Message(subject="inference.cancel", body=b'{"request_id": "*"}'), None),
        (Message(subject="inference.cancel", body=b"cancel"), None),
        (Message(subject="inference.cancel", body=b"\xff"), None),
        (Message(subject=subject_of("meant"), headers=GONE), Ending.CALLER_GONE),
        (Message(subject=subject_of("meant"), body=b"cancel", headers=GONE), Ending.CALLER_GONE),
        (Message(subject=subject_of("meant"), headers=GONE | {"Status": "408"}), None),
        (Message(subject=subject_of("meant"), headers={"Status": "503"}), None),
        (Message(subject=subject_of("other"), headers=GONE), None),
        (Message(subject=subject_of("absent"), headers=GONE), None),
        (
            Message(subject=subject_of("meant"), headers=GONE | {"Nats-Subject": "_INBOX.x"}),
            None,
        ),
    ],
    ids=str,
)
def test_a_message_ends_the_request_it_names_or_nothing(
    message: Message, ending: Ending | None
) -> None:
    scene = Scene()
    scene.control.act(message)
    assert scene.endings == ({} if ending is None else {"meant": ending})
    assert scene.broker.said == []


@pytest.mark.parametrize(
    ("name", "cancelled"), [("meant", True), ("absent", False), ("ended", False)]
)
def test_who_asks_on_the_control_subject_is_told_whether_there_was_such_a_request(
    name: str,
    cancelled: bool,  # noqa: FBT001
) -> None:
    scene = Scene()
    ended = make_sequence("ended")
    scene.door.admit(ended)
    ended.advance(Event.END)
    scene.control.act(Message(subject=subject_of(name), body=b"cancel", reply="_INBOX.me"))
    (reply,) = scene.broker.said
    assert reply.subject == "_INBOX.me"
    assert json.loads(reply.body) == {"request_id": name, "cancelled": cancelled}


def test_a_broadcast_is_not_answered_by_every_worker() -> None:
    scene = Scene()
    body = b'{"request_id": "meant"}'
    scene.control.act(Message(subject="inference.cancel", body=body, reply="_INBOX.me"))
    assert scene.endings == {"meant": Ending.CANCELLED}
    assert scene.broker.said == []


def test_the_broadcast_subject_is_not_that_of_a_request_called_cancel() -> None:
    scene = Scene()
    called = make_sequence("cancel")
    scene.door.admit(called)
    scene.control.act(Message(subject="inference.cancel", body=b"cancel", reply="_INBOX.me"))
    assert called.ending is None
    assert scene.broker.said == []


def test_the_first_reason_to_end_is_the_one_that_counts() -> None:
    scene = Scene()
    scene.control.act(Message(subject=subject_of("meant"), body=b"cancel"))
    scene.control.act(Message(subject=subject_of("meant"), headers=GONE))
    assert scene.endings == {"meant": Ending.CANCELLED}


@pytest.mark.parametrize(
    "buffer", ["has room", "is full", "is closed", "has ended", "is let go of at the drain"]
)
@pytest.mark.parametrize("subject", ["inference.w1.ctl.*", "inference.cancel"])
async def test_it_listens_until_cancelled_and_acts_itself_only_where_intake_cannot(
    autojump_clock: MockClock, buffer: str, subject: str
) -> None:
    scene = Scene()
    broker: Any = scene.broker
    send, receive = trio.open_memory_channel[Message](1)
    message = Message(subject="inference.cancel", body=b'{"request_id": "meant"}')
    with send, receive:
        if buffer == "is full":
            send.send_nowait(Message(subject="inference.w1"))
        elif buffer == "is closed":
            send.close()
        elif buffer == "has ended":
            receive.close()
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(
                    run_control,
                    broker=broker,
                    door=scene.door,
                    worker_id="w1",
                    intake=send,
                    heartbeat=Heartbeat("intake", bound_s=10.0),
                ),
                scene.control,
            )
            assert set(scene.broker.sinks) == {"inference.w1.ctl.*", "inference.cancel"}
            if buffer == "is let go of at the drain":
                scene.door.close()
                await trio.testing.wait_all_tasks_blocked()
            scene.broker.sinks[subject](message)  # type: ignore[operator]
            if buffer == "has room":
                assert scene.endings == {}, "it must not overtake its request"
                assert receive.receive_nowait() == message
            else:
                assert scene.endings == {"meant": Ending.CANCELLED}
            await trio.sleep(3600)
            assert len(nursery.child_tasks) == 1
            nursery.cancel_scope.cancel()


async def test_a_cancel_behind_a_full_intake_still_frees_the_slot(
    autojump_clock: MockClock,
) -> None:
    """In the whole worker: requests pile up faster than intake reads them."""
    async with running_worker("worker.request_queue.max_depth=4") as rig:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: rig.ask(prompt="x", request_id="meant", max_tokens=4000))
            await trio.sleep(0.5)
            for _ in range(300):
                rig.caller.publish(Message(subject="inference.w1", body=b"{", reply="_INBOX.x"))
            rig.caller.publish(Message(subject=subject_of("meant"), body=b"cancel"))
            await trio.sleep(0.1)
            assert rig.snapshot().requests.in_flight == 0
            assert rig.snapshot().requests.by_outcome["CANCELLED"] == 1
