"""What every implementation of the Engine port must do, as functions over an engine.

Each takes an engine that is, or becomes, ready and holds no sequence; it leaves it so. Nothing is
assumed of the model, except that a seeded or greedy answer is a function of its request: answers
may end early, tokens may be words, and texts may be held back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest
import trio
from msgspec.structs import replace
from trio.testing import assert_checkpoints, assert_no_checkpoints

from trio_worker.core.request import Request
from trio_worker.errors import EngineLost, InvalidRequest, WorkerFault
from trio_worker.ports import Engine
from trio_worker.protocol.prompt import Message
from trio_worker.protocol.turn import (
    TURNS_UNDER_WAY_MAX,
    Admit,
    FinishReason,
    Output,
    Report,
    RequestId,
    Sampling,
    Work,
)

PATIENCE_S = 10.0
"""For the end of an engine to be noticed."""

TURNS_MOST = 500
"""Far more turns than any run here takes: a run that goes on is a failure, not a hang."""

PROMPTS = (
    "one",
    "two words",
    "a prompt that is somewhat longer than the ones before it, so that the rows are unequal",
    "the last prompt",
)

SEEDED = Sampling(temperature=1.0, seed=41)


@dataclass(slots=True)
class Run:
    """What one sequence came to."""

    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finish: FinishReason | None = None


def request(prompt: str) -> Request:
    return Request(
        request_id=RequestId("tokenise"),
        prompt=prompt,
        messages=(),
        max_tokens=None,
        fit_max_tokens=False,
        sampling=Sampling(),
        stop=(),
        stream=False,
        priority=0,
        timeout_s=60.0,
        caller=None,
    )


async def admits(
    engine: Engine, *, max_tokens: int = 10, sampling: Sampling = SEEDED
) -> list[Admit]:
    return [
        Admit(
            request_id=RequestId(f"r{index}"),
            prompt=(await engine.tokenise(request(prompt))).tokens,
            produced=(),
            max_tokens=max_tokens,
            sampling=replace(sampling, seed=sampling.seed + index),
            stop=(),
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def note(runs: dict[RequestId, Run], outputs: Iterable[Output]) -> None:
    for output in outputs:
        run = runs.setdefault(output.request_id, Run())
        assert run.finish is None, "nothing follows the last token"
        run.tokens.append(output.token)
        run.texts.append(output.text)
        run.finish = output.finish


async def run_all(
    engine: Engine,
    sequences: Iterable[Admit],
    *,
    prefill_tokens: int = 64,
    each: Callable[[Report], None] | None = None,
) -> dict[RequestId, Run]:
    """Admit all of them in the first turn, and go on until none is left."""
    runs: dict[RequestId, Run] = {}
    work = Work(admit=tuple(sequences), prefill_tokens=prefill_tokens)
    for _ in range(TURNS_MOST):
        report = await engine.begin(work).report()
        assert not report.failures
        note(runs, report.outputs)
        if each is not None:
            each(report)
        if not report.residents:
            return runs
        work = Work(prefill_tokens=prefill_tokens)
    raise AssertionError("the sequences do not come to an end")


async def check_ready_tells_what_the_engine_is(engine: Engine) -> None:
    info = await engine.wait_ready()
    assert info.model
    assert info.context_length > 0
    assert info.cache_bytes_per_token > 0
    assert info.vocabulary_size > 0
    assert engine.ready.value
    assert engine.statistics().state == "ready"
    assert engine.statistics().info == info


async def check_every_token_is_of_the_vocabulary_and_every_one_may_be_biased(
    engine: Engine,
) -> None:
    size = (await engine.wait_ready()).vocabulary_size
    bias = ((0, -1.0), (size - 1, -1.0))
    sequences = await admits(engine, sampling=replace(SEEDED, logit_bias=bias))
    for run in (await run_all(engine, sequences)).values():
        assert all(0 <= token < size for token in run.tokens)
    for sequence in sequences:
        assert all(0 <= token < size for token in sequence.prompt)


async def check_whatever_may_wait_has_a_checkpoint_also_where_it_does_not_wait(
    engine: Engine,
) -> None:
    """So a cancelled task ends at each of them, and one that asks in a loop lets others run."""
    await engine.wait_ready()
    with assert_checkpoints():
        await engine.wait_ready()
    with assert_checkpoints():
        prompt = (await engine.tokenise(request(PROMPTS[0]))).tokens
    with assert_no_checkpoints():
        turn = engine.begin(Work())
    with assert_checkpoints():
        await turn.report()
    with trio.CancelScope() as scope:
        scope.cancel()
        await engine.wait_ready()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await engine.tokenise(request(PROMPTS[0]))
    assert scope.cancelled_caught
    sequence = replace((await admits(engine))[0], prompt=prompt)
    turn = engine.begin(Work(admit=(sequence,)))
    with trio.CancelScope() as scope:
        scope.cancel()
        await turn.report()
    assert scope.cancelled_caught
    assert (await turn.report()).residents, "it has gone on"
    report = await engine.begin(Work(remove=(sequence.request_id,))).report()
    assert not report.residents


async def check_what_is_no_text_is_refused_by_its_field(engine: Engine) -> None:
    await engine.wait_ready()
    half = "half of a pair: \ud83d"
    chat = (Message(role="user", content=half),)
    for asked in (request(half), dataclasses.replace(request(half), prompt=None, messages=chat)):
        with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
            await engine.tokenise(asked)
        assert caught.value.details == {"field": "messages" if asked.is_chat else "prompt"}


async def check_residents_are_those_who_came_and_have_not_left(engine: Engine) -> None:
    await engine.wait_ready()
    sequences = await admits(engine)
    expected = {sequence.request_id for sequence in sequences}

    def each(report: Report) -> None:
        expected.difference_update(o.request_id for o in report.outputs if o.finish is not None)
        assert report.residents == expected

    await run_all(engine, sequences, each=each)
    assert not expected


async def check_an_answer_has_max_tokens_tokens_or_stopped(engine: Engine) -> None:
    await engine.wait_ready()
    for max_tokens in (1, 7):
        runs = await run_all(engine, await admits(engine, max_tokens=max_tokens))
        assert len(runs) == len(PROMPTS)
        for run in runs.values():
            if run.finish is FinishReason.LENGTH:
                assert len(run.tokens) == max_tokens
            else:
                assert run.finish is FinishReason.STOP
                assert len(run.tokens) <= max_tokens


async def check_prefill_stays_within_its_bound(engine: Engine) -> None:
    await engine.wait_ready()
    sequences = await admits(engine, max_tokens=2)
    totals = {sequence.request_id: len(sequence.prompt) for sequence in sequences}
    done = dict.fromkeys(totals, 0)

    def each(report: Report) -> None:
        assert report.prefill_tokens <= 3
        assert report.seconds >= 0
        computed = 0
        for prefill in report.prefills:
            assert prefill.total == totals[prefill.request_id]
            before = max(done[prefill.request_id], prefill.cached)
            computed += prefill.done - before
            done[prefill.request_id] = prefill.done
        assert computed == report.prefill_tokens

    await run_all(engine, sequences, prefill_tokens=3, each=each)
    assert done == totals


async def check_each_decoding_sequence_gets_one_token_a_step(engine: Engine) -> None:
    """A turn has one step, and a second one at most where prompts have ended."""
    await engine.wait_ready()

    def each(report: Report) -> None:
        ended = any(prefill.done == prefill.total for prefill in report.prefills)
        assert len(report.batch_sizes) <= 1 + ended

    await run_all(engine, await admits(engine), prefill_tokens=5, each=each)


async def check_removed_sequences_produce_nothing(engine: Engine) -> None:
    await engine.wait_ready()
    first, second, *_ = await admits(engine, max_tokens=20)
    report = await engine.begin(Work(admit=(first, second))).report()
    assert report.residents == {first.request_id, second.request_id}
    report = await engine.begin(Work(remove=(first.request_id,))).report()
    while report.residents:
        assert report.residents == {second.request_id}
        assert {output.request_id for output in report.outputs} <= {second.request_id}
        report = await engine.begin(Work()).report()
    assert not report.residents


async def check_turns_begun_ahead_are_done_in_order_and_say_the_same(engine: Engine) -> None:
    await engine.wait_ready()
    sequences = await admits(engine, max_tokens=12)
    alone = await run_all(engine, sequences)
    first, *others = sequences
    runs: dict[RequestId, Run] = {}
    works = [
        Work(admit=(first,), prefill_tokens=64),
        Work(admit=tuple(others), prefill_tokens=64),
        *(Work(prefill_tokens=64) for _ in range(TURNS_UNDER_WAY_MAX - 2)),
    ]
    under_way = [engine.begin(work) for work in works]
    report = await under_way.pop(0).report()
    assert report.residents <= {first.request_id}, "a turn knows nothing of those behind it"
    note(runs, report.outputs)
    for _ in range(TURNS_MOST):
        if not under_way:
            break
        report = await under_way.pop(0).report()
        note(runs, report.outputs)
        if report.residents:
            under_way.append(engine.begin(Work(prefill_tokens=64)))
    assert runs == alone


async def check_who_is_removed_ahead_is_gone_in_that_turn_and_not_before(engine: Engine) -> None:
    await engine.wait_ready()
    first, second, *_ = await admits(engine, max_tokens=40)
    again = replace(first, request_id=RequestId("again"))
    under_way = [
        engine.begin(Work(admit=(first,), prefill_tokens=64)),
        engine.begin(Work(prefill_tokens=64)),
        engine.begin(Work(remove=(first.request_id,), admit=(second, again))),
        engine.begin(Work(remove=(second.request_id, again.request_id))),
        engine.begin(Work(remove=(second.request_id,))),
    ]
    residents = [(await turn.report()).residents for turn in under_way]
    assert residents[1] == {first.request_id}
    assert residents[2] == {second.request_id, again.request_id}
    assert residents[3:] == [frozenset(), frozenset()]


async def check_unknown_removes_are_ignored(engine: Engine) -> None:
    await engine.wait_ready()
    report = await engine.begin(Work(remove=(RequestId("nobody"),))).report()
    assert report.residents == frozenset()
    assert report.outputs == ()
    assert report.failures == ()


async def check_a_batch_gives_the_tokens_that_each_gets_alone(engine: Engine) -> None:
    await engine.wait_ready()
    for sampling in (Sampling(), SEEDED):
        sequences = await admits(engine, sampling=sampling)
        together = await run_all(engine, sequences, prefill_tokens=5)
        for sequence in sequences:
            alone = await run_all(engine, [sequence])
            assert alone[sequence.request_id].tokens == together[sequence.request_id].tokens
            assert alone[sequence.request_id].texts == together[sequence.request_id].texts


async def check_produced_tokens_are_gone_on_from(engine: Engine) -> None:
    """The rest of the tokens and of the text, and nothing twice."""
    await engine.wait_ready()
    sequences = await admits(engine, max_tokens=8)
    whole = await run_all(engine, sequences)
    for after in (1, 4):
        back = [
            replace(sequence, produced=tuple(whole[sequence.request_id].tokens[:after]))
            for sequence in sequences
            if len(whole[sequence.request_id].tokens) > after
        ]
        for request_id, run in (await run_all(engine, back)).items():
            assert run.tokens == whole[request_id].tokens[after:]
            assert "".join(run.texts) == "".join(whole[request_id].texts[after:])
            assert run.finish is whole[request_id].finish


async def check_a_removed_sequence_can_come_back_in_the_same_turn(engine: Engine) -> None:
    await engine.wait_ready()
    sequence = (await admits(engine, max_tokens=8))[0]
    whole = (await run_all(engine, [sequence]))[sequence.request_id]
    runs: dict[RequestId, Run] = {}
    report = await engine.begin(Work(admit=(sequence,))).report()
    note(runs, report.outputs)
    for _ in range(3):
        report = await engine.begin(Work()).report()
        note(runs, report.outputs)
    got = runs.get(sequence.request_id, Run())
    if got.finish is None:
        back = replace(sequence, produced=tuple(got.tokens))
        report = await engine.begin(Work(remove=(sequence.request_id,), admit=(back,))).report()
        note(runs, report.outputs)
        while report.residents:
            report = await engine.begin(Work()).report()
            note(runs, report.outputs)
    assert runs[sequence.request_id].tokens == whole.tokens
    assert runs[sequence.request_id].texts == whole.texts


# --- ends and their budget ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Harm:
    """What a test can do to the engine that it asks."""

    crash: Callable[[Engine], None]
    """End it between two turns, as a kill does."""
    hang: Callable[[Engine], None]
    """Let the next turn not return by itself."""


Open: TypeAlias = Callable[[int], AbstractAsyncContextManager[Engine]]
"""Opens an engine with this many restarts, which takes a hung turn for an end soon."""


async def lost(engine: Engine, work: Work | None = None) -> str:
    """Why the engine is lost, in this turn or one of the next."""
    with trio.fail_after(PATIENCE_S):
        while True:
            try:
                await engine.begin(work or Work()).report()
            except EngineLost as exc:
                return exc.reason
            work = None


async def check_a_recycled_engine_is_a_fresh_one_and_costs_no_budget(
    open_engine: Open, harm: Harm
) -> None:
    async with open_engine(0) as engine:
        await engine.wait_ready()
        sequences = await admits(engine, max_tokens=6)
        whole = await run_all(engine, sequences)
        report = await engine.begin(Work(admit=tuple(sequences))).report()
        assert report.residents
        with assert_no_checkpoints():
            engine.recycle()
            assert not engine.ready.value
            engine.recycle()  # there is nothing to replace
            engine.pardon(0)
            assert engine.statistics().state == "restarting"
        for _ in range(2):
            with assert_checkpoints(), pytest.raises(EngineLost) as caught:
                await engine.begin(Work()).report()
            assert caught.value.reason == "planned"
        await engine.wait_ready()
        assert engine.statistics().restarts_by_reason == {"planned": 1}
        report = await engine.begin(Work()).report()
        assert not report.residents, "what the old one held is gone"
        assert await run_all(engine, sequences) == whole


async def check_a_hung_turn_ends_in_time_and_the_next_engine_serves(
    open_engine: Open, harm: Harm
) -> None:
    async with open_engine(1) as engine:
        await engine.wait_ready()
        sequences = await admits(engine, max_tokens=6)
        whole = await run_all(engine, sequences)
        harm.hang(engine)
        assert await lost(engine, Work(admit=tuple(sequences))) == "hang"
        assert not engine.ready.value
        await engine.wait_ready()
        assert engine.statistics().restarts_by_reason == {"hang": 1}
        assert await run_all(engine, sequences) == whole


async def check_all_turns_under_way_are_lost_together(open_engine: Open, harm: Harm) -> None:
    async with open_engine(1) as engine:
        await engine.wait_ready()
        sequences = await admits(engine, max_tokens=6)
        whole = await run_all(engine, sequences)
        harm.hang(engine)
        under_way = [engine.begin(Work(admit=tuple(sequences)))]
        under_way += [engine.begin(Work()) for _ in range(3)]
        for turn in under_way:
            with trio.fail_after(PATIENCE_S), pytest.raises(EngineLost) as caught:
                await turn.report()
            assert caught.value.reason == "hang"
        await engine.wait_ready()
        assert engine.statistics().restarts == 1
        assert await run_all(engine, sequences) == whole


async def check_a_pardon_gives_back_what_was_spent_and_no_more(
    open_engine: Open, harm: Harm
) -> None:
    async def crash(engine: Engine) -> None:
        await engine.wait_ready()
        harm.crash(engine)
        assert await lost(engine) == "crash"

    with pytest.raises(WorkerFault):
        async with open_engine(1) as engine:
            for _ in range(2):
                await crash(engine)
                await engine.wait_ready()
                engine.pardon(5)
            assert engine.statistics().restarts == 2
            await crash(engine)
            await engine.wait_ready()
            # One too many, though ten were pardoned.
            await crash(engine)
            await trio.sleep_forever()


ENDS: tuple[Callable[[Open, Harm], Awaitable[None]], ...] = (
    check_a_recycled_engine_is_a_fresh_one_and_costs_no_budget,
    check_a_hung_turn_ends_in_time_and_the_next_engine_serves,
    check_all_turns_under_way_are_lost_together,
    check_a_pardon_gives_back_what_was_spent_and_no_more,
)

CHECKS: tuple[Callable[[Engine], Awaitable[None]], ...] = (
    check_ready_tells_what_the_engine_is,
    check_whatever_may_wait_has_a_checkpoint_also_where_it_does_not_wait,
    check_every_token_is_of_the_vocabulary_and_every_one_may_be_biased,
    check_what_is_no_text_is_refused_by_its_field,
    check_residents_are_those_who_came_and_have_not_left,
    check_an_answer_has_max_tokens_tokens_or_stopped,
    check_prefill_stays_within_its_bound,
    check_each_decoding_sequence_gets_one_token_a_step,
    check_removed_sequences_produce_nothing,
    check_turns_begun_ahead_are_done_in_order_and_say_the_same,
    check_who_is_removed_ahead_is_gone_in_that_turn_and_not_before,
    check_unknown_removes_are_ignored,
    check_a_batch_gives_the_tokens_that_each_gets_alone,
    check_produced_tokens_are_gone_on_from,
    check_a_removed_sequence_can_come_back_in_the_same_turn,
)
