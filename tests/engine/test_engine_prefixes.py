"""The running batch of the engine process, on a random model, without the process."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import msgspec
import pytest
from mlx_lm.models import base, llama
from support.tiny_model import (
    CONTEXT,
    END,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    byte_token,
    write_tiny_model,
)

from trio_worker.engine import stem_lengths
from trio_worker.engine.caches import can_share
from trio_worker.engine.models.load import load
from trio_worker.engine.prefill_plan import CALL_TOKENS
from trio_worker.engine.sampling import Plan
from trio_worker.engine.serve import GREEDY, open_batch, prewarm
from trio_worker.protocol.turn import Admit, Work

pytestmark = pytest.mark.mlx

NO_END = ((END, -100.0),)
"""Random models end at random; most tests want answers of a known length."""

PROMPTS = [tuple(range(3 + n, 3 + n + length)) for n, length in enumerate((1, 5, 40, 17, 2, 80))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Any:
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return load(str(folder), None, lambda *_: None)


@pytest.fixture
def batch(model: Any) -> Any:
    return open_batch(model, 0)


def opened(model: Any, prefix_bytes: int, padding_max: int) -> Any:
    batch = open_batch(model, prefix_bytes)
    batch._padding_max = padding_max
    return batch


def sampling(**settings: Any) -> Any:
    return msgspec.structs.replace(GREEDY, **{"logit_bias": NO_END, **settings})


def admit(
    request_id: Any,
    prompt: Any = PROMPTS[1],
    *,
    produced: Any = (),
    max_tokens: Any = 12,
    stop: Any = (),
    **settings: Any,
) -> Any:
    return Admit(
        request_id=request_id,
        prompt=tuple(prompt),
        produced=tuple(produced),
        max_tokens=max_tokens,
        sampling=sampling(**settings),
        stop=tuple(stop),
    )


def turn(
    batch: Any, *admits: Any, remove: Any = (), prefill_tokens: Any = 512, trim: Any = False
) -> Any:
    return batch.turn(
        Work(
            admit=admits,
            remove=tuple(remove),
            prefill_tokens=prefill_tokens,
            trim_caches=trim,
        )
    )


def run(batch: Any, *admits: Any, prefill_tokens: Any = 512) -> Any:
    """Every admitted sequence to its end."""
    runs: dict[str, SimpleNamespace] = defaultdict(
        lambda: SimpleNamespace(
            tokens=[], text="", texts=[], finish=None, logprobs=[], failure=None
        )
    )
    done = turn(batch, *admits, prefill_tokens=prefill_tokens)
    while True:
        for output in done.outputs:
            of = runs[output.request_id]
            assert of.finish is None
            of.tokens.append(output.token)
            of.texts.append(output.text)
            of.text += output.text
            of.finish = output.finish
            of.logprobs.append(output.logprob)
        for failure in done.failures:
            runs[failure.request_id].failure = failure.message
        if not done.residents:
            return runs
        done = turn(batch, prefill_tokens=prefill_tokens)


def tokens_of(done: Any, request_id: Any = "one") -> Any:
    return [output.token for output in done.outputs if output.request_id == request_id]


def run_one(batch: Any, *args: Any, prefill_tokens: Any = 512, **settings: Any) -> Any:
    return run(batch, admit("one", *args, **settings), prefill_tokens=prefill_tokens)["one"]


MIXED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7},
    "other seed": {"temperature": 1.0, "seed": 8},
    "top_p": {"temperature": 1.2, "seed": 9, "top_p": 0.5},
    "top_k": {"temperature": 1.5, "seed": 10, "top_k": 5},
    "min_p": {"temperature": 1.5, "seed": 11, "min_p": 0.2},
    "filters": {"temperature": 0.7, "seed": 12, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.5, "temperature": 0.9, "seed": 13},
    "frequency": {"frequency_penalty": 0.7},
    "biased": {"logit_bias": (*NO_END, (70, 3.0), (71, -3.0))},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "temperature": 1.0, "seed": 14},
}


def mixed() -> Any:
    return {
        name: admit(name, PROMPTS[n % len(PROMPTS)], **settings)
        for n, (name, settings) in enumerate(MIXED.items())
    }


@pytest.fixture(scope="module")
def alone(model: Any) -> Any:
    batch = open_batch(model, 0)
    return {name: run(batch, one)[name] for name, one in mixed().items()}


# --- the same tokens, whoever else is there -------------------------------------------------


def test_every_kind_of_row_gets_the_tokens_in_a_batch_that_it_gets_alone(
    batch: Any, alone: Any
) -> None:
    together = run(batch, *mixed().values())
    assert {name: of.tokens for name, of in together.items()} == {
        name: of.tokens for name, of in alone.items()
    }


def test_rows_that_come_one_by_one_get_the_same_tokens_too(batch: Any, alone: Any) -> None:
    """Every turn another membership."""
    tokens = defaultdict(list)
    waiting = list(mixed().values())
    residents = True
    while waiting or residents:
        done = turn(batch, *waiting[:1], prefill_tokens=13)
        waiting = waiting[1:]
        residents = done.residents
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
    assert tokens == {name: of.tokens for name, of in alone.items()}


@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_sequence_that_comes_back_goes_on_with_the_same_tokens_and_text(
    batch: Any, alone: Any, after: Any
) -> None:
    back = [
        msgspec.structs.replace(one, produced=tuple(alone[name].tokens[:after]))
        for name, one in mixed().items()
    ]
    resumed = run(batch, *back, prefill_tokens=31)
    for name, of in resumed.items():
        assert of.tokens == alone[name].tokens[after:]
        assert of.text == "".join(alone[name].texts[after:])
        assert of.finish == "length"


def test_the_size_of_the_prefill_chunks_changes_nothing(batch: Any) -> None:
    whole = run_one(batch, PROMPTS[5])
    assert run_one(batch, PROMPTS[5], prefill_tokens=7).tokens == whole.tokens


CACHES = pytest.mark.parametrize(
    ("prefix_bytes", "padding_max"), [(0, 10**6), (2**18, 10**6), (0, 60), (2**18, 0)]
)


@CACHES
@pytest.mark.parametrize("seed", range(3))
def test_no_history_of_comings_and_goings_changes_a_token(
    model: Any, alone: Any, seed: int, prefix_bytes: int, padding_max: int
) -> None:
    """Removed and crashed at random in every stage; each comes back with what it was given."""
    live_through(Random(seed), mixed(), alone, lambda: opened(model, prefix_bytes, padding_max))


def sharing() -> Any:
    beginnings = [range(100, 140), range(100, 114), range(300, 333)]
    return {
        name: msgspec.structs.replace(one, prompt=(*beginnings[n % 3], *one.prompt))
        for n, (name, one) in enumerate(mixed().items())
    }


@pytest.fixture(scope="module")
def sharing_alone(model: Any) -> Any:
    batch = open_batch(model, 0)
    batch._share = False
    return {name: run(batch, one)[name] for name, one in sharing().items()}


@CACHES
@pytest.mark.parametrize("seed", range(2))
def test_nor_does_one_of_rows_that_share_what_they_begin_with(
    model: Any,
    sharing_alone: Any,
    seed: int,
    prefix_bytes: int,
    padding_max: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stem_lengths, "STEP", 4)
    monkeypatch.setattr(stem_lengths, "SHORTEST", 8)
    monkeypatch.setattr(stem_lengths, "ALONE", 16)
    live_through(
        Random(seed), sharing(), sharing_alone, lambda: opened(model, prefix_bytes, padding_max)
    )


def live_through(random: Random, wanted: Any, alone: Any, opened: Callable[[], Any]) -> None:
    tokens: dict[str, list[int]] = {name: [] for name in wanted}
    texts = dict.fromkeys(wanted, "")
    outside, finished = set(wanted), set[str]()
    batch = opened()
    while len(finished) < len(wanted):
        inside = sorted(set(wanted) - outside - finished)
        leaving = {name for name in inside if random.random() < 0.1}
        outside |= leaving
        coming = {name for name in sorted(outside) if random.random() < 0.5}
        outside -= coming
        done = turn(
            batch,
            *(
                msgspec.structs.replace(wanted[name], produced=tuple(tokens[name]))
                for name in sorted(coming)
            ),
            remove=leaving,
            prefill_tokens=random.choice([0, 3, 30, 300]),
        )
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
            texts[output.request_id] += output.text
            if output.finish:
                finished.add(output.request_id)
        assert set(done.residents) == set(wanted) - outside - finished
        if random.random() < 0.05:
            batch = opened()
            outside = set(wanted) - finished
    assert tokens == {name: of.tokens for name, of in alone.items()}
    assert texts == {name: of.text for name, of in alone.items()}


def test_sixteen_rows_of_unequal_length_get_the_tokens_that_each_gets_alone(batch: Any) -> None:
    admits = [
        admit(str(n), range(3 + n, 4 + 5 * n), max_tokens=8, temperature=n % 2, seed=n)
        for n in range(16)
    ]
    together = run(batch, *admits, prefill_tokens=50)
    for one in admits:
        assert together[one.request_id].tokens == run(batch, one)[one.request_id].tokens


def together(batch: Any) -> list[list[str]]:
    """The ids of those that decode together."""
    return [[row.request_id for row in each.rows] for each in batch._decodings]


def test_rows_decode_together_while_their_padding_is_small(model: Any) -> None:
    """And apart beyond that: a long one neither slows the short ones nor takes memory for each."""
    batch = opened(model, 0, padding_max=100)
    turn(batch, *(admit(name, range(3, 23), max_tokens=40) for name in "abc"))
    turn(batch, admit("long", range(3, 100), max_tokens=40))
    assert together(batch) == [["a", "b", "c"], ["long"]]
    turn(batch, admit("alike", range(3, 33), max_tokens=40))
    assert [sorted(each) for each in together(batch)] == [["a", "alike", "b", "c"], ["long"]]
    rows_and_columns = [
        sum(layer.keys.shape[0] * layer.size() for layer in each.caches) // LAYERS
        for each in batch._decodings
    ]
    assert sum(rows_and_columns) < 4 * 40 + 110


def test_rows_come_together_when_what_kept_them_apart_has_left(model: Any) -> None:
    batch = opened(model, 0, padding_max=100)
    turn(batch, *(admit(name, range(3, 23), max_tokens=40) for name in "abc"))
    turn(batch, admit("long", range(3, 100), max_tokens=40))
    turn(batch, remove=("a", "b"))
    assert together(batch) == [["c", "long"]]
    turn(batch, remove=("c", "long"))
    assert not batch._decodings
    assert not batch.residents


def test_prompts_that_are_ready_at_once_begin_in_sets_of_similar_length(model: Any) -> None:
    batch = opened(model, 0, padding_max=30)
    lengths = (5, 90, 10, 80, 12)
    turn(batch, *(admit(str(n), range(3, 3 + n), max_tokens=40) for n in lengths))
    assert together(batch) == [["5", "10", "12"], ["80", "90"]]


def test_a_model_with_a_sliding_window_batches_too(tmp_path: Any) -> None:
    """Its caches rotate: the chunks of a prompt and the rows of a batch meet them differently."""
    folder = write_tiny_model(tmp_path / "sliding")
    config = json.loads((folder / "config.json").read_text())
    config |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config))
    sliding = load(str(folder), None, lambda *_: None)
    admits = [admit(str(n), prompt, max_tokens=30) for n, prompt in enumerate(PROMPTS)]
    alone = [run(open_batch(sliding, 0), one)[one.request_id].tokens for one in admits]
    for prefix_bytes in (0, 2**20):
        batch = open_batch(sliding, prefix_bytes)
        for _ in range(2):
            together = run(batch, *admits, prefill_tokens=30)
            assert [together[one.request_id].tokens for one in admits] == alone


# --- what each parameter does ---------------------------------------------------------------


def test_another_seed_draws_other_tokens_and_the_same_seed_the_same(alone: Any, batch: Any) -> None:
    one = run_one(batch, temperature=1.0, seed=1)
    assert run_one(batch, temperature=1.0, seed=1).tokens == one.tokens
    assert run_one(batch, temperature=1.0, seed=2).tokens != one.tokens


def test_seeds_up_to_the_largest_are_taken(batch: Any) -> None:
    largest = run_one(batch, temperature=1.0, seed=2**53 - 1)
    assert largest.tokens != run_one(batch, temperature=1.0, seed=2**53 - 2).tokens


def test_a_tiny_temperature_is_greedy(batch: Any, alone: Any) -> None:
    assert run_one(batch, PROMPTS[0], temperature=1e-9).tokens == alone["greedy"].tokens


@pytest.mark.parametrize("filter_", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_filter_that_keeps_one_token_is_greedy(batch: Any, filter_: Any) -> None:
    """At a temperature that would otherwise choose wildly."""
    greedy = run_one(batch).tokens
    assert run_one(batch, temperature=2.0, seed=3, **filter_).tokens == greedy


def test_top_k_draws_among_the_k_likeliest(batch: Any) -> None:
    of = run_one(
        batch, max_tokens=60, temperature=2.0, seed=5, top_k=3, logprobs=True, top_logprobs=3,
        logit_bias=(),
    )  # fmt: skip
    ranks = set()
    for one in of.logprobs:
        values = [value for _, value in one.top]
        assert one.logprob >= min(values) - 1e-5
        ranks.add(min(range(3), key=lambda i: abs(values[i] - one.logprob)))
    assert len(ranks) > 1


def test_top_p_and_min_p_keep_what_their_definition_keeps(model: Any) -> None:
    """Against the plain definition, with thousands of draws from one distribution."""
    logits = mx.array([[math.log(p) for p in (0.5, 0.25, 0.15, 0.06, 0.04)]])

    def drawn(**settings: Any) -> Any:
        seen = set()
        for seed in range(300):
            row = SimpleNamespace(
                sampling=sampling(temperature=1.0, seed=seed, logit_bias=(), **settings),
                prompt_length=1,
            )
            tokens, _ = Plan([row], [[0]], 5).draw(logits, mx.array([0]), [[0]])
            seen.add(tokens.item())
        return seen

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_p=0.7) == {0, 1}
    assert drawn(top_p=0.8) == {0, 1, 2}
    assert drawn(min_p=0.29) == {0, 1, 2}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_k=2, top_p=0.6) == {0}


def test_a_top_k_beyond_the_vocabulary_keeps_every_token(batch: Any) -> None:
    free = run_one(batch, temperature=1.0, seed=3, top_p=0.999)
    assert run_one(batch, temperature=1.0, seed=3, top_p=0.999, top_k=10**6).tokens == free.tokens


def test_a_logit_bias_forces_and_forbids(batch: Any) -> None:
    assert set(run_one(batch, logit_bias=((100, 100.0),)).tokens) == {100}
    greedy = run_one(batch).tokens
    assert greedy[0] not in run_one(batch, logit_bias=(*NO_END, (greedy[0], -100.0))).tokens


def test_penalties_work_against_repetition(batch: Any) -> None:
    """With one token far ahead of all others, and a penalty that must push it back."""
    ahead = {"logit_bias": (*NO_END, (100, 30.0))}
    assert set(run_one(batch, **ahead).tokens) == {100}
    for penalty in (
        {"presence_penalty": 60.0}, {"frequency_penalty": 60.0}, {"repetition_penalty": 50.0},
    ):  # fmt: skip
        tokens = run_one(batch, **ahead, **penalty).tokens
        assert tokens.count(100) == 1, penalty


def test_only_the_repetition_penalty_looks_at_the_prompt(batch: Any) -> None:
    ahead = {"logit_bias": (*NO_END, (100, 30.0)), "max_tokens": 1}
    prompt = (100, 5)
    for penalty, first in (
        ({"presence_penalty": 60.0}, {100}),
        ({"frequency_penalty": 60.0}, {100}),
        ({"repetition_penalty": 50.0}, set()),
    ):
        assert set(run_one(batch, prompt, **ahead, **penalty).tokens) & {100} == first
    # The prompt's last token enters by another way than the others.
    assert run_one(batch, (5, 100), **ahead, presence_penalty=60.0).tokens == [100]
    assert run_one(batch, (5, 100), **ahead, repetition_penalty=50.0).tokens != [100]


def test_log_probabilities_are_the_models_own(batch: Any, model: Any) -> None:
    of = run_one(batch, logprobs=True, top_logprobs=4, max_tokens=3, temperature=1.0, seed=4)
    logits = model.module(mx.array([[*PROMPTS[1], *of.tokens]]))[0]
    normal = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for n, (token, one) in enumerate(zip(of.tokens, of.logprobs, strict=True)):
        row = normal[len(PROMPTS[1]) - 1 + n]
        assert one.logprob == pytest.approx(row[token].item(), abs=1e-3)
        best = sorted(row.tolist(), reverse=True)[:4]
        assert [value for _, value in one.top] == pytest.approx(best, abs=1e-3)


def test_log_probabilities_come_only_to_those_who_asked(batch: Any) -> None:
    runs = run(
        batch,
        admit("none"),
        admit("some", logprobs=True),
        admit("more", logprobs=True, top_logprobs=5),
        admit("fewer", logprobs=True, top_logprobs=2),
    )
    assert set(runs["none"].logprobs) == {None}
    for name, top in (("some", 0), ("more", 5), ("fewer", 2)):
        assert {len(one.top) for one in runs[name].logprobs} == {top}
    assert runs["more"].logprobs[0].top[:2] == runs["fewer"].logprobs[0].top
    assert runs["more"].logprobs[0].logprob == runs["more"].logprobs[0].top[0][1]


# --- how an answer ends ---------------------------------------------------------------------


def test_an_answer_has_exactly_max_tokens(batch: Any) -> None:
    for max_tokens in (1, 2, 9):
        of = run_one(batch, max_tokens=max_tokens)
        assert len(of.tokens) == max_tokens
        assert of.finish == "length"


def test_max_tokens_counts_what_was_produced_before(batch: Any) -> None:
    assert len(run_one(batch, produced=(9, 9, 9), max_tokens=5).tokens) == 2


def test_the_end_token_stops_the_answer_and_shows_nothing(batch: Any) -> None:
    of = run_one(batch, logit_bias=((END, 100.0),))
    assert (of.tokens, of.text, of.finish) == ([END], "", "stop")


def test_a_stop_string_across_tokens_ends_the_answer_without_it(batch: Any) -> None:
    x, y = byte_token(ord("x")), byte_token(ord("y"))
    bias = {"logit_bias": ((x, 100.0), (y, 100.0)), "temperature": 2.0, "max_tokens": 200}
    free = run_one(batch, seed=6, **bias)
    assert set(free.text) == {"x", "y"}
    at = free.text.index("xyxy")
    stopped = run_one(batch, seed=6, stop=("zz", "xyxy"), **bias)
    assert stopped.finish == "stop"
    assert stopped.text == free.text[:at]
    assert len(stopped.tokens) == at + 4
    back = run_one(batch, seed=6, stop=("xyxy",), produced=stopped.tokens[: at + 2], **bias)
    assert (back.text, len(back.tokens), back.finish) == ("", 2, "stop")


def test_what_only_began_like_a_stop_string_is_shown_at_the_end(batch: Any) -> None:
    x = byte_token(ord("x"))
    of = run_one(batch, logit_bias=((x, 100.0),), stop=("x" * 20,), max_tokens=5)
    assert (of.text, of.finish) == ("xxxxx", "length")
    assert of.texts[:4] == [""] * 4


def test_characters_of_several_tokens_come_whole(batch: Any) -> None:
    bias = tuple((byte_token(byte), 100.0) for byte in "\U0001f600".encode())
    of = run_one(batch, logit_bias=bias, temperature=2.0, seed=1, max_tokens=300)
    of_bytes = {token: byte for byte in range(256) if (token := byte_token(byte))}
    raw = bytes(of_bytes[token] for token in of.tokens)
    assert of.text == raw.decode("utf-8", "replace")
    assert any(ord(character) > 0xFFFF for character in of.text)


def test_a_stop_string_after_characters_of_several_tokens_with_log_probabilities(
    batch: Any,
) -> None:
    """Every token has its log-probability, also those whose text is held back or empty."""
    bias = tuple((byte_token(byte), 100.0) for byte in "\U0001f600".encode())
    settings = {"logit_bias": bias, "temperature": 2.0, "seed": 1, "max_tokens": 300}
    free = run_one(batch, **settings).text
    face = next(character for character in free if ord(character) > 0xFFFF)
    of = run_one(batch, stop=(face,), logprobs=True, top_logprobs=1, **settings)
    assert of.finish == "stop"
    assert of.text == free[: free.index(face)]
    assert of.tokens[-4:] == [byte_token(byte) for byte in face.encode()]
    assert len(of.logprobs) == len(of.tokens)
    assert all(one is not None and len(one.top) == 1 for one in of.logprobs)


# --- who is in the batch --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_no_turn_computes_more_prompt_tokens_than_asked(batch: Any, chunk: Any) -> None:
    admits = [admit(str(n), prompt, max_tokens=3) for n, prompt in enumerate(PROMPTS)]
    done = turn(batch, *admits, prefill_tokens=chunk)
    total = 0
    progress: dict[str, int] = {}
    while True:
        assert done.prefill_tokens <= chunk
        step = 0
        for prefill in done.prefills:
            step += prefill.done - progress.get(prefill.request_id, 0)
            progress[prefill.request_id] = prefill.done
            assert prefill.total == len(PROMPTS[int(prefill.request_id)])
            assert prefill.cached == 0
        assert step == done.prefill_tokens
        total += done.prefill_tokens
        if not done.residents:
            break
        done = turn(batch, prefill_tokens=chunk)
    assert total == sum(len(prompt) for prompt in PROMPTS)


def test_rows_decode_while_another_prefills(batch: Any) -> None:
    turn(batch, admit("decodes", max_tokens=30))
    done = turn(batch, admit("prefills", PROMPTS[5]), prefill_tokens=8)
    for _ in range(5):
        assert [output.request_id for output in done.outputs] == ["decodes"]
        assert [prefill.request_id for prefill in done.prefills] == ["prefills"]
        done = turn(batch, prefill_tokens=8)


def test_without_prefill_the_newcomers_wait(batch: Any) -> None:
    done = turn(batch, admit("waits"), prefill_tokens=0)
    assert (done.prefill_tokens, done.prefills, done.residents) == (0, (), {"waits"})


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding"])
def test_a_sequence_can_leave_in_every_stage_and_the_others_are_unharmed(
    batch: Any, alone: Any, stage: Any
) -> None:
    others = [admit("greedy", PROMPTS[0]), admit("seeded", PROMPTS[1], **MIXED["seeded"])]
    tokens = defaultdict(list)

    def note(done: Any) -> Any:
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
        return done

    leaver = admit("leaves", PROMPTS[5])
    note(turn(batch, *others))
    chunk = {"waiting": 0, "prefilling": 8, "decoding": 512}[stage]
    note(turn(batch, leaver, prefill_tokens=chunk))
    note(turn(batch, prefill_tokens=chunk))
    assert bool(tokens.pop("leaves", None)) == (stage == "decoding")
    done = note(turn(batch, remove=["leaves", "never was here"]))
    assert set(done.residents) == {"greedy", "seeded"}
    while done.residents:
        done = note(turn(batch))
    assert tokens == {name: alone[name].tokens for name in ("greedy", "seeded")}


def test_an_id_may_come_back_in_the_turn_that_removes_it(batch: Any) -> None:
    whole = run_one(batch).tokens
    got = tokens_of(turn(batch, admit("one")))
    done = turn(batch, admit("one", produced=got), remove=["one"])
    got += tokens_of(done)
    while done.residents:
        done = turn(batch)
        got += tokens_of(done)
    assert got == whole


def test_residents_are_those_who_came_and_have_not_left(batch: Any) -> None:
    admits = [admit(str(n), prompt, max_tokens=n + 1) for n, prompt in enumerate(PROMPTS)]
    expected = {one.request_id for one in admits}
    done = turn(batch, *admits, prefill_tokens=16)
    while True:
        expected -= {output.request_id for output in done.outputs if output.finish}
        assert set(done.residents) == expected
        assert len(batch.residents) == len(expected)
        if not expected:
            break
        done = turn(batch, prefill_tokens=16)


def test_the_report_has_the_allocators_numbers_and_the_time(batch: Any) -> None:
    done = turn(batch, admit("one"))
    assert done.memory.active > 0
    assert done.memory.cache >= 0
    assert 0 < done.seconds < 60


# --- failures that name their sequence ------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (5, 512)}, "512"),
        ({"prompt": (-1,)}, "-1"),
        ({"logit_bias": ((10**6, 1.0),)}, "logit_bias: token 1000000 is not one of"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias: token -1 is not one of"),
        ({"produced": (7,) * 12}, "max_tokens"),
    ],
)
def test_a_sequence_that_cannot_be_computed_fails_alone(
    batch: Any, alone: Any, bad: Any, said: Any
) -> None:
    runs = run(batch, admit("bad", **bad), admit("greedy", PROMPTS[0]))
    assert said in runs["bad"].failure
    assert runs["bad"].tokens == []
    assert runs["greedy"].tokens == alone["greedy"].tokens


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_failure_while_handing_out_fails_only_that_sequence(
    model: Any, alone: Any, fails_at: Any
) -> None:
    batch = open_batch(model, 0)
    tokens = tokens_of(turn(batch, admit("bad"), admit("greedy", PROMPTS[0])), "greedy")
    for step in range(1, 12):
        if step == fails_at:
            rows: Any = (row for each in batch._decodings for row in each.rows)
            next(row for row in rows if row.request_id == "bad").answer = None
        done = turn(batch)
        tokens += tokens_of(done, "greedy")
        assert ("bad" in done.residents) == (step < fails_at)
        assert [f.request_id for f in done.failures] == (["bad"] if step == fails_at else [])
    assert tokens == alone["greedy"].tokens


def test_admitting_an_id_twice_is_a_mistake_of_the_worker(batch: Any) -> None:
    turn(batch, admit("one"))
    with pytest.raises(ValueError, match="already"):
        turn(batch, admit("one"))


# --- prefixes -------------------------------------------------------------------------------


def test_a_common_prefix_is_computed_once(model: Any, batch: Any) -> None:
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    first, second = (*shared, 200, 201), (*shared, 300, 301, 302)
    expected = [run_one(batch, prompt).tokens for prompt in (first, second, first)]
    got = []
    for prompt, hit in ((first, 0), (second, 100), (first, 101)):
        done = turn(cached, admit("one", prompt))
        (prefill,) = done.prefills
        assert (prefill.cached, prefill.done, prefill.total) == (hit, len(prompt), len(prompt))
        assert done.prefill_tokens == len(prompt) - hit
        tokens = tokens_of(done)
        while done.residents:
            done = turn(cached)
            tokens += tokens_of(done)
        got.append(tokens)
    assert got == expected


def test_a_sequence_that_was_removed_comes_back_without_computing_again(
    model: Any, alone: Any
) -> None:
    cached = open_batch(model, 2**20)
    one = admit("one", PROMPTS[2], **MIXED["seeded"])
    tokens = tokens_of(turn(cached, one))
    for _ in range(5):
        tokens += tokens_of(turn(cached))
    done = turn(cached, remove=["one"])
    assert not done.residents
    done = turn(cached, msgspec.structs.replace(one, produced=tuple(tokens)))
    assert done.prefill_tokens == 1
    tokens += tokens_of(done)
    while done.residents:
        done = turn(cached)
        tokens += tokens_of(done)
    assert tokens == run_one(open_batch(model, 0), PROMPTS[2], **MIXED["seeded"]).tokens


def test_one_that_leaves_while_it_prefills_comes_back_to_what_was_computed(model: Any) -> None:
    cached = open_batch(model, 2**20)
    turn(cached, admit("one", PROMPTS[5]), prefill_tokens=50)
    turn(cached, remove=["one"])
    done = turn(cached, admit("one", PROMPTS[5]))
    assert [prefill.cached for prefill in done.prefills] == [50]
    assert done.prefill_tokens == len(PROMPTS[5]) - 50


def test_one_that_leaves_before_anything_of_it_was_computed_leaves_nothing(model: Any) -> None:
    """Its turn to be computed came when the turn's bound was spent."""
    cached = open_batch(model, 2**20)
    turn(cached, admit("first", PROMPTS[3]), admit("later", PROMPTS[5]), prefill_tokens=30)
    assert turn(cached, remove=["later"], prefill_tokens=0).residents == {"first"}
    assert nbytes(cached) == 0


