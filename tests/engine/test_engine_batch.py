"""Who is in the batch, and what a turn reports."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from support.batches import (
    MIXED,
    PROMPTS,
    admit,
    run,
    run_one,
    tokens_of,
    turn,
)
from support.tiny_model import (
    CONTEXT,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
)

from trio_worker.engine.serve import open_batch

pytestmark = pytest.mark.mlx


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


def test_the_models_numbers_come_from_its_architecture(model: Any) -> None:
    assert model.context_length == CONTEXT
    assert model.cache_bytes_per_token == 2 * LAYERS * KV_HEADS * (HIDDEN // HEADS) * 4
    assert model.name == "tiny"
    assert model.device.startswith("cpu float32") or "cpu" not in model.device
