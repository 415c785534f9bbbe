"""The engine without a model: its turns are an engine's, and its steps take their time."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.engine_conformance import CHECKS
from support.engine_rig import opened

from trio_worker.bench import clocked_engine
from trio_worker.bench.clocked_engine import TEXT, TOKEN, ClockedBatch, Device
from trio_worker.protocol.turn import Admit, FinishReason, Report, RequestId, Sampling, Work


class Clock:
    """Stands still but for what is done; whoever sleeps wakes late."""

    def __init__(self, *, late_s: float = 0.0) -> None:
        self.now = 100.0
        self._late_s = late_s

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self._late_s

    def compute(self, seconds: float) -> None:
        self.now += seconds


def batch(clock: Clock, *, device_ms: float = 2.0, host_ms: float = 0.5) -> ClockedBatch:
    device = Device(device_ms / 1000, clock=clock.read, sleep=clock.sleep)
    return ClockedBatch(device, host_ms / 1000, compute=clock.compute)


def admit(name: str, *, prompt: int = 3, produced: int = 0, max_tokens: int = 1000) -> Admit:
    return Admit(
        request_id=RequestId(name),
        prompt=(1,) * prompt,
        produced=(TOKEN,) * produced,
        max_tokens=max_tokens,
        sampling=Sampling(),
        stop=(),
    )


def given(report: Report) -> list[str]:
    return [output.request_id for output in report.outputs]


@pytest.mark.parametrize(
    ("host_ms", "worker_ms", "step_ms"),
    [(0.5, 0.0, 2.0), (0.5, 1.5, 2.0), (1.7, 0.25, 2.0), (1.7, 0.5, 2.2), (3.0, 0.0, 3.0)],
)
@pytest.mark.parametrize("late_s", [0.0, 0.00005])
def test_the_device_waits_for_host_and_worker_only_where_these_are_slower(
    host_ms: float, worker_ms: float, step_ms: float, late_s: float
) -> None:
    """And a host that wakes late every time starts no step the later, while it has time left."""
    clock = Clock(late_s=late_s)
    clocked = batch(clock, host_ms=host_ms)
    clocked.turn(Work(admit=(admit("a"), admit("b"))))
    began_at = clock.now
    for _ in range(100):
        assert given(clocked.turn(Work())) == ["a", "b"]
        clock.compute(worker_ms / 1000)
    assert (clock.now - began_at) * 10 == pytest.approx(step_ms, abs=0.05)


def test_an_idle_device_does_not_make_up_for_it() -> None:
    """A step was under way when the worker fell silent; the next one begins when it is started."""
    clock = Clock()
    clocked = batch(clock, host_ms=0.0)
    clocked.turn(Work(admit=(admit("a"),)))
    clock.compute(1.0)
    began_at = clock.now
    for _ in range(3):
        clocked.turn(Work())
    assert clock.now - began_at == pytest.approx(0.004)


def test_a_first_token_takes_a_step_of_its_own_beside_the_one_under_way() -> None:
    """A device idle before: nobody waits for a step that nobody takes part in."""
    clock = Clock()
    clocked = batch(clock, host_ms=0.0)
    began_at = clock.now
    first = clocked.turn(Work(admit=(admit("a"),)))
    assert given(first) == ["a"]
    assert clock.now - began_at == pytest.approx(0.002)
    second = clocked.turn(Work(admit=(admit("b"),)))
    assert given(second) == ["a", "a", "b"]
    assert second.batch_sizes == (2, 1)
    assert clock.now - began_at == pytest.approx(0.006)


def test_no_row_no_step() -> None:
    clock = Clock()
    report = batch(clock).turn(Work())
    assert (report.outputs, report.residents, clock.now) == ((), frozenset(), 100.0)


def test_an_answer_ends_with_its_last_token_and_has_left() -> None:
    clocked = batch(Clock())
    report = clocked.turn(Work(admit=(admit("a", produced=1, max_tokens=3),)))
    assert [output.finish for output in report.outputs] == [None]
    assert report.residents == {"a"}
    report = clocked.turn(Work())
    (last,) = report.outputs
    assert (last.token, last.text, last.finish) == (TOKEN, TEXT, FinishReason.LENGTH)
    assert report.residents == frozenset()
    assert clocked.turn(Work()).outputs == ()


def test_who_is_removed_gets_nothing_more_prefilling_or_decoding() -> None:
    clocked = batch(Clock())
    report = clocked.turn(Work(admit=(admit("a"), admit("b", prompt=10)), prefill_tokens=4))
    assert given(report) == ["a"]
    assert report.residents == {"a", "b"}
    assert (report.prefill_tokens, report.prefills[-1].done) == (4, 1)
    report = clocked.turn(Work(remove=(RequestId("a"), RequestId("b"), RequestId("c"))))
    assert (report.outputs, report.residents) == ((), frozenset())


@pytest.mark.process
def test_it_imports_nothing_slow() -> None:
    """No loop, no model library: it is there as soon as Python is."""
    said = subprocess.run(
        [
            *(sys.executable, "-P", "-c"),
            (
                f"import sys, {clocked_engine.__name__}\n"
                "print({'mlx', 'mlx_lm', 'trio', 'asyncio', 'numpy'} & sys.modules.keys())"
            ),
        ],
        capture_output=True,
        check=True,
        text=True,
    )
    assert said.stdout == "set()\n"


@pytest.mark.process
async def test_it_keeps_the_contract_of_the_engine_port() -> None:
    program = (
        *(sys.executable, "-P", "-m", clocked_engine.__name__),
        *("--device-ms", "0.2", "--host-ms", "0.1"),
    )
    async with opened("no model", program=program) as engine:
        assert (await engine.wait_ready()).device == "a clock"
        for check in CHECKS:
            await check(engine)
        assert engine.statistics().restarts == 0