def test_a_prefix_serves_the_next_prompt_of_the_same_turn(model: Any) -> None:
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    one, other = admit("one", (*shared, 200), max_tokens=5), admit("two", (*shared, 300, 301))
    done = turn(cached, one, other)
    assert [prefill.cached for prefill in done.prefills] == [0, 100]
    tokens = {name: tokens_of(done, name) for name in ("one", "two")}
    while done.residents:
        done = turn(cached)
        for name in tokens:
            tokens[name] += tokens_of(done, name)
    plain = run(open_batch(model, 0), one, other)
    assert tokens == {name: of.tokens for name, of in plain.items()}


def test_a_running_row_lends_its_beginning_and_nothing_is_kept_before(model: Any) -> None:
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    one = admit("one", (*shared, 200), max_tokens=40)
    tokens = defaultdict(list)

    def take(done: Any) -> Any:
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
        return done

    take(turn(cached, one))
    for _ in range(5):
        take(turn(cached))
    assert nbytes(cached) == 0, "a copy for nobody would take the memory twice"
    others = [admit(name, (*shared, 300, n)) for n, name in enumerate("ab", 301)]
    done = take(turn(cached, *others))
    assert [(p.request_id, p.cached) for p in done.prefills] == [("a", 100), ("b", 100)]
    kept = nbytes(cached)
    assert 0 < kept <= 100 * model.cache_bytes_per_token
    while done.residents:
        done = take(turn(cached))
    plain = run(open_batch(model, 0), one, *others)
    assert tokens == {name: of.tokens for name, of in plain.items()}


