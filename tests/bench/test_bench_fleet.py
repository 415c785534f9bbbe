"""`trio-worker bench fleet`: that its world is what it says, and its figures are true."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest
from support.worker_rig import make_config

from trio_worker.bench import fleet
from trio_worker.bench.fleet_world import HOP_S, FleetFigures, FleetLoad, run_virtual
from trio_worker.bench.setup import Setup

ALONE = FleetLoad(
    hand_on=False,
    seed=1,
    speeds=(1.0,),
    conversations=1,
    turns=2,
    system_tokens=400,
    question_tokens=(100, 100),
    answer_tokens=50,
    begin_s=20.0,
    think_s=5.0,
)


def test_a_second_turn_computes_what_is_new_in_it() -> None:
    """Of 500 and 650 tokens, of the second prompt nothing but its question."""
    figures = run_virtual(ALONE)
    assert figures.cached_share == pytest.approx((400 + 100 + 50) / (500 + 650))
    assert figures.workers_per_conversation == 1


def test_a_first_token_comes_after_the_prompt_has_been_read() -> None:
    """Half a millisecond a token, no decode step beside it; and a hop there and back."""
    figures = run_virtual(msgspec.structs.replace(ALONE, turns=1))
    slow = run_virtual(msgspec.structs.replace(ALONE, turns=1, speeds=(0.5,)))
    turn_s = 0.025
    assert figures.first_token_p50_s == pytest.approx(0.25 + 2 * HOP_S + turn_s, abs=turn_s)
    assert slow.first_token_p50_s - figures.first_token_p50_s == pytest.approx(0.25, abs=turn_s)
    # And then fifty tokens, each of which takes a turn.
    assert slow.virtual_s - figures.virtual_s == pytest.approx(0.25 + 50 * turn_s, abs=turn_s)


def test_the_same_seed_is_the_same_world_and_another_is_another() -> None:
    several = msgspec.structs.replace(ALONE, conversations=3, speeds=(1.0, 1.0))
    assert run_virtual(several) == run_virtual(several)
    assert run_virtual(msgspec.structs.replace(several, seed=2)) != run_virtual(several)


def test_without_handing_on_a_conversation_goes_to_workers_at_random() -> None:
    several = msgspec.structs.replace(ALONE, conversations=4, turns=4, speeds=(1.0,) * 4)
    assert run_virtual(several).workers_per_conversation > 1.5


@pytest.mark.parametrize("slow", [1.0, 0.4])
def test_handing_on_keeps_a_conversation_where_its_beginning_is(slow: float) -> None:
    """While there is room, at one worker; so more is cached, and first tokens come sooner."""
    load = msgspec.structs.replace(
        ALONE, conversations=8, turns=4, tenants=3, speeds=(1.0, 1.0, slow)
    )
    alone = run_virtual(load)
    handed_on = run_virtual(msgspec.structs.replace(load, hand_on=True))
    assert handed_on.workers_per_conversation == 1
    assert alone.workers_per_conversation > 1.5
    assert handed_on.cached_share > alone.cached_share + 0.15
    assert handed_on.first_token_p50_s < alone.first_token_p50_s


# --- what is printed -------------------------------------------------------------------------

SETUP = Setup(config=make_config(), engine="simulated", max_tokens=1, rounds=2, conversations=5)


def figures_of(load: FleetLoad) -> FleetFigures:
    """Made up."""
    return FleetFigures(
        cached_share=0.5 + 0.2 * load.hand_on + load.seed / 100,
        first_token_p50_s=1.0 * load.seed,
        first_token_p95_s=4.0 - load.hand_on,
        workers_per_conversation=3.0,
        virtual_s=9.0,
    )


async def test_it_prints_the_means_and_what_is_between_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[FleetLoad] = []

    async def known(loads: Sequence[FleetLoad]) -> list[FleetFigures]:
        asked.extend(loads)
        return [figures_of(load) for load in loads]

    monkeypatch.setattr(fleet, "in_processes", known)
    await fleet.alike(SETUP)
    assert [(load.hand_on, load.seed) for load in asked] == [
        *((False, 1), (True, 1), (False, 2), (True, 2))
    ]
    assert {load.speeds for load in asked} == {(1.0, 1.0, 1.0, 1.0)}
    assert {load.conversations for load in asked} == {5}
    title, random, handed_on, difference = capsys.readouterr().out.splitlines()
    assert title.startswith("4 workers alike, 5 conversations of 10 turns, 2 seeds")
    assert "51.5 % of the prompts' tokens cached, first token p50 1.50 s, p95 4.00 s" in random
    assert "71.5 % of the prompts' tokens cached, first token p50 1.50 s, p95 3.00 s" in handed_on
    assert "+20.0 points cached (+15 required)" in difference
    assert difference.endswith(", first token p95 0.75 of it (0.5 required)")
    asked.clear()
    await fleet.unlike(SETUP)
    assert [(load.hand_on, load.seed) for load in asked] == [(False, 1), (True, 1)]
    assert {load.speeds for load in asked} == {(1.0, 1.0, 1.0, 0.4)}
    title, *_, difference = capsys.readouterr().out.splitlines()
    assert title.startswith("one of 4 workers at 0.4 speed, 5 conversations of 10 turns, 1 seed,")
    assert difference == "  difference: +20.0 points cached, first token p95 0.75 of it"


@pytest.mark.process
async def test_each_world_is_a_process_and_they_come_back_in_order() -> None:
    long = msgspec.structs.replace(ALONE, turns=6, conversations=3)
    of_long, of_short = await fleet.in_processes(
        [long, msgspec.structs.replace(ALONE, turns=1, speeds=(0.25,))]
    )
    assert of_long.cached_share > 0.5
    assert of_short.cached_share == 0


async def test_the_default_is_the_load_that_the_figures_are_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[FleetLoad] = []

    async def none(loads: Sequence[FleetLoad]) -> list[FleetFigures]:
        asked.extend(loads)
        return [figures_of(load) for load in loads]

    monkeypatch.setattr(fleet, "in_processes", none)
    await fleet.alike(replace(SETUP, conversations=200, rounds=3))
    assert len(asked) == 6
    assert re.fullmatch(r"\(1\.0(, 1\.0){3}\)", str(asked[0].speeds))
    load = asked[0]
    assert (load.conversations, load.turns, load.tenants) == (200, 10, 10)
    assert (load.slots, load.answer_tokens, load.system_tokens) == (8, 150, 1500)
    assert (load.cache_tokens, load.think_s, load.prefill_tokens_per_s) == (80_000, 35, 2_000)
