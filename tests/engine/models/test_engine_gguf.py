"""GGUF files that are broken or mean ill: refused before the library that would believe them."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.gguf_files import quiet, write_gguf
from support.paths import TESTS
from support.tiny_model import write_tiny_model

from trio_worker.engine.models import CannotLoad
from trio_worker.engine.models.gguf import Unsupported, convert
from trio_worker.engine.models.gguf_header import ArrayOf, Malformed, read_header
from trio_worker.engine.models.load import load

pytestmark = pytest.mark.mlx

HEADER_BYTES = 12_000
"""Of the file that is damaged: its header, and some of the weights."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sound(tiny: Path) -> bytes:
    file = tiny / "sound.gguf"
    write_gguf(file, mx.load(str(tiny / "model.safetensors")))
    return file.read_bytes()


def text(value: bytes, *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


def gguf(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    counts = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def test_the_header_says_what_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    pairs = (
        pair(b"a", 8, text("grün".encode())),
        pair(b"b", 4, struct.pack("<I", 7)),
        pair(b"c", 9, array(8, 2, text(b"x") + text(b""))),
        pair(b"d", 9, array(6, 2, b"\0" * 8)),
        pair(b"e", 7, b"\1"),
    )
    tensors = (tensor((32, 2), 2), tensor((3,), 0, 64, b"u"))
    file.write_bytes(gguf(pairs, tensors, b"\0" * 76))
    header = read_header(file)
    assert header.metadata == {
        "a": "grün", "b": 7, "c": ArrayOf(8, 2), "d": ArrayOf(6, 2), "e": True,
    }  # fmt: skip
    assert header.tensors == {"t": (32, 2), "u": (3,)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "too short", id="nothing"),
        pytest.param(b"GGUX" + b"\0" * 30, "does not begin", id="another kind"),
        pytest.param(gguf(version=1), "version is 1", id="version"),
        pytest.param(gguf(version=3 << 24), "version is", id="the other byte order"),
        pytest.param(gguf(counts=(2**63, 0)), "claims 9223372036854775808 tensors", id="tensors"),
        pytest.param(gguf(counts=(0, 2**63)), "9223372036854775808 keys", id="keys"),
        pytest.param(gguf(counts=(0, 3)), "claims|a name of", id="keys that are missing"),
        pytest.param(gguf((text(b"k", length=2**64 - 1),)), "a name of", id="a long key"),
        pytest.param(gguf((pair(b"k", 8, text(b"x", length=2**63)),)), "claims", id="a long text"),
        pytest.param(gguf((pair(b"k", 9, array(4, 2**62)),)), "claims", id="a long array"),
        pytest.param(gguf((pair(b"k", 9, array(8, 2**62)),)), "claims", id="of texts"),
        pytest.param(gguf((pair(b"k", 9, array(9, 2)),)), "type 9", id="an array of arrays"),
        pytest.param(gguf((pair(b"k", 99, b""),)), "type 99", id="a type of values"),
        pytest.param(
            gguf((pair(b"general.alignment", 4, struct.pack("<I", 0)),)), "alignment is 0", id="0"
        ),
        pytest.param(
            gguf((pair(b"general.alignment", 8, text(b"x")),)), "alignment is x", id="alignment"
        ),
        pytest.param(gguf((), (tensor((1,) * 9),)), "has 9 dimensions", id="dimensions"),
        pytest.param(gguf((), (tensor(()),)), "has 0 dimensions", id="no dimension"),
        pytest.param(gguf((), (tensor((2**32,)),)), "has the shape", id="a long row"),
        pytest.param(gguf((), (tensor((0,)),)), "has the shape", id="an empty row"),
        pytest.param(gguf((), (tensor((2**31 - 1,) * 4),)), "beyond", id="overflow"),
        pytest.param(gguf((), (tensor((8,)),), b"\0" * 31), "beyond the file", id="the end"),
        pytest.param(gguf((), (tensor((8,), 0, 2**64 - 32),), b"\0" * 32), "beyond", id="offset"),
        pytest.param(gguf((), (tensor((4,), 0, 8),), b"\0" * 64), "not aligned", id="unaligned"),
        pytest.param(gguf((), (tensor((8,), 99),), b"\0" * 32), "type 99", id="a type"),
        pytest.param(gguf((), (tensor((33,), 2),), b"\0" * 64), "in blocks of 32", id="blocks"),
    ],
)
def test_what_the_file_cannot_hold_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises(Malformed, match=said):
        read_header(file)
    with pytest.raises(CannotLoad, match=r"x\.gguf cannot be read as GGUF: "):
        load(str(file), None, quiet)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.block_count": mx.array(10**6)}, "llama.block_count is 1000000; expected 1 to"),
        ({"llama.block_count": mx.array(999)}, "is 999, but the file has 21 tensors"),
        ({"llama.block_count": mx.array(-1)}, "llama.block_count is -1"),
        ({"llama.block_count": "many"}, "llama.block_count is 'many'"),
        ({"llama.embedding_length": mx.array(10**9)}, "llama.embedding_length is 1000000000"),
        ({"llama.attention.head_count": mx.array(0)}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count": mx.array(7)}, "cannot be converted"),
        ({"llama.attention.head_count_kv": mx.array(0)}, "head_count_kv is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": mx.array(7.0)}, "rms_epsilon is 7.0"),
        ({"llama.context_length": mx.array(0)}, "llama.context_length is 0"),
        ({"tokenizer.ggml.tokens": "none"}, "tokenizer.ggml.tokens is no array"),
        ({"tokenizer.ggml.merges": "none"}, "tokenizer.ggml.merges is no array"),
        ({"tokenizer.ggml.merges": ["x y"]}, "cannot be converted"),
        ({"tokenizer.ggml.merges": ["xy"]}, "cannot be converted"),
        ({"tokenizer.ggml.tokens": ["a"]}, "token_id is 1, of 1 tokens"),
        ({"tokenizer.ggml.token_type": mx.array([1])}, "cannot be converted"),
        ({"tokenizer.ggml.eos_token_id": mx.array(2**31 - 1)}, "eos_token_id is 2147483647"),
        ({"tokenizer.ggml.bos_token_id": mx.array(-1)}, "bos_token_id is -1"),
    ],
)
def test_absurd_values_are_named(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setenv("TRIO_WORKER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "odd.gguf"
    write_gguf(file, mx.load(str(tiny / "model.safetensors")), **changes)
    with pytest.raises(CannotLoad, match=said) as caught:
        load(str(file), None, quiet)
    assert "odd.gguf" in str(caught.value)


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    pairs = (
        pair(b"general.architecture", 8, text(b"llama")),
        pair(b"tokenizer.ggml.model", 8, text(b"gpt2")),
    )
    file.write_bytes(gguf(pairs))
    with pytest.raises(Unsupported, match=r"llama\.attention\.head_count is missing"):
        convert(file, tmp_path)


def damaged(content: bytes, seed: int) -> bytes:
    """With some of its header changed, lost or doubled."""
    chance, changed = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(min(HEADER_BYTES, len(changed)))
        length = chance.randint(1, 20)
        if (kind := chance.random()) < 0.5:
            changed[at] = chance.randrange(256)
        elif kind < 0.7:
            number = chance.choice((2**64 - 1, 2**63, 2**32, 2**31, 0, 1, len(changed)))
            changed[at : at + 8] = number.to_bytes(8, "little")
        elif kind < 0.8:
            del changed[at : at + length]
        elif kind < 0.9:
            changed[at:at] = chance.randbytes(length)
        else:
            del changed[max(100, chance.randrange(len(changed))) :]
    return bytes(changed)


def convert_damaged(file: Path, seeds: range) -> None:
    content, folder = file.read_bytes(), file.parent / "converted"
    for seed in seeds:
        sys.stdout.write(f"{seed}\n")
        sys.stdout.flush()
        file.write_bytes(damaged(content, seed))
        folder.mkdir()
        with suppress(Unsupported):
            convert(file, folder)
        shutil.rmtree(folder)


def test_no_damage_brings_the_process_down(sound: bytes, tmp_path: Path) -> None:
    """As one file in thirteen does that is not looked over first."""
    file = tmp_path / "damaged.gguf"
    file.write_bytes(sound)
    program = (
        "import pathlib, test_engine_gguf as t; "
        f"t.convert_damaged(pathlib.Path({str(file)!r}), range(300))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        # Where this module is, and what it imports of the tests' own.
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        check=False,
        timeout=120,
    )
    last = done.stdout.split()[-1:]
    assert done.returncode == 0, f"seed {last}: {done.stderr.decode()[-2000:]}"
    assert last == [b"299"]
