"""Choosing tokens, against a plain NumPy reading of the order that `engine/sampling.py` states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from trio_worker.engine import sampling
from trio_worker.engine.sampling import Plan
from trio_worker.engine.serve import GREEDY

pytestmark = pytest.mark.mlx

VOCABULARY = 40


@dataclass
class Row:
    sampling: Any
    prompt_length: int = 1


def row(prompt_length: int = 1, **settings: Any) -> Row:
    return Row(msgspec.structs.replace(GREEDY, **settings), prompt_length)


# --- the reference ------------------------------------------------------------------------


def splitmix64(value: int) -> int:
    """Vigna's generator: one step from the state `value`."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def adjusted(logits: Any, row: Row, history: list[int]) -> Any:
    """The row's logits after the bias and the penalties; `history` is prompt and answer."""
    asked = row.sampling
    values = np.array(logits, dtype=np.float64)
    for token, value in asked.logit_bias:
        values[token] += value
    for token in set(history):
        # A penalty of 2 makes what is likely half as likely a logit, and never likelier.
        if values[token] < 0:
            values[token] *= asked.repetition_penalty
        else:
            values[token] /= asked.repetition_penalty
    answer = history[row.prompt_length :]
    for token in set(answer):
        values[token] -= asked.presence_penalty + asked.frequency_penalty * answer.count(token)
    return values


def offered(logits: Any, row: Row, history: list[int]) -> dict[int, float] | None:
    """The tokens that may be drawn, with their logits less the largest; None: no draw."""
    asked = row.sampling
    values = adjusted(logits, row, history)
    if asked.temperature < 1e-5:
        return None
    values = values / asked.temperature
    values -= values.max()
    kept = sorted(range(len(values)), key=lambda token: -values[token])
    if asked.top_k:
        kept = kept[: asked.top_k]
    total = sum(math.exp(values[token]) for token in kept)
    if asked.top_p < 1:
        before, nucleus = 0.0, []
        for token in kept:
            if before < asked.top_p:
                nucleus.append(token)
            before += math.exp(values[token]) / total
        kept = nucleus
    return {token: values[token] for token in kept if math.exp(values[token]) >= asked.min_p}


# --- what the plan does -------------------------------------------------------------------


@dataclass
class Draw:
    """One call of the random choice: a key and the logits on offer for each of its rows."""

    keys: list[list[int]]
    logits: Any


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Draw]:
    """What the plan offers to the random choice, which goes on as always."""
    seen: list[Draw] = []
    choose = sampling._categorical

    def note(keys: Any, logits: Any) -> Any:
        seen.append(Draw(keys.tolist(), np.array(logits)))
        return choose(keys, logits)

    monkeypatch.setattr(sampling, "_categorical", note)
    return seen


def draw(plan: Plan, logits: Any, inputs: list[int], tokens: list[list[int]]) -> list[int]:
    chosen, _ = plan.draw(mx.array(logits), mx.array(inputs), tokens)
    assert chosen.shape == (len(inputs),)
    read: Any = chosen.tolist()
    return [int(token) for token in read]


def key_of(row: Row, position: int) -> list[int]:
    mixed = splitmix64((splitmix64(row.sampling.seed) + position) % 2**64)
    return [mixed >> 32, mixed % 2**32]


