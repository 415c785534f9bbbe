"""The cache of rows that come and go, against a plain list for each row."""

from __future__ import annotations

from random import Random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from trio_worker.engine.caches import RowsCache, is_plain

pytestmark = pytest.mark.mlx

HEADS, WIDTH = 2, 3


def column(numbers: list[float]) -> mx.array:
    """Keys of one token for each row, every number of a row's the same."""
    return mx.broadcast_to(
        mx.array(numbers, dtype=mx.float32)[:, None, None, None], (len(numbers), HEADS, 1, WIDTH)
    )


def layer_of(numbers: list[float]) -> Any:
    layer = KVCache()
    for number in numbers:
        layer.update_and_fetch(column([number]), -column([number]))
    return layer


def check(cache: Any, rows: list[list[float]]) -> None:
    for i, numbers in enumerate(rows):
        row = cache.extract(i)
        assert row.size() == len(numbers)
        if numbers:
            assert row.keys[0, 1, :, 2].tolist() == numbers
            assert row.values[0, 0, :, 0].tolist() == [-number for number in numbers]
    padding = cache.left_padding.tolist()
    assert cache.offset.tolist() == [len(numbers) for numbers in rows]
    assert [cache.size() - p for p in padding] == [len(numbers) for numbers in rows]
    if not any(padding) and len(rows) == 1:
        assert cache.make_mask(1) is None
        assert cache.make_mask(5) == "causal"
    if any(padding):
        hidden = cache.make_mask(1)[:, 0, 0].tolist()
        assert [row.index(True) for row in hidden] == padding


@pytest.mark.parametrize("seed", range(12))
def test_rows_keep_their_tokens_whoever_comes_and_goes(seed: int) -> None:
    random, numbers = Random(seed), iter(range(1, 10**6))

    def drawn(longest: int) -> list[float]:
        return [float(next(numbers)) for _ in range(random.randint(1, longest))]

    def opened() -> tuple[Any, list[list[float]]]:
        longest = random.choice([3, 40, 300])
        rows = [drawn(longest) for _ in range(random.randint(1, 4))]
        held = [len(rows[0]), *(random.randint(0, len(row)) for row in rows[1:])]
        layers = [layer_of(row) for row in rows]
        cache = RowsCache.of(layers, held, [0 for _ in rows], room=random.randint(1, 300))
        return cache, [row[:count] for row, count in zip(rows, held, strict=True)]

    cache, rows = opened()
    for _ in range(25):
        action = random.choice(["token", "token", "extend", "filter"])
        if action == "token":
            for _ in range(random.choice([1, 1, 30])):
                tokens = [float(next(numbers)) for _ in rows]
                cache.update_and_fetch(column(tokens), -column(tokens))
                rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        elif action == "extend" and len(rows) < 8:
            other, more = opened()
            cache.extend(other)
            rows += more
        elif len(rows) > 1:
            keep = sorted(random.sample(range(len(rows)), random.randint(1, len(rows) - 1)))
            cache.filter(keep)
            rows = [rows[i] for i in keep]
        check(cache, rows)


def test_a_row_with_fewer_tokens_than_are_computed_begins_later() -> None:
    cache = RowsCache.of([layer_of([1.0, 2.0]), KVCache()], [2, 0], [0, 1], room=3)
    cache.update_and_fetch(
        mx.concatenate([column([3.0, 0.0]), column([4.0, 5.0])], axis=2),
        -mx.concatenate([column([3.0, 0.0]), column([4.0, 5.0])], axis=2),
    )
    check(cache, [[1.0, 2.0, 3.0, 4.0], [5.0]])


def test_after_rows_have_come_together_there_is_room_for_the_next_token() -> None:
    cache = RowsCache.of([layer_of([1.0] * 256), layer_of([2.0] * 256)], [256, 256], [0, 0], room=1)
    assert cache.keys.shape[2] > 256
    cache.extend(RowsCache.of([layer_of([3.0])], [1], [0], room=1))
    assert cache.keys.shape[:3] == (3, HEADS, 512)
    assert cache.make_mask(1) is not None


def test_only_plain_caches_are_taken() -> None:
    assert is_plain([KVCache(), KVCache()])
    assert not is_plain([KVCache(), RotatingKVCache(16)])
