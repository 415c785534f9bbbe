"""Rows that begin alike hold it once."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import base, llama
from support.batches import (
    admit,
    nbytes,
    opened,
    run,
    run_one,
    segments,
    tokens_of,
    turn,
)

from trio_worker.engine.caches import can_share
from trio_worker.engine.serve import open_batch

pytestmark = pytest.mark.mlx


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
    # What is made once for all, such as the tables of rotary positions, is not counted.
    run(open_batch(model, 2**22), admit("once", LONG * 4, max_tokens=3))
    gc.collect()
    cached = open_batch(model, 2**22)
    turn(cached, admit("one", LONG * 4, max_tokens=3), prefill_tokens=1300)
    # A step in flight, also one that nobody waits for any more, has memory of its own.
    mx.synchronize()
    before = mx.get_active_memory()
    while turn(cached).residents:
        pass
    mx.synchronize()
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
