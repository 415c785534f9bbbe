"""Which rows are computed together, by lengths alone: no MLX here."""

from __future__ import annotations

import pytest

from trio_worker.engine import stem_lengths
from trio_worker.engine.padding import merge_alike, padding, padding_max


class Rows:
    def __init__(self, *lengths: int) -> None:
        self.lengths = list(lengths)

    def extend(self, other: Rows) -> None:
        self.lengths += other.lengths


def merged(most: int, *batches: tuple[int, ...]) -> list[list[int]]:
    return [rows.lengths for rows in merge_alike([Rows(*each) for each in batches], most)]


def test_padding_is_what_the_others_lack_of_the_longest() -> None:
    assert padding([]) == 0
    assert padding([7]) == 0
    assert padding([5, 7, 4]) == 2 + 3


def test_batches_are_put_together_while_their_padding_is_small() -> None:
    assert merged(0, (5,), (5,)) == [[5, 5]]
    assert merged(4, (10, 9), (6,)) == [[6], [10, 9]]
    assert merged(5, (10, 9), (6,)) == [[6, 10, 9]]


def test_what_is_alike_comes_together_whatever_the_order() -> None:
    assert merged(30, (90,), (5,), (12,), (80,), (10,)) == [[5, 10, 12], [80, 90]]


def test_what_has_been_put_together_stays_together() -> None:
    assert merged(0, (1, 100), (100,)) == [[1, 100], [100]]


@pytest.mark.parametrize(
    ("weights", "per_token", "tokens"), [(1000, 10, 50), (1009, 10, 50), (1000, 0, 500)]
)
def test_padding_may_take_half_of_what_the_weights_take(
    weights: int, per_token: int, tokens: int
) -> None:
    assert padding_max(weights, per_token) == tokens


@pytest.mark.parametrize(("done", "length"), [(255, 0), (256, 256), (287, 256), (300, 288)])
def test_a_stem_has_a_multiple_of_some_tokens_or_none(done: int, length: int) -> None:
    assert stem_lengths.stem_length(done) == length


@pytest.mark.parametrize(
    ("stem", "done", "length"),
    [(0, 1023, 0), (0, 1024, 1024), (288, 1311, 288), (288, 1312, 1312), (288, 1350, 1344)],
)
def test_a_stem_grows_when_much_has_been_computed_since(stem: int, done: int, length: int) -> None:
    assert stem_lengths.lengthened(stem, done) == length
