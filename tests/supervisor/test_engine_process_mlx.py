"""The engine port over the real child process, with a random model."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import psutil
import pytest
import trio
from loguru import logger
from msgspec.structs import replace
from support.engine_conformance import CHECKS, PROMPTS, admits, request, run_all
from support.engine_form_conformance import FORM_CHECKS
from support.engine_rig import (
    ENDED_S,
    LOADED_S,
    assert_nothing_is_left,
    chat,
    children,
    kill,
    opened,
    stop,
    until,
)
from support.tiny_model import write_tiny_model
from trio.testing import wait_all_tasks_blocked

from trio_worker.errors import ConfigError, EngineLost, InvalidRequest
from trio_worker.protocol.frames import Hello, Progress, decode_from_engine, encode
from trio_worker.protocol.framing import FrameBuffer
from trio_worker.protocol.turn import Admit, EngineInfo, Report, RequestId, Sampling, Work

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Any:
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


# --- one engine for all that does not hurt it -----------------------------------------------


async def test_the_engine_process_keeps_the_contract_of_the_port(tiny: Any) -> None:
    fds = psutil.Process().num_fds()
    steps = []
    async with opened(tiny, on_progress=lambda *step: steps.append(step)) as engine:
        assert engine.statistics().state == "loading"
        info = await engine.wait_ready()
        assert info.model == "tiny"
        assert [step for step, *_ in steps][-1] == "prewarming"
        for check in (*CHECKS, *FORM_CHECKS):
            await check(engine)
        await templates_and_refusals(engine)
        await a_cancelled_tokenise_harms_nobody(engine)
        await nobody_must_wait_for_a_turn_to_be_tokenised(engine)
        assert engine.statistics().restarts == 0
    assert engine.statistics().state == "stopped"
    await assert_nothing_is_left(fds)


async def templates_and_refusals(engine: Any) -> None:
    hello = await engine.tokenise(chat(("user", "hello")))
    longer = await engine.tokenise(chat(("system", "be brief"), ("user", "hello")))
    assert 0 < len(hello.tokens) < len(longer.tokens)
    assert await engine.tokenise(request("\0"))
    for refused in (chat(("tool", "x")), request(""), request("\ud800")):
        with pytest.raises(InvalidRequest):
            await engine.tokenise(refused)
    with pytest.raises(InvalidRequest, match="no tools here"):
        await engine.tokenise(chat(("tool", "x")))


async def a_cancelled_tokenise_harms_nobody(engine: Any) -> None:
    expected = [await engine.tokenise(request(prompt)) for prompt in PROMPTS]
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(engine.tokenise, request("cancelled " * 500))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [await engine.tokenise(request(prompt)) for prompt in PROMPTS] == expected


async def nobody_must_wait_for_a_turn_to_be_tokenised(engine: Any) -> None:
    sequences = await admits(engine)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(engine.tokenise, request("hello"))
        await run_all(engine, sequences)


# --- deaths ---------------------------------------------------------------------------------


async def lost_reason(engine: Any) -> str:
    """Turn until the engine is lost, which it soon is."""
    with trio.fail_after(2):
        while True:
            try:
                await engine.begin(Work()).report()
            except EngineLost as lost:
                return lost.reason


async def test_a_killed_engine_is_lost_at_once_and_then_ready_again(tiny: Any) -> None:
    async with opened(tiny) as engine:
        await engine.wait_ready()
        assert engine.ready.value
        first = engine.statistics().pid
        sequences = await admits(engine, sampling=Sampling())
        whole = await run_all(engine, sequences)
        await engine.begin(Work(admit=tuple(sequences))).report()
        kill(engine)
        assert await lost_reason(engine) == "crash"
        with pytest.raises(EngineLost) as lost:
            await engine.begin(Work()).report()
        assert lost.value.reason == "crash"
        assert engine.statistics().state == "restarting"
        assert not engine.ready.value
        # Waits for the next one.
        assert (await engine.tokenise(request(PROMPTS[0]))).tokens == sequences[0].prompt
        assert engine.statistics().restarts == 1
        assert engine.statistics().pid != first
        assert await run_all(engine, sequences) == whole


async def test_a_turn_that_fails_as_a_whole_ends_the_engine_and_the_next_one_serves(
    tiny: Any,
) -> None:
    async with opened(tiny) as engine:
        await engine.wait_ready()
        sequences = await admits(engine)
        await engine.begin(Work(admit=tuple(sequences))).report()
        with pytest.raises(EngineLost) as lost:
            await engine.begin(Work(admit=tuple(sequences))).report()
        assert lost.value.reason == "crash"
        await engine.wait_ready()
        assert len(await run_all(engine, sequences)) == len(sequences)


# --- models that cannot be loaded -----------------------------------------------------------


async def test_a_model_that_cannot_be_loaded_is_a_mistake_of_configuration() -> None:
    with pytest.raises(ConfigError) as raised:
        async with opened("smollm2-135m-instuct") as engine:
            await engine.wait_ready()
    error = raised.value
    assert "did you mean smollm2-135m-instruct" in str(error)
    assert children() == []


# --- leaving --------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
async def test_leaving_while_loading_leaves_no_process(tiny: Any, stopped: Any) -> None:
    fds = psutil.Process().num_fds()
    async with opened(tiny) as engine:
        await until(lambda: engine.statistics().pid is not None)
        if stopped:
            stop(engine)
        start = trio.current_time()
    assert trio.current_time() - start < ENDED_S
    await assert_nothing_is_left(fds)


async def test_leaving_in_the_middle_of_a_long_prefill_is_bounded(tiny: Any) -> None:
    async with opened(tiny, prewarm=False) as engine:
        await engine.wait_ready()
        long = Admit(
            request_id=RequestId("long"),
            prompt=(7,) * 50_000,
            produced=(),
            max_tokens=1,
            sampling=Sampling(),
            stop=(),
        )
        async with trio.open_nursery() as nursery:
            turn = engine.begin(Work(admit=(long,), prefill_tokens=50_000))
            nursery.start_soon(turn.report)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        start = trio.current_time()
    assert trio.current_time() - start < ENDED_S
    assert children() == []


# --- the child's own end --------------------------------------------------------------------


class Talk:
    """Speaks to an engine process as a worker does, and can vanish."""

    def __init__(self, model: Any) -> None:
        self.control, theirs = socket.socketpair()
        self.tokenise, theirs_too = socket.socketpair()
        with theirs, theirs_too:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "trio_worker.engine", "serve",
                    "--control-fd", str(theirs.fileno()),
                    "--tokenise-fd", str(theirs_too.fileno()),
                ],
                pass_fds=(theirs.fileno(), theirs_too.fileno()),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self.control.settimeout(LOADED_S)
        self.buffer = FrameBuffer()
        self.send(
            Hello(
                model=model,
                model_name="served",
                max_batch_size=8,
                prewarm=False,
                prewarm_prompt="",
                prewarm_max_tokens=0,
                prefix_cache_bytes=0,
            )
        )

    def send(self, frame: Any) -> None:
        self.control.sendall(encode(frame))

    def receive(self, kind: Any) -> Any:
        while True:
            while (body := self.buffer.take()) is None:
                data = self.control.recv(2**16)
                assert data, "the engine hung up"
                self.buffer.feed(data)
            frame = decode_from_engine(body)
            if not isinstance(frame, Progress):
                assert isinstance(frame, kind)
                return frame

    def vanish(self) -> None:
        self.control.close()
        self.tokenise.close()


@pytest.mark.parametrize("when", ["loading", "idle", "in a turn"])
def test_an_engine_ends_with_its_worker(tiny: Any, when: Any) -> None:
    talk = Talk(tiny)
    try:
        if when != "loading":
            assert talk.receive(EngineInfo).model == "served"
        if when == "in a turn":
            talk.send(Work(prefill_tokens=1))
            talk.receive(Report)
            long = Admit(
                request_id=RequestId("long"), prompt=(7,) * 100_000, produced=(), max_tokens=1,
                sampling=Sampling(), stop=(),
            )  # fmt: skip
            talk.send(Work(admit=(long,), prefill_tokens=100_000))
        talk.vanish()
        assert talk.process.wait(timeout=5) == 0
    finally:
        talk.vanish()
        talk.process.kill()
        talk.process.wait()


async def test_trimming_reaches_the_engine(tiny: Any) -> None:
    prompt = tuple(range(10, 60))

    async def cached(engine: Any, *, trim: bool) -> int:
        first, *_ = await admits(engine, max_tokens=1)
        admit = replace(first, prompt=prompt)
        report = await engine.begin(Work(admit=(admit,), trim_caches=trim)).report()
        (prefill,) = report.prefills
        while report.residents:
            report = await engine.begin(Work()).report()
        return int(prefill.cached)

    async with opened(tiny, prefix_cache_bytes=2**24) as engine:
        await engine.wait_ready()
        assert await cached(engine, trim=False) == 0
        assert await cached(engine, trim=False) == len(prompt) - 1
        assert await cached(engine, trim=True) == 0


async def test_limits_of_memory_are_set_on_purpose_and_said(tiny: Any) -> None:
    """On Metal only where it is Metal's own limit; without the settings nothing is touched."""
    said: list[str] = []
    handle = logger.add(lambda message: said.append(str(message)), level="INFO")
    try:
        async with opened(tiny, wired_limit_bytes=2**26, allocator_cache_bytes=3 * 2**20) as engine:
            await engine.wait_ready()
        with_limits = "".join(said)
        said.clear()
        async with opened(tiny) as engine:
            await engine.wait_ready()
    finally:
        logger.remove(handle)
    assert "at most 3 MB of freed memory" in with_limits
    assert "64 MB" in with_limits
    assert "freed memory" not in "".join(said)
    assert "wired" not in "".join(said)
