"""The parts about fast steps: that each measures what it says, on real processes."""

from __future__ import annotations

import pytest
import trio
from support.worker_rig import make_config

from trio_worker.bench import ahead, tiny
from trio_worker.bench.parts import PARTS
from trio_worker.bench.setup import Setup, run_parts


async def lines(part: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    setup = Setup(config=make_config(), engine="mlx", max_tokens=2, rounds=1)
    with trio.fail_after(120):
        await run_parts(setup, [PARTS[part]])
    return capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "WARMUP_S", 0.02)
    monkeypatch.setattr(ahead, "MEASURED_S", 0.1)
    monkeypatch.setattr(ahead, "IN_FLIGHT", (1, 8))
    monkeypatch.setattr(tiny, "STREAMS", (1, 2))
    monkeypatch.setattr(tiny, "ANSWER_TOKENS", 20)


@pytest.mark.nats
async def test_streams_are_measured_against_what_the_device_can_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    required = {0.5: {1: ahead.Required(share=0.98, cpu_us=250), 8: ahead.Required()}}
    monkeypatch.setattr(ahead, "REQUIRED", required)
    monkeypatch.setattr(ahead, "DEVICE_MS", 20.0)
    one, one_more, eight, _ = await lines("device", capsys)
    assert one.startswith("20 ms on the device, 0.5 on the host, 1 streams: ")
    assert " of the possible (0.98 required); CPU a token " in one
    assert one.endswith(" µs (250 required)")
    assert one_more.startswith("  the callers' own ")
    assert "required" not in eight


@pytest.mark.nats
async def test_requests_are_measured_against_a_responder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, cpu, eight, _ = await lines("requests", capsys)
    assert one.startswith("a worker against a bare nats-py responder, 1 in flight, requests/s: ")
    assert one.endswith("; 0.35 required")
    assert cpu.startswith("  CPU a request ")
    assert cpu.endswith(" µs (120 required)")
    assert "8 in flight" in eight


@pytest.mark.thorough
@pytest.mark.mlx
@pytest.mark.nats
async def test_a_tiny_model_is_measured_against_mlx_lms_loop_and_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    device, *figures = await lines("tiny", capsys)
    assert device.startswith("a tiny model on ")
    for figure, (other, streams, required) in zip(
        figures,
        [
            ("mlx-lm's own loop", 1, "0.75"),
            ("mlx_lm.server", 1, "1.0"),
            ("mlx-lm's own loop", 2, "0.75"),
            ("mlx_lm.server", 2, "1.0"),
        ],
        strict=True,
    ):
        assert figure.startswith(f"a worker against {other}, {streams} at a time, tokens/s: ")
        assert figure.endswith(f"; {required} required")
