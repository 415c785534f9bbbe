"""What a client may work out from what it is shown: nothing of anybody else's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import trio
from nats.nuid import BASE, DIGITS, SEQ_LENGTH
from support.nats_fixtures import nats_url_fixture  # noqa: F401 - a fixture
from support.peers import in_asyncio, scripted_peer
from support.worker_rig import Rig, decode, make_config, running_worker

from trio_worker import launch
from trio_worker.nats.broker import open_nats_broker
from trio_worker.ports import Message
from trio_worker.wire import native
from trio_worker.worker import World

WORDS = 624
"""Of 32 bits: as many as the state of a Mersenne Twister has."""


def untempered(word: int) -> int:
    """The word of the state that an output of the generator was made of."""
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    low = word
    for _ in range(4):
        low = word ^ ((low << 7) & 0x9D2C5680)
    word = low
    for _ in range(2):
        low = word ^ (low >> 11)
    return low


def recovered(words: Sequence[int]) -> random.Random:
    """A generator in the state of the one that these were the last outputs of."""
    generator = random.Random()
    state = (*map(untempered, words[-WORDS:]), WORDS)
    generator.setstate((3, state, None))
    return generator


def words_of(request_id: str) -> list[int]:
    """In the order in which they were drawn: the first is the lowest."""
    number = int(request_id, 16)
    return [(number >> shift) & 0xFFFFFFFF for shift in range(0, len(request_id) * 4, 32)]


async def production_source(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """What `launch` gives a worker to draw from."""
    given: list[World] = []

    async def run_worker(_config: object, world: World) -> None:
        await trio.lowlevel.checkpoint()
        given.append(world)

    monkeypatch.setattr(launch, "run_worker", run_worker)
    await launch.launch(make_config(), engine="simulated", stops=_never())
    return given[0].rng


class _never:  # noqa: N801 - an iterator that yields nothing
    def __aiter__(self) -> _never:
        return self

    async def __anext__(self) -> object:
        await trio.sleep_forever()


async def refused_ids(rig: Rig, count: int) -> list[str]:
    """The ids that so many refused requests are given."""
    return [(await rig.raw(b"no request"))[0].headers["Request-Id"] for _ in range(count)]


async def guess(rig: Rig) -> tuple[random.Random, int]:
    """A generator in the state that the worker's has if it is one; the bits of an id."""
    first = (await refused_ids(rig, 1))[0]
    bits = len(first) * 4
    ids = [first, *await refused_ids(rig, WORDS * 32 // bits)]
    return recovered([word for each in ids for word in words_of(each)]), bits


async def attack(rig: Rig) -> dict[str, bool]:
    """Try to know what is drawn for others, and to act on it; says what came off."""
    generator, bits = await guess(rig)
    next_id = f"{generator.getrandbits(bits):0{bits // 4}x}"
    next_seed = generator.randrange(native.SEED_END)
    victim = await rig.raw(b'{"prompt": "a secret", "max_tokens": 2, "temperature": 1}')
    then = f"{generator.getrandbits(bits):0{bits // 4}x}"
    seen: list[Message] = []
    inbox = rig.caller.new_inbox()
    await rig.caller.subscribe(inbox, seen.append)
    rig.caller.publish(
        Message(
            subject="inference.w1",
            body=b'{"prompt": "a secret", "max_tokens": 900, "stream": true}',
            reply=inbox,
        )
    )
    await trio.sleep(1)
    rig.caller.publish(
        Message(subject="inference.cancel", body=b'{"request_id": "%s"}' % then.encode())
    )
    await trio.sleep(60)
    return {
        "id": victim[-1].headers["Request-Id"] == next_id,
        "seed": decode(victim[-1])["worker"]["seed"] == next_seed,
        "cancel": seen[-1].headers["Terminal"] != "done",
    }


async def test_ids_and_seeds_of_a_plain_generator_are_known_beforehand(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The attack works where it can: or the next test would say nothing."""
    async with running_worker(rng=random.Random()) as rig:
        assert await attack(rig) == {"id": True, "seed": True, "cancel": True}


async def test_nobody_knows_the_ids_and_seeds_that_are_drawn_for_others(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await production_source(monkeypatch)
    async with running_worker(rng=source) as rig:
        assert await attack(rig) == {"id": False, "seed": False, "cancel": False}
        assert {len(each) for each in await refused_ids(rig, 20)} == {32}


# --- inboxes ------------------------------------------------------------------------------


def counted_on(inboxes: Sequence[str]) -> str:
    """The inbox after these, if they are as nats-py makes them."""
    length = len(inboxes[0])
    heads = [each[: length - SEQ_LENGTH] for each in inboxes]
    numbers = [int_of(each[length - SEQ_LENGTH :]) for each in inboxes]
    following = numbers[-1] + numbers[-1] - numbers[-2]
    digits = ""
    for _ in range(SEQ_LENGTH):
        following, digit = divmod(following, BASE)
        digits = chr(DIGITS[digit]) + digits
    return heads[-1] + digits


def int_of(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * BASE + DIGITS.index(digit.encode())
    return number


def made_by_nats(new_inbox: Callable[[], str]) -> bool:
    inboxes = [new_inbox() for _ in range(3)]
    return counted_on(inboxes[:2]) == inboxes[2]


@pytest.mark.nats
async def test_inboxes_do_not_follow_from_each_other(nats_url: str) -> None:
    async with open_nats_broker(nats_url, name="someone") as broker:
        assert made_by_nats(broker.connection.client.new_inbox), "the attack works where it can"
        assert not made_by_nats(broker.new_inbox)


@pytest.mark.nats
async def test_inboxes_of_the_asyncio_client_do_not_follow_from_each_other(nats_url: str) -> None:
    inboxes: list[str] = []

    async def work() -> None:
        async with scripted_peer(nats_url, "inboxes") as (_, client):
            for _ in range(3):
                async with client.ask({"prompt": "x"}, worker_id="inboxes") as answer:
                    inboxes.append(answer._inbox)

    await in_asyncio(work)
    assert len(set(inboxes)) == 3
    assert counted_on(inboxes[:2]) != inboxes[2]