def random_row(random: Random, length: int) -> Row:
    """A row with anything on or off, of `length` tokens up to its input."""

    def maybe(value: Any, off: Any) -> Any:
        return value if random.random() < 0.4 else off

    biased = random.sample(range(VOCABULARY), 3)
    return row(
        prompt_length=random.randint(1, length),
        temperature=maybe(random.uniform(0.3, 2), random.choice((0.0, 1.0))),
        top_k=maybe(random.randint(1, VOCABULARY + 5), 0),
        top_p=maybe(random.uniform(0.05, 0.99), 1.0),
        min_p=maybe(random.uniform(0.001, 0.5), 0.0),
        repetition_penalty=maybe(random.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(random.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(random.uniform(-2, 2), 0.0),
        logit_bias=maybe(tuple((token, random.uniform(-9, 9)) for token in biased), ()),
        seed=random.randrange(2**53),
    )


@pytest.mark.parametrize("seed", range(12))
def test_every_row_of_any_batch_is_offered_what_the_documented_order_leaves(
    draws: list[Draw], seed: int
) -> None:
    """Several steps of one membership, so that the penalties count what has been drawn."""
    random, noise = Random(seed), np.random.default_rng(seed)
    count = random.randint(1, 12)
    tokens = [
        [random.randrange(VOCABULARY) for _ in range(random.randint(0, 9))] for _ in range(count)
    ]
    rows = [random_row(random, len(before) + 1) for before in tokens]
    plan = Plan(rows, tokens, VOCABULARY)
    inputs = [random.randrange(VOCABULARY) for _ in rows]
    for _ in range(4):
        logits = noise.normal(0, 2.5, (count, VOCABULARY)).astype(np.float32)
        draws.clear()
        chosen = draw(plan, logits, inputs, tokens)
        drawn = {
            tuple(key): values
            for each in draws
            for key, values in zip(each.keys, each.logits, strict=True)
        }
        for index, of_row in enumerate(rows):
            history = [*tokens[index], inputs[index]]
            expected = offered(logits[index], of_row, history)
            if expected is None:
                best = adjusted(logits[index], of_row, history)
                assert chosen[index] == int(best.argmax())
                continue
            assert chosen[index] in expected
            values = drawn.pop(tuple(key_of(of_row, len(history))))
            on_offer = np.sort(values[np.isfinite(values)])[::-1]
            assert on_offer - on_offer[0] == pytest.approx(
                sorted(expected.values(), reverse=True), rel=1e-3, abs=1e-3
            )
        assert not drawn, "nothing is drawn for a greedy row"
        for before, token in zip(tokens, inputs, strict=True):
            before.append(token)
        inputs = chosen


def test_a_free_choice_is_the_one_of_its_key_over_the_whole_vocabulary() -> None:
    logits = np.random.default_rng(3).normal(0, 2, (3, VOCABULARY)).astype(np.float32)
    rows = [row(temperature=0.7, seed=seed) for seed in (5, 6, 5)]
    tokens = [[1, 2], [1], [1, 2, 3]]
    keys = mx.array([key_of(r, len(t) + 1) for r, t in zip(rows, tokens, strict=True)])
    expected = sampling._categorical(keys.astype(mx.uint32), mx.array(logits / 0.7))
    assert draw(Plan(rows, tokens, VOCABULARY), logits, [4, 4, 4], tokens) == expected.tolist()


def test_a_filtered_choice_is_the_one_of_its_key_over_the_tokens_by_their_likelihood() -> None:
    logits = np.random.default_rng(4).normal(0, 2, (2, VOCABULARY)).astype(np.float32)
    rows = [row(temperature=1.5, top_k=7, seed=seed) for seed in (5, 6)]
    tokens: list[list[int]] = [[1], [2]]
    order = np.argsort(-logits, axis=-1)
    values = np.take_along_axis(logits, order, axis=-1)
    values = (values - values[:, :1]) / np.float32(1.5)
    values[:, 7:] = -np.inf
    keys = mx.array([key_of(r, 2) for r in rows]).astype(mx.uint32)
    places: Any = sampling._categorical(keys, mx.array(values)).tolist()
    expected = [int(order[index, place]) for index, place in enumerate(places)]
    assert draw(Plan(rows, tokens, VOCABULARY), logits, [3, 3], tokens) == expected


def test_all_kinds_of_rows_keep_their_places_in_a_batch() -> None:
    """Each kind twice, in every order: a row has one token on offer, which is its own."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 1},
        {"presence_penalty": 1.0},
        {"logit_bias": ((39, -1.0),), "temperature": 1.0, "top_p": 0.5},
    ]
    for rotation in range(len(kinds)):
        settings = [*kinds[rotation:], *kinds[:rotation]] * 2
        rows = [row(seed=9, **each) for each in settings]
        logits = np.full((len(rows), VOCABULARY), -60, dtype=np.float32)
        for index in range(len(rows)):
            logits[index, 2 * index] = 60
        tokens: list[list[int]] = [[39] for _ in rows]
        plan = Plan(rows, tokens, VOCABULARY)
        assert draw(plan, logits, [39] * len(rows), tokens) == [2 * i for i in range(len(rows))]


# --- edges --------------------------------------------------------------------------------


def on_offer(draws: list[Draw], logits: list[float], **settings: Any) -> int:
    """How many tokens one row may draw from; 0 where nothing is drawn."""
    draws.clear()
    plan = Plan([row(**settings)], [[0]], len(logits))
    draw(plan, np.array([logits], dtype=np.float32), [0], [[0]])
    return sum(int(np.isfinite(each.logits).sum()) for each in draws)


def test_the_edges_of_every_filter(draws: list[Draw]) -> None:
    even, warm = [0.0] * 8, {"temperature": 1.0}
    assert on_offer(draws, even, temperature=9.9e-6) == 0, "greedy"
    assert on_offer(draws, even, temperature=1e-5) == 8
    assert on_offer(draws, even, **warm, top_k=1) == 1
    assert on_offer(draws, even, **warm, top_k=3) == 3
    assert on_offer(draws, even, **warm, top_k=8) == 8
    assert on_offer(draws, even, **warm, top_k=9) == 8
    # What comes before a token has to be less than top_p, so half of eight are four.
    assert on_offer(draws, even, **warm, top_p=0.5) == 4
    assert on_offer(draws, even, **warm, top_p=0.51) == 5
    assert on_offer(draws, even, **warm, top_p=1e-9) == 1
    assert on_offer(draws, even, **warm, min_p=1.0) == 8, "as likely as the likeliest"
    assert on_offer(draws, [0.0, -1e-3, *even], **warm, min_p=1.0) == 9
    # Half of three is two, where top_p looks at what top_k has left.
    assert on_offer(draws, even, **warm, top_k=3, top_p=0.5) == 2
    # The first of these is half of all, and two thirds of what min_p leaves.
    halves = [math.log(share) for share in (0.5, 0.25, 0.125, 0.125)]
    assert on_offer(draws, halves, **warm, top_p=0.6, min_p=0.4) == 2
    assert on_offer(draws, halves, **warm, min_p=0.4) == 2
    assert on_offer(draws, halves, **warm, top_p=0.76) == 3
    # The filters see the temperature's work.
    assert on_offer(draws, halves, temperature=0.5, min_p=0.4) == 1
    assert on_offer(draws, halves, temperature=0.5, top_p=0.72) == 1
    assert on_offer(draws, halves, **warm, top_p=0.72) == 2


def test_without_top_p_no_token_is_too_unlikely_for_another_filter(draws: list[Draw]) -> None:
    """Though what comes before the last adds up to 1 in single precision."""
    unlikely = [0.0, *([-40.0] * 7)]
    assert on_offer(draws, unlikely, temperature=1.0, top_k=6) == 6
    assert on_offer(draws, unlikely, temperature=1.0, top_k=6, top_p=0.9999999) == 1


def test_the_filters_look_at_the_likeliest_4096_tokens(draws: list[Draw]) -> None:
    logits = [float(-(token % 5000)) / 1000 for token in range(5000)]
    Random(0).shuffle(logits)
    assert on_offer(draws, logits, temperature=1.0, min_p=1e-9) == 4096
    assert on_offer(draws, logits[:4096], temperature=1.0, min_p=1e-9) == 4096
    assert draws[0].logits.shape == (1, 4096)
    assert on_offer(draws, logits, temperature=1.0) == 5000, "without a filter it is all of them"
    assert on_offer(draws, logits, temperature=1.0, min_p=1e-9) == 4096
    assert np.sort(draws[0].logits[0])[::-1] == pytest.approx(
        [-token / 1000 for token in range(4096)], abs=1e-4
    )


def test_beyond_the_head_a_row_draws_what_it_would_from_the_head_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = np.random.default_rng(5).normal(0, 2, (8, VOCABULARY)).astype(np.float32)
    rows = [row(temperature=1.3, top_k=6, seed=seed) for seed in range(8)]
    tokens: list[list[int]] = [[1]] * 8
    monkeypatch.setattr(sampling, "HEAD", 10)
    headed = draw(Plan(rows, tokens, VOCABULARY), logits, [1] * 8, tokens)
    # The same noise falls on the same places when what lies beyond is not there at all.
    for index, chosen in enumerate(headed):
        kept = np.sort(np.argsort(-logits[index])[:10])
        alone = draw(Plan([rows[index]], [[1]], 10), logits[index : index + 1, kept], [1], [[1]])
        assert int(kept[alone[0]]) == chosen


def test_the_head_has_the_likeliest_tokens_of_every_row_and_no_other(
    draws: list[Draw], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.random.default_rng(7).normal(0, 1, (300, VOCABULARY)).astype(np.float32)
    rows = [row(temperature=1.0, min_p=1e-9, seed=seed) for seed in range(300)]
    tokens: list[list[int]] = [[1]] * 300
    monkeypatch.setattr(sampling, "HEAD", 10)
    draw(Plan(rows, tokens, VOCABULARY), logits, [1] * 300, tokens)
    likeliest = np.sort(logits, axis=-1)[:, :-11:-1]
    assert draws[0].logits == pytest.approx(likeliest - likeliest[:, :1], abs=1e-5)


def test_keys_are_splitmix64_of_seed_and_position() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF, "the first number of its authors' own example"
    for seed, position in ((0, 0), (0, 1), (1, 0), (2**53 - 1, 10**6), (2**64 - 1, 1)):
        mixed = splitmix64((splitmix64(seed) + position) % 2**64)
        mixed_seeds = sampling._mix(np.array([seed], dtype=np.uint64))
        keys = sampling._keys(mixed_seeds, [position])
        assert keys.tolist() == [[mixed >> 32, mixed % 2**32]]


def test_a_prompts_last_token_is_no_part_of_the_answer_and_the_next_one_is() -> None:
    """Presence and frequency look at the answer, repetition at everything."""
    logits = np.zeros((1, VOCABULARY), dtype=np.float32)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    penalties = {"presence_penalty": 1.5}
    for prompt_length, expected in ((2, 7), (1, 8)):
        plan = Plan([row(prompt_length, **penalties)], [[1]], VOCABULARY)
        assert draw(plan, logits, [7], [[1]]) == [expected]
    plan = Plan([row(2, repetition_penalty=2.0)], [[1]], VOCABULARY)
    assert draw(plan, logits, [7], [[1]]) == [8]


def test_half_precision_is_no_obstacle_to_small_differences(draws: list[Draw]) -> None:
    """A bias of 0.01 on a logit of 100 is lost where the sum has eight bits."""
    logits = mx.array([[100.0, 100.0, 1.0]]).astype(mx.bfloat16)
    for settings in (
        {"logit_bias": ((1, 0.01),)},
        {"presence_penalty": 0.01},
        {"logit_bias": ((1, 0.01),), "temperature": 1.0, "top_k": 1},
    ):
        plan = Plan([row(1, **settings)], [[2]], 3)
        chosen, _ = plan.draw(logits, mx.array([0]), [[2]])
        assert chosen.tolist() == [1]
    pair = mx.concatenate([logits, logits])
    plan = Plan([row(presence_penalty=0.01), row()], [[2], [2]], 3)
    chosen, _ = plan.draw(pair, mx.array([0, 0]), [[2], [2]])
    assert chosen.tolist() == [1, 0]
    plan = Plan([row(temperature=1.0, top_k=2)], [[2]], 2)
    plan.draw(mx.array([[256, 1 + 2**-7]]).astype(mx.bfloat16), mx.array([0]), [[1]])
    assert draws[-1].logits.tolist() == [[0, 1 + 2**-7 - 256]]


# --- log-probabilities --------------------------------------------------------------------


def normal(logits: Any) -> Any:
    values = np.array(logits, dtype=np.float64)
    return values - np.log(np.exp(values).sum())


def test_log_probabilities_are_the_models_own_for_those_who_asked() -> None:
    logits = np.random.default_rng(6).normal(0, 2, (5, VOCABULARY)).astype(np.float32)
    others: dict[str, Any] = {
        "logit_bias": ((3, 50.0),),
        "presence_penalty": 1.0,
        "temperature": 0.5,
    }
    rows = [
        row(logprobs=True),
        row(),
        row(logprobs=True, top_logprobs=2, **others),
        row(**others),
        row(logprobs=True, top_logprobs=5, temperature=1.0, top_k=3),
    ]
    tokens = [[1]] * 5
    plan = Plan(rows, tokens, VOCABULARY)
    chosen, places = plan.draw(mx.array(logits), mx.array([2] * 5), tokens)
    assert [place is not None for place in places] == [True, False, True, False, True]
    for index, place in enumerate(places):
        if place is None:
            continue
        logprobs, at = place
        expected = normal(logits[index])
        top = rows[index].sampling.top_logprobs
        value, alternatives = logprobs.read(at, top)
        assert value == pytest.approx(expected[int(chosen[index])], abs=1e-4)
        likeliest = [int(token) for token in np.argsort(-expected)[:top]]
        assert [token for token, _ in alternatives] == likeliest
        assert [v for _, v in alternatives] == pytest.approx(expected[likeliest], abs=1e-4)
        assert len(logprobs.arrays) == 3
    assert int(chosen[2]) == 3, "the bias decides, and the log-probability knows nothing of it"


def test_penalties_leave_the_log_probabilities_of_all_rows_alone() -> None:
    """Where all rows ask, nothing is copied for them before the penalties are written."""
    rows = [row(logprobs=True), row(logprobs=True, presence_penalty=2.0)]
    logits = np.random.default_rng(9).normal(0, 2, (2, VOCABULARY)).astype(np.float32)
    tokens = [[1, 2], [1, 2]]
    chosen, places = Plan(rows, tokens, VOCABULARY).draw(mx.array(logits), mx.array([3, 3]), tokens)
    for index, place in enumerate(places):
        assert place is not None
        logprobs, at = place
        expected = normal(logits[index])[int(chosen[index])]
        assert logprobs.read(at, 0)[0] == pytest.approx(expected, abs=1e-4)


def test_a_filter_that_one_row_asks_for_is_none_of_the_others(draws: list[Draw]) -> None:
    """Each filter is made for all rows that have any, once, when the membership changes."""
    settings: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 1.0}]
    logits = np.zeros((3, 10), dtype=np.float32)
    logits[2, 0] = 1.0
    for _ in range(3):
        settings = [*settings[1:], settings[0]]
        rows = [row(temperature=1.0, **each) for each in settings]
        order = [{"top_k": 0, "top_p": 1, "min_p": 2}[next(iter(each))] for each in settings]
        draws.clear()
        draw(Plan(rows, [[0]] * 3, 10), logits[order], [0] * 3, [[0]] * 3)
        on_offer = np.isfinite(draws[0].logits).sum(axis=-1).tolist()
        assert on_offer == [(3, 3, 1)[each] for each in order]


def test_without_alternatives_none_are_looked_for() -> None:
    plan = Plan([row(logprobs=True)], [[1]], VOCABULARY)
    logits = mx.array(np.arange(VOCABULARY, dtype=np.float32)[None])
    _, ((logprobs, at),) = plan.draw(logits, mx.array([1]), [[1]])  # type: ignore[misc]
    assert logprobs.read(at, 0) == (pytest.approx(normal(np.arange(VOCABULARY))[-1]), [])
    assert logprobs.read(at, 3)[1] == []
    assert len(logprobs.arrays) == 1
    assert Plan([row()], [[1]], VOCABULARY).draw(logits, mx.array([1]), [[1]])[1] == [None]


def test_the_alternatives_are_the_likeliest_of_every_row() -> None:
    logits = np.random.default_rng(8).normal(0, 1, (300, VOCABULARY)).astype(np.float32)
    tokens = [[1]] * 300
    plan = Plan([row(logprobs=True, top_logprobs=5)] * 300, tokens, VOCABULARY)
    _, places = plan.draw(mx.array(logits), mx.array([1] * 300), tokens)
    for index, place in enumerate(places):
        assert place is not None
        logprobs, at = place
        likeliest = np.argsort(-logits[index])[:5].tolist()
        assert [token for token, _ in logprobs.read(at, 5)[1]] == likeliest


def test_there_are_no_more_alternatives_than_tokens() -> None:
    plan = Plan([row(logprobs=True, top_logprobs=20)], [[1]], 3)
    _, ((logprobs, at),) = plan.draw(mx.array([[1.0, 3.0, 2.0]]), mx.array([1]), [[1]])  # type: ignore[misc]
    assert [token for token, _ in logprobs.read(at, 20)[1]] == [1, 2, 0]


def test_a_row_that_asks_for_none_but_names_a_number_costs_nothing() -> None:
    """`top_logprobs` counts only beside `logprobs`."""
    rows = [row(top_logprobs=5), row(logprobs=True)]
    plan = Plan(rows, [[1], [1]], VOCABULARY)
    logits = mx.zeros((2, VOCABULARY))
    _, places = plan.draw(logits, mx.array([1, 1]), [[1], [1]])
    assert places[0] is None
    assert places[1] is not None
    assert len(places[1][0].arrays) == 1


def test_nothing_is_counted_for_a_row_without_penalties() -> None:
    rows = [row(), row(temperature=1.0, logit_bias=((1, 1.0),)), row(repetition_penalty=1.5)]
    for penalised in (row(presence_penalty=0.5), row(frequency_penalty=-0.5)):
        plan = Plan([*rows, penalised], [[1]] * 4, VOCABULARY)
        assert plan._counts.shape == plan._seen.shape == (2, VOCABULARY)


def test_a_plan_for_nobody_is_possible() -> None:
    Plan([], [], VOCABULARY)