def test_answers_that_differ_only_at_their_ends_are_not_all_kept(model: Any) -> None:
    """Each would take the memory of the whole; one that goes on from what is kept replaces it."""
    cached = open_batch(model, 2**22)
    shared = tuple(range(10, 210))
    run_one(cached, (*shared, 300), max_tokens=5)
    one = nbytes(cached)
    run(cached, *(admit(str(n), (*shared, 301 + n), max_tokens=5) for n in range(6)))
    assert nbytes(cached) == one
    run_one(cached, (*shared, *range(400, 460)), max_tokens=5)
    assert nbytes(cached) > 2 * one, "a quarter of it was new"
    again = turn(cached, admit("again", (*shared, *range(400, 460), 5)))
    assert [prefill.cached for prefill in again.prefills] == [260]


class Watched:
    """A model, and the shapes of what went through it."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, tokens: Any, **others: Any) -> Any:
        self.shapes.append(tokens.shape)
        return self._module(tokens, **others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def test_the_ends_of_alike_prompts_are_computed_in_one_call(model: Any) -> None:
    """A call reads the weights; a row that is short of the widest computes a little again."""
    cached = open_batch(model, 2**20)
    shared = tuple(range(10, 110))
    run_one(cached, (*shared, 200), max_tokens=1)
    cached._model = watched = Watched(model.module)
    admits = [admit(str(n), (*shared, *range(300, 302 + 3 * n))) for n in range(4)]
    done = turn(cached, *admits)
    assert watched.shapes == [(4, 10), (4, 1), (4, 1)]
    assert done.prefill_tokens == 2 + 5 + 8 + 11
    tokens = {one.request_id: tokens_of(done, one.request_id) for one in admits}
    while done.residents:
        done = turn(cached)
        for name in tokens:
            tokens[name] += tokens_of(done, name)
    for one in admits:
        assert tokens[one.request_id] == run(open_batch(model, 0), one)[one.request_id].tokens


def test_who_comes_makes_the_first_step_with_all_others(batch: Any, model: Any) -> None:
    """A step of their own would read the weights once more; the turn has two steps for all."""
    old = admit("old", PROMPTS[1])
    done = turn(batch, old)
    tokens = {"old": tokens_of(done, "old")}
    batch._model = watched = Watched(model.module)
    for each in batch._decodings:
        each._model = watched
    done = turn(batch, admit("new", PROMPTS[3]), admit("other", PROMPTS[3]))
    assert watched.shapes == [(2, 16), (3, 1), (3, 1)]
    counts = {name: len(tokens_of(done, name)) for name in ("old", "new", "other")}
    assert counts == {"old": 2, "new": 1, "other": 1}
    while True:
        tokens["old"] += tokens_of(done, "old")
        if not done.residents:
            break
        done = turn(batch)
    assert tokens["old"] == run(open_batch(model, 0), old)["old"].tokens


def test_prewarming_computes_a_prompt_as_well(batch: Any, model: Any) -> None:
    batch._model = watched = Watched(model.module)
    prewarm(batch, model, "Hello", 2)
    assert [shape for shape in watched.shapes if shape[1] > 1] == [(1, 64)]
    watched.shapes.clear()
    prewarm(batch, replace(model, context_length=20), "Hello", 2)
    assert [shape for shape in watched.shapes if shape[1] > 1] == [(1, 17)]
    assert not batch.residents


def test_prompts_of_very_different_lengths_are_computed_apart(batch: Any, model: Any) -> None:
    batch._model = watched = Watched(model.module)
    turn(batch, admit("long", PROMPTS[5]), admit("short", PROMPTS[1]), admit("other", PROMPTS[3]))
    assert [shape for shape in watched.shapes if shape[1] > 1] == [(1, 79), (2, 16)]


@pytest.mark.parametrize(
    ("budget", "shapes"),
    [
        (30, [(1, 16)]),
        (60, [(1, 16)]),
        (17 + 2 * CALL_TOKENS, [(1, 16), (1, CALL_TOKENS)]),
        (17 + CALL_TOKENS + 80, [(1, 16), (1, 79)]),
    ],
)
def test_a_further_call_of_the_model_is_paid_from_the_turns_bound(
    batch: Any, model: Any, budget: int, shapes: Any
) -> None:
    """Each reads the weights: a few tokens more of another prompt are not worth one."""
    batch._model = watched = Watched(model.module)
    short, long = admit("short", PROMPTS[3]), admit("long", PROMPTS[5])
    done = turn(batch, short, long, prefill_tokens=budget)
    assert [shape for shape in watched.shapes if shape[1] > 1] == shapes
    assert done.prefill_calls == len(shapes)
    assert 0 < done.prefill_seconds < done.seconds
    first: list[int] = []
    while not (first := tokens_of(done, "long")):
        done = turn(batch, prefill_tokens=budget)
    assert first[0] == run(open_batch(model, 0), long)["long"].tokens[0]


@pytest.mark.parametrize("budget", [20, 33, 47, 64, 100])
def test_padding_counts_against_the_turns_bound(batch: Any, model: Any, budget: int) -> None:
    batch._model = watched = Watched(model.module)
    admits = [admit(str(n), range(3, 6 + 7 * n)) for n in range(6)]
    done = turn(batch, *admits, prefill_tokens=budget)
    together = False
    while True:
        prefilled = [shape for shape in watched.shapes if shape[1] > 1]
        together = together or any(rows > 1 for rows, _ in prefilled)
        assert sum(rows * width for rows, width in prefilled) <= budget
        watched.shapes.clear()
        if not done.residents:
            break
        done = turn(batch, prefill_tokens=budget)
    assert together


def segments(batch: Any) -> list[list[tuple[int, int]]]:
    """Of each set of rows that decode together: how many rows begin with a stem of what length."""
    return [
        [(rows, 0 if stem is None else stem[0].shape[2]) for rows, stem in each.caches[0].shared()]
        for each in batch._decodings
    ]


LONG = tuple(range(10, 310))


def test_rows_that_begin_alike_hold_it_once(model: Any) -> None:
    """Whether they come together or one after the other."""
    cached = open_batch(model, 2**22)
    admits = [
        admit(name, (*LONG, *range(400 + 9 * n, 403 + 10 * n))) for n, name in enumerate("abcdef")
    ]
    tokens: dict[str, list[int]] = {name: [] for name in "abcdef"}

    def take(done: Any) -> Any:
        for output in done.outputs:
            tokens[output.request_id].append(output.token)
        return done

    take(turn(cached, *admits[:3]))
    take(turn(cached))
    before = mx.get_active_memory()
    for one in admits[3:]:
        done = take(turn(cached, one))
        assert [prefill.cached for prefill in done.prefills] == [300]
    grown = mx.get_active_memory() - before
    assert grown < 3 * 300 * model.cache_bytes_per_token, "only the room that every row has"
    assert segments(cached) == [[(6, 288)]]
    take(turn(cached, remove=["b", "e"]))
    assert segments(cached) == [[(4, 288)]]
    while done.residents:
        done = take(turn(cached))
    for one in admits:
        name = one.request_id
        whole = run(open_batch(model, 0), one)[name].tokens
        assert tokens[name] == (whole[: len(tokens[name])] if name in "be" else whole)


def test_a_long_prompt_decodes_with_short_ones_and_makes_none_of_them_long(model: Any) -> None:
    batch = opened(model, 0, padding_max=100)
    short = [admit(name, range(3, 23), max_tokens=40) for name in "abc"]
    long = admit("long", (*LONG, *LONG, *LONG, *LONG[:200]), max_tokens=20)
    turn(batch, *short, prefill_tokens=100)
    done = turn(batch, long, prefill_tokens=600)
    assert done.prefill_tokens == 600
    assert len(done.prefills) == 1
    done = turn(batch, prefill_tokens=600)
    assert done.prefill_tokens == 500
    assert [sorted(each) for each in segments(batch)] == [[(1, 1088), (3, 0)]]
    tokens = tokens_of(done, "long")
    while "long" in done.residents:
        done = turn(batch)
        tokens += tokens_of(done, "long")
    assert tokens == run(open_batch(model, 0), long)["long"].tokens


def test_what_a_running_row_begins_with_need_not_be_kept_to_be_shared(model: Any) -> None:
    cached = open_batch(model, 200 * model.cache_bytes_per_token)
    much = LONG * 4
    one = admit("one", (*much, 400), max_tokens=40)
    turn(cached, one, prefill_tokens=1190)
    done = turn(cached)
    tokens = tokens_of(done)
    done = turn(cached, admit("two", (*much, 401), max_tokens=3))
    assert [prefill.cached for prefill in done.prefills] == [1184]
    assert nbytes(cached) == 0
    assert segments(cached) == [[(2, 1184)]]
    tokens += tokens_of(done)
    while done.residents:
        done = turn(cached)
        tokens += tokens_of(done)
    assert tokens == run(open_batch(model, 0), one)["one"].tokens


def test_a_long_prompt_is_kept_without_copying_it(model: Any) -> None:
    cached = open_batch(model, 2**22)
    turn(cached, admit("one", LONG * 4, max_tokens=3), prefill_tokens=1300)
    before = mx.get_active_memory()
    while turn(cached).residents:
        pass
    assert nbytes(cached) == 1184 * model.cache_bytes_per_token
    assert mx.get_active_memory() <= before
    done = turn(cached, admit("again", (*LONG, *LONG, *LONG, *LONG, 5)))
    assert [prefill.cached for prefill in done.prefills] == [1184]


def test_a_short_beginning_does_not_hold_on_to_a_long_conversation(model: Any) -> None:
    cached = open_batch(model, 2**22)
    run_one(cached, (*LONG, *range(400, 500), *LONG), max_tokens=2)
    for name in "ab":
        done = turn(cached, admit(name, (*LONG, 501), max_tokens=20))
        assert [prefill.cached for prefill in done.prefills] == [300]
    assert segments(cached) == [[(2, 288)]]
    kept, before = nbytes(cached), mx.get_active_memory()
    turn(cached, trim=True)
    assert before - mx.get_active_memory() > 0.9 * kept


@pytest.mark.parametrize("other", ["16 bits", "a window", "mlx-lm's attention"])
def test_nothing_is_shared_where_attention_does_not_look_for_it(
    model: Any, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_share(model.module)
    if other == "16 bits":
        name, attention = "scaled_dot_product_attention", llama.scaled_dot_product_attention
        monkeypatch.setattr(
            llama, name, lambda q, k, v, **rest: attention(q.astype(mx.float16), k, v, **rest)
        )
    elif other == "a window":
        masks = llama.create_attention_mask
        monkeypatch.setattr(
            llama, "create_attention_mask", lambda h, cache: masks(h, cache, window_size=8)
        )
    else:
        monkeypatch.setattr(
            llama, "scaled_dot_product_attention", base.scaled_dot_product_attention
        )
    assert not can_share(model.module)


def test_trimming_gives_back_what_is_kept_for_reuse(model: Any, alone: Any) -> None:
    """And nothing else: who decodes goes on, and who leaves in this turn is not kept either."""
    cached = open_batch(model, 2**20)
    run_one(cached, PROMPTS[5])
    done = turn(cached, admit("greedy", PROMPTS[0]), admit("leaves", PROMPTS[2]))
    assert nbytes(cached) > 0
    tokens = tokens_of(done, "greedy")
    done = turn(cached, remove=["leaves"], trim=True)
    assert nbytes(cached) == 0
    tokens += tokens_of(done, "greedy")
    done = turn(cached, admit("again", PROMPTS[5], max_tokens=1))
    assert [prefill.cached for prefill in done.prefills] == [0]
    while True:
        tokens += [o.token for o in done.outputs if o.request_id == "greedy"]
        if not done.residents:
            break
        done = turn(cached)
    assert tokens == alone["greedy"].tokens


def nbytes(batch: Any) -> int:
    return int(batch._beginnings.nbytes)


def test_the_prefixes_stay_within_their_bytes(model: Any) -> None:
    per_token = model.cache_bytes_per_token
    cached = open_batch(model, per_token * 130)
    for start in range(3, 10):
        run_one(cached, tuple(range(start, start + 60)), max_tokens=2)
        assert 0 < nbytes(cached) <= per_token * 130


# --- what is known of the model -------------------------------------------------------------


def test_the_models_numbers_come_from_its_architecture(model: Any) -> None:
    assert model.context_length == CONTEXT
    assert model.cache_bytes_per_token == 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 4
    assert model.name == "tiny"
    assert model.device.startswith("cpu float32") or "cpu" not in model.device
