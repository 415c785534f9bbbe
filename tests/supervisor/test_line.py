"""A line on which questions are answered, over a real socket pair with the test at its end."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_worker.protocol.frames import Tokenise, Tokenised, decode_to_engine, encode
from trio_worker.protocol.framing import FrameBuffer, HungUp
from trio_worker.protocol.prompt import Prompt
from trio_worker.supervisor.frame_stream import FrameStream
from trio_worker.supervisor.line import UNDER_WAY_MAX, Line, NeverAsked, NoAnswer


def tokenised(token: int) -> Tokenised:
    return Tokenised(prompt=Prompt(tokens=(token,)))


@dataclass
class Scene:
    line: Line
    stream: FrameStream
    theirs: trio.socket.SocketType
    outcomes: dict[str, object]
    nursery: trio.Nursery
    answer_within_s: float = 20.0
    buffer: FrameBuffer = field(default_factory=FrameBuffer)
    ended: trio.Event = field(default_factory=trio.Event)
    raised: type[BaseException] | None = None

    def ask(self, name: str, *, text: str = "") -> None:
        self.nursery.start_soon(self._ask, name, text)

    async def _ask(self, name: str, text: str) -> None:
        try:
            question = encode(Tokenise(prompt=text or name, messages=None))
            self.outcomes[name] = await self.line.ask(question)
        except (NeverAsked, NoAnswer) as exc:
            self.outcomes[name] = type(exc)

    async def come(self, count: int) -> list[str]:
        """What the engine reads next."""
        asked: list[str] = []
        while len(asked) < count:
            while (body := self.buffer.take()) is None:
                self.buffer.feed(await self.theirs.recv(2**16))
            frame = decode_to_engine(body)
            assert isinstance(frame, Tokenise)
            asked.append(str(frame.prompt))
        return asked

    async def ask_in_turn(self, *names: str) -> None:
        for name in names:
            self.ask(name)
            await wait_all_tasks_blocked()

    async def answer(self, *tokens: int) -> None:
        await self.send(b"".join(encode(tokenised(each)) for each in tokens))

    async def send(self, frames: bytes) -> None:
        await trio.SocketStream(self.theirs).send_all(frames)


@pytest.fixture
async def scene(nursery: trio.Nursery) -> AsyncIterator[Scene]:
    ours, theirs = socket.socketpair()
    with FrameStream(ours) as stream, trio.socket.from_stdlib_socket(theirs) as other:
        yield Scene(Line(), stream, other, {}, nursery)


async def serve(scene: Scene) -> None:
    try:
        await scene.line.serve(scene.stream, answer_within_s=scene.answer_within_s)
    except (trio.TooSlowError, HungUp) as exc:
        scene.raised = type(exc)
    scene.ended.set()


async def test_what_comes_while_an_answer_is_awaited_goes_out_together_and_in_order(
    scene: Scene,
) -> None:
    scene.nursery.start_soon(serve, scene)
    await scene.ask_in_turn("a", "b", "c")
    assert await scene.come(1) == ["a"]
    await scene.answer(1)
    assert await scene.come(2) == ["b", "c"]
    await scene.answer(2, 3)
    await wait_all_tasks_blocked()
    assert scene.outcomes == {name: tokenised(number) for number, name in enumerate("abc", 1)}


async def test_no_more_are_under_way_than_may_be_and_the_others_wait(scene: Scene) -> None:
    scene.nursery.start_soon(serve, scene)
    names = [f"{number:03}" for number in range(3 * UNDER_WAY_MAX)]
    await scene.ask_in_turn(*names)
    assert await scene.come(1) == names[:1]
    await scene.answer(0)
    assert await scene.come(UNDER_WAY_MAX) == names[1 : 1 + UNDER_WAY_MAX]
    with trio.move_on_after(0) as nothing_more:
        await scene.theirs.recv(1)
    assert nothing_more.cancelled_caught
    await scene.answer(*range(1, len(names)))
    with trio.fail_after(20):
        await scene.come(len(names) - 1 - UNDER_WAY_MAX)
    await wait_all_tasks_blocked()
    assert scene.outcomes == {name: tokenised(number) for number, name in enumerate(names)}


async def test_of_those_under_way_only_the_next_one_may_be_what_the_engine_ended_over(
    scene: Scene,
) -> None:
    scene.nursery.start_soon(serve, scene)
    names = [f"{number:03}" for number in range(UNDER_WAY_MAX + 2)]
    await scene.ask_in_turn(*names)
    await scene.answer(1)
    assert await scene.come(1 + UNDER_WAY_MAX) == names[:-1]
    scene.theirs.close()
    await scene.ended.wait()
    await wait_all_tasks_blocked()
    assert scene.raised is HungUp
    outcomes = [scene.outcomes[name] for name in names]
    assert outcomes[:2] == [tokenised(1), NoAnswer]
    assert outcomes[2:] == [NeverAsked] * UNDER_WAY_MAX
    scene.ask("later")
    await wait_all_tasks_blocked()
    assert scene.outcomes["later"] is NeverAsked


async def test_who_gives_up_leaves_the_answers_of_the_others_where_they_belong(
    scene: Scene,
) -> None:
    scene.nursery.start_soon(serve, scene)
    await scene.ask_in_turn("first")
    with trio.CancelScope() as given_up:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene._ask, "given up", "")
            await wait_all_tasks_blocked()
            given_up.cancel()
    scene.ask("last")
    await scene.answer(1, 2, 3)
    await wait_all_tasks_blocked()
    assert scene.outcomes == {
        "first": tokenised(1),
        "last": tokenised(3),
    }


async def test_an_answer_that_does_not_come_ends_the_line(scene: Scene) -> None:
    scene.answer_within_s = 0.1
    scene.nursery.start_soon(serve, scene)
    scene.ask("slow")
    await scene.ended.wait()
    await wait_all_tasks_blocked()
    assert scene.raised is trio.TooSlowError
    assert scene.outcomes == {"slow": NoAnswer}


async def test_a_long_question_and_a_long_answer_do_not_wait_for_each_other(scene: Scene) -> None:
    """The engine reads the next question when its answer to the last one has been read."""
    scene.nursery.start_soon(serve, scene)
    await scene.ask_in_turn("one", "two")
    scene.ask("long", text="x" * 4_000_000)
    assert await scene.come(1) == ["one"]
    await scene.answer(1)
    assert await scene.come(1) == ["two"]
    with trio.fail_after(20):
        await scene.send(encode(Tokenised(prompt=Prompt(tokens=tuple(range(500_000))))))
        assert await scene.come(1) == ["x" * 4_000_000]
        await scene.answer(3)
    await wait_all_tasks_blocked()
    assert sorted(scene.outcomes) == ["long", "one", "two"]
