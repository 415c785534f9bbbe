"""The parts about the gateway: that each measures what it says, on real processes."""

from __future__ import annotations

import re

import pytest
import trio
from support.worker_rig import make_config

from trio_worker.bench import gateway, tiny
from trio_worker.bench.gateway import open_gateway
from trio_worker.bench.load import Load
from trio_worker.bench.parts import PARTS
from trio_worker.bench.setup import Setup, run_parts
from trio_worker.launch import EngineKind


def setup(engine: EngineKind) -> Setup:
    config = make_config("worker.simulated.turn_ms=1", "worker.simulated.prefill_ms_per_token=0")
    return Setup(config=config, engine=engine, max_tokens=2, rounds=1)


async def lines(
    part: str, capsys: pytest.CaptureFixture[str], *, engine: EngineKind = "mlx"
) -> list[str]:
    with trio.fail_after(120):
        await run_parts(setup(engine), [PARTS[part]])
    return capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "WARMUP_S", 0.02)
    monkeypatch.setattr(gateway, "MEASURED_S", 0.2)
    monkeypatch.setattr(gateway, "PACE_MS", 20.0)
    monkeypatch.setattr(gateway, "ALL_STREAMS", 4)
    monkeypatch.setattr(gateway, "STREAM_TOKENS", 20)
    monkeypatch.setattr(gateway, "IN_FLIGHT", (1, 2))
    monkeypatch.setattr(gateway, "FIRST_BYTES", 4)
    monkeypatch.setattr(tiny, "STREAMS", (1,))
    monkeypatch.setattr(gateway, "STREAMS", (1,))
    monkeypatch.setattr(tiny, "ANSWER_TOKENS", 20)


@pytest.mark.nats
async def test_a_gateway_tells_what_its_process_has_taken() -> None:
    """Which is nothing for a request that goes past it."""
    with trio.fail_after(60):
        async with (
            setup("simulated").worker() as worker,
            open_gateway(worker.nats_url) as measured,
        ):
            load = Load(
                url="",
                subject="",
                request={"stream": True, "max_tokens": 5},
                prompts=("one", "two", "three"),
                concurrent=2,
            )
            before_s = await measured.cpu_s()
            cost = await measured.cost_of(load)
            after_s = await measured.cpu_s()
    assert (cost.got.answers, cost.got.tokens) == (3, 15)
    assert cost.got.messages >= 3 * 3
    assert 0 < cost.cpu_s <= after_s - before_s


@pytest.mark.nats
async def test_events_are_measured_against_the_worker_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    saturated, cost, paced, paced_cost = await lines("events", capsys)
    assert saturated.startswith("a gateway against its worker, 4 streams at once, events/s: ")
    assert saturated.endswith("; 0.6 required")
    assert paced.startswith("the same at 50 tokens/s each: ")
    for line in (cost, paced_cost):
        assert re.fullmatch(
            r"  the gateway's CPU an event \d+ µs \(100 required\), \d+ % of a core; "
            r"\d+\.\d tokens an event; the callers' own \d+ µs",
            line,
        )


@pytest.mark.nats
async def test_requests_and_first_bytes_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    one, one_cpu, two, _, first, more_first = await lines("calls", capsys)
    assert one.startswith("a gateway against its worker, 1 in flight, requests/s: ")
    assert re.fullmatch(r"  the gateway's CPU a request \d+ µs", one_cpu)
    assert "2 in flight" in two
    assert first.startswith("first byte, 1 in flight, p99: ")
    assert " more (5 required); median " in first
    assert more_first.startswith("first byte, 2 in flight, p99: ")


@pytest.mark.nats
async def test_whatever_model_there_is_is_measured_behind_the_gateway(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (figure,) = await lines("behind", capsys, engine="simulated")
    assert " on simulated, 8 at a time: a gateway against its worker, tokens/s: " in figure
    assert figure.endswith("; 0.97 required")


@pytest.mark.thorough
@pytest.mark.mlx
@pytest.mark.nats
async def test_a_tiny_model_behind_the_gateway_is_measured_against_mlx_lms_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    device, figure = await lines("fronts", capsys)
    assert device.startswith("a tiny model on ")
    assert figure.startswith(
        "a gateway and a worker against mlx_lm.server, 1 at a time, tokens/s: "
    )
    assert figure.endswith("; 1.0 required")
