"""The cache of rows that come and go, against a plain list for each row."""

from __future__ import annotations

from random import Random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from trio_worker.engine.caches import RowsCache, is_plain
from trio_worker.engine.shared_prefixes import Stem

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


def check(cache: Any, rows: list[list[float]], stems: Any = ()) -> None:
    stems = stems or [None] * len(rows)
    in_order = [stem for count, stem in cache.shared() for _ in range(count)]
    assert in_order == ([stem and stem.layers[0] for stem in stems] if any(stems) else [])
    for i, numbers in enumerate(rows):
        row = cache.extract(i)
        assert row.size() == len(numbers)
        if numbers:
            assert row.keys.shape == (1, HEADS, len(numbers), WIDTH)
            assert cache.beginning(i, 2).keys[0, 0, :, 0].tolist() == numbers[:2]
            assert row.keys[0, 1, :, 2].tolist() == numbers
            assert row.values[0, 0, :, 0].tolist() == [-number for number in numbers]
    padding = cache.left_padding.tolist()
    assert cache.offset.tolist() == [len(numbers) for numbers in rows]
    own = [len(numbers) - 3 * bool(stem) for numbers, stem in zip(rows, stems, strict=True)]
    assert [cache.size() - p for p in padding] == own
    if not any(padding) and len(rows) == 1:
        assert cache.make_mask(1) is None
        assert cache.make_mask(5) == "causal"
    if any(padding):
        hidden = cache.make_mask(1)[:, 0, 0].tolist()
        assert [row.index(True) for row in hidden] == padding


def stem_of_numbers(numbers: list[float]) -> Stem:
    layer = layer_of(numbers)
    return Stem(((layer.keys[..., : layer.offset, :], layer.values[..., : layer.offset, :]),), 3)


def adopted(cache: Any, rows: list[list[float]], stems: list[Stem | None]) -> list[Stem | None]:
    """The first row that can begins with a stem of its own."""
    for i, row in enumerate(rows):
        if len(row) >= 3 and stems[i] is None:
            stem = stem_of_numbers(row[:3])
            cache.adopt(i, stem)
            return [*stems[:i], stem, *stems[i + 1 :]]
    return stems


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("seed", range(12))
def test_rows_keep_their_tokens_whoever_comes_and_goes(seed: int, shared: int) -> None:
    random, numbers = Random(seed), iter(range(1, 10**6))

    def drawn(count: int) -> list[float]:
        return [float(next(numbers)) for _ in range(count)]

    beginnings: dict[Stem | None, list[float]] = {None: []}
    for _ in range(shared):
        beginning = drawn(3)
        beginnings[stem_of_numbers(beginning)] = beginning

    def opened() -> tuple[Any, list[list[float]], list[Stem | None]]:
        longest = random.choice([3, 40, 300])
        stems = random.choices(list(beginnings), k=random.randint(1, 4))
        rows = [[*beginnings[stem], *drawn(random.randint(1, longest))] for stem in stems]
        began = [len(beginnings[stem]) for stem in stems]
        held = [random.randint(n, len(row)) for n, row in zip(began, rows, strict=True)]
        held[0] = len(rows[0])
        layers = [layer_of(row) for row in rows]
        cache = RowsCache.of(
            layers,
            [count - before for count, before in zip(held, began, strict=True)],
            [0 for _ in rows],
            room=random.randint(1, 300),
            stems=stems,
        )
        return cache, [row[:count] for row, count in zip(rows, held, strict=True)], stems

    cache, rows, stems = opened()
    for _ in range(25):
        action = random.choice(["token", "token", "extend", "filter", "adopt"])
        if action == "token":
            for _ in range(random.choice([1, 1, 30])):
                tokens = [float(next(numbers)) for _ in rows]
                cache.update_and_fetch(column(tokens), -column(tokens))
                rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        elif action == "extend" and len(rows) < 8:
            other, more, theirs = opened()
            cache.extend(other)
            rows, stems = rows + more, stems + theirs
        elif action == "adopt" and shared:
            stems = adopted(cache, rows, stems)
        elif len(rows) > 1:
            keep = random.sample(range(len(rows)), random.randint(1, len(rows) - 1))
            cache.filter(keep)
            rows, stems = [rows[i] for i in keep], [stems[i] for i in keep]
        check(cache, rows, stems)


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


def test_short_rows_have_little_room_and_long_rows_grow_seldom() -> None:
    numbers = [[float(i), float(-i)] for i in range(600)]
    cache = RowsCache.of([layer_of([row]) for row in numbers[0]], [1, 1], [0, 0], room=1)
    rooms = [cache.keys.shape[2]]
    for row in numbers[1:]:
        cache.update_and_fetch(column(row), -column(row))
        rooms.append(cache.keys.shape[2])
    check(cache, [list(row) for row in zip(*numbers, strict=True)])
    assert sorted(set(rooms)) == [64, 128, 192, 256, 512, 768]
    assert all(room > size for size, room in enumerate(rooms))


def test_only_plain_caches_are_taken() -> None:
    assert is_plain([KVCache(), KVCache()])
    assert not is_plain([KVCache(), RotatingKVCache(16)])
