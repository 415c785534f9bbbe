"""Many jobs on three workers that are killed, drained and cut off at random, in virtual time."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from support.jobs_rig import Answered, JobsWorld, open_jobs_world
from support.worker_rig import Rig

JOBS = 120
LEVELS = ("high", "medium", "low")
SETTINGS = (
    "nats.jetstream.ack_wait_ms=5000",
    # What is given back by those that drain counts, and here they drain all the time.
    "nats.jetstream.max_deliver=50",
    "worker.drain_timeout_ms=2000",
)


@dataclass
class Fate:
    """What becomes of one worker after the other, drawn from a seed."""

    world: JobsWorld
    rng: random.Random
    ended: trio.Event = field(default_factory=trio.Event)

    async def live(self, name: str) -> None:
        """One worker after the other, until `ended`."""
        lives = 0
        while not self.ended.is_set():
            lives += 1
            slots = f"worker.continuous_batching.max_batch_size={self.rng.choice((1, 2, 4))}"
            async with self.world.worker(*SETTINGS, slots, worker_id=f"{name}-{lives}") as rig:
                while not self.ended.is_set() and not rig.finished.is_set():
                    with trio.move_on_after(self.rng.uniform(1, 20)):
                        await self.ended.wait()
                    await self.strike(rig)

    async def strike(self, rig: Rig) -> None:
        match self.rng.choice(("kill", "drain", "cut", "cut", "ask")):
            case "kill":
                rig.kill()
                await rig.finished.wait()
            case "drain":
                rig.stop()
                await rig.finished.wait()
            case "cut":
                rig.broker.disconnect()
                await trio.sleep(self.rng.choice((0.01, 0.5, 3, 8)))
                rig.broker.reconnect()
            case _:
                async with trio.open_nursery() as nursery:
                    for _ in range(self.rng.randint(1, 6)):
                        nursery.start_soon(lambda: rig.ask(prompt="x", max_tokens=50))


async def submit_all(world: JobsWorld, rng: random.Random, *, with_faults: bool) -> None:
    for number in range(JOBS):
        await world.submit(
            f"j{number}",
            level=LEVELS[number % 3],
            max_tokens=(1, 5, 20, 60, 200)[number % 5],
            temperature=1.0,
        )
        if with_faults and rng.random() < 0.1:
            await trio.sleep(rng.uniform(0, 3))
        if with_faults and rng.random() < 0.03:
            # As a server that is killed: no pull waits any more, and counts begin anew.
            world.jetstream.forget_deliveries()


async def texts(world: JobsWorld) -> dict[str, str]:
    return {each.subject: Answered(each).text for each in await world.results()}


@pytest.fixture(name="undisturbed", scope="module")
def undisturbed_fixture() -> dict[str, str]:
    async def run() -> dict[str, str]:
        async with open_jobs_world() as world, world.worker():
            await submit_all(world, random.Random(0), with_faults=False)
            await world.until_empty()
            return await texts(world)

    return trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("seed", range(4))
async def test_every_job_is_answered_once_and_as_without_trouble(
    autojump_clock: object, seed: int, undisturbed: dict[str, str]
) -> None:
    rng = random.Random(seed)
    async with open_jobs_world() as world:
        fate = Fate(world, rng)
        async with trio.open_nursery() as nursery:
            for name in ("a", "b", "c"):
                nursery.start_soon(fate.live, name)
            await submit_all(world, rng, with_faults=True)
            await world.until_empty(within_s=3000)
            # Whoever was cut off says late what it still has to say.
            await trio.sleep(30)
            fate.ended.set()
        assert await texts(world) == undisturbed
        said = [each.subject.rpartition(".")[2] for each in world.heard]
        assert sorted(said) == sorted(f"j{number}" for number in range(JOBS))
        assert await world.dead() == []
