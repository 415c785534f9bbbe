"""GGUF files that are loaded by way of their conversion."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import pytest
from support.gguf_files import quiet, write_gguf
from support.tiny_model import (
    END,
    VOCABULARY,
    write_tiny_model,
)

from trio_worker.engine.models import CannotLoad
from trio_worker.engine.models.load import load
from trio_worker.engine.models.resolve import resolve

pytestmark = pytest.mark.mlx


@pytest.fixture
def cache(tmp_path: Any, monkeypatch: Any) -> Any:
    monkeypatch.setenv("TRIO_WORKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Any:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_gguf_file_computes_what_the_model_it_was_made_from_computes(
    cache: Any, tmp_path: Any, tiny: Any
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, mx.load(str(tiny / "model.safetensors")))
    original, converted = load(str(tiny), None, quiet), load(str(file), None, quiet)
    assert converted.name == "tiny.gguf"
    assert converted.vocabulary_size == VOCABULARY
    assert converted.end_tokens == original.end_tokens == {END}
    assert converted.cache_bytes_per_token == original.cache_bytes_per_token
    tokens = mx.array([list(range(3, 40))])
    one, other = original.module(tokens), converted.module(tokens)
    # Its weights went through 16 bits.
    assert mx.allclose(one, other, atol=0.2).item()
    for text in ("hello world and <|im_end|>", "caf\u00e9 \U0001f600 123\n\n x"):
        expected = original.tokenizer.encode(text)
        assert converted.tokenizer.encode(text) == expected
        assert converted.tokenizer.decode(expected) == original.tokenizer.decode(expected)
    messages = [{"role": "user", "content": "hello"}]
    assert converted.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True
    ) == original.tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_a_gguf_file_that_cannot_be_written_is_converted_too(
    cache: Any, tmp_path: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below a read-only system, where MLX itself does not open it."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file, mx.load(str(tiny / "model.safetensors")))
    expected = resolve(str(file), quiet) / "model.safetensors"
    os.utime(file, ns=(1, 1))
    file.chmod(0o444)
    # Root may write what nobody may.
    monkeypatch.setattr(os, "access", lambda *_: False)
    folder = resolve(str(file), quiet)
    assert folder != expected.parent
    assert (folder / "model.safetensors").read_bytes() == expected.read_bytes()
    assert not list(folder.glob("*.gguf"))


def test_a_changed_gguf_file_is_converted_again(cache: Any, tmp_path: Any, tiny: Any) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, mx.load(str(tiny / "model.safetensors")))
    first = resolve(str(file), quiet)
    assert resolve(str(file), quiet) == first
    os.utime(file, ns=(1, 1))
    assert resolve(str(file), quiet) != first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"tokenizer.ggml.model": "llama"}, "byte-level BPE"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "unheard-of"),
    ],
)
def test_a_gguf_file_that_cannot_be_converted_says_why(
    cache: Any, tmp_path: Any, tiny: Any, changes: Any, said: Any
) -> None:
    file = tmp_path / "odd.gguf"
    write_gguf(file, mx.load(str(tiny / "model.safetensors")), **changes)
    with pytest.raises(CannotLoad, match=said):
        load(str(file), None, quiet)


def test_a_broken_gguf_file_says_so(cache: Any, tmp_path: Any) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"not a model at all")
    with pytest.raises(CannotLoad, match=r"broken\.gguf cannot be read"):
        load(str(file), None, quiet)
