"""The same tokens for a row, whoever else decodes with it, comes or goes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from support.batches import (
    PROMPTS,
    admit,
    mixed,
    opened,
    run,
    run_one,
    together,
    turn,
)
from support.tiny_model import (
    LAYERS,
    write_tiny_model,
)

from trio_worker.engine import stem_lengths
from trio_worker.engine.models.load import load
from trio_worker.engine.serve import open_batch

pytestmark = pytest.mark.mlx


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
