"""Products with the matrix over the vocabulary, against MLX's in one piece."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn

from trio_worker.engine import tall

pytestmark = pytest.mark.mlx

WIDTH = 24
VOCABULARY = 2 * tall.BLOCK + 100
"""The last block is not a whole one."""


class Model(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = [nn.Linear(WIDTH, 2 * WIDTH)]
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=True)
        self.other_head = nn.Linear(WIDTH, VOCABULARY, bias=False)


@pytest.fixture
def models() -> tuple[Any, Any]:
    plain, ours = Model(), Model()
    ours.update(plain.parameters())
    tall.use_for(ours)
    return plain, ours


@pytest.mark.parametrize(
    "shape",
    [(1, 1, WIDTH), (1, WIDTH), (2, 1, WIDTH), (8, 1, WIDTH), (1, 5, WIDTH), (3, 30, WIDTH)],
)
def test_a_product_is_what_it_was(models: Any, shape: Any) -> None:
    plain, ours = models
    x = mx.random.normal(shape, key=mx.random.key(3))
    for name in ("lm_head", "other_head"):
        wanted, got = getattr(plain, name)(x), getattr(ours, name)(x)
        assert got.shape == wanted.shape == (*shape[:-1], VOCABULARY)
        assert mx.allclose(got, wanted, atol=1e-5)
    wanted, got = plain.embed_tokens.as_linear(x), ours.embed_tokens.as_linear(x)
    assert got.shape == wanted.shape
    assert mx.allclose(got, wanted, atol=1e-5)


def test_only_tall_matrices_are_replaced_and_all_keep_their_weights(models: Any) -> None:
    plain, ours = models
    tokens = mx.array([[0, 7, VOCABULARY - 1]])
    assert mx.array_equal(ours.embed_tokens(tokens), plain.embed_tokens(tokens))
    assert type(ours.layers[0]) is nn.Linear
    assert isinstance(ours.lm_head, nn.Linear)
    assert type(ours.lm_head) is not nn.Linear
