"""Looks a model's folder over before anything reads it: it came from somewhere.

1. Nothing outside the folder is read, and nothing that is no file: a link leads into the folder, or
   into the `blobs` of a Hugging Face cache that it is a snapshot of.
2. What is parsed is of a size, and nested as deep, as models need.
3. No number makes the libraries build or reserve what the weights do not fill.
4. No program of the model is run, whatever its configuration asks for. Weights are read from
   safetensors alone, so nothing is unpickled.

Whoever can write the folder while it is read can go around all of this.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

MB = 2**20
SIZES = (
    ("tokenizer.json", 128 * MB),
    ("vocab.json", 128 * MB),
    ("*.index.json", 64 * MB),
    ("*.json", 16 * MB),
    ("*.jinja", 4 * MB),
    ("*.model", 256 * MB),
    ("*.tiktoken", 256 * MB),
    ("*.txt", 256 * MB),
)
"""The first pattern that fits a file bounds its size."""
HEADER_BYTES = 32 * MB
"""Of a safetensors file: a quarter of a million tensors."""
DEPTH_MAX = 32
TOKENS_MAX = 2**24
SHAPE_MAX = 2**31 - 1
"""MLX counts the elements of a dimension in 32 bits."""
DIMENSIONS_MAX = 16

_DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_ANY = 2**63 - 1
_BOUNDS = tuple(
    (re.compile(pattern), low, high)
    for pattern, low, high in (
        (r"num_hidden_layers|num_layers|n_layers?", 1, 10_000),
        (r"hidden_size|vocab_size|n_embd|d_model|dim|head_dim", 1, 2**24),
        (r"num_attention_heads|n_heads?", 1, 2**16),
        (r".*layers|.*depth", -1, 10_000),
        (r".*heads|.*experts.*", -1, 2**16),
        (r"bits", 1, 64),
        (r"group_size", 1, 2**16),
        (r".*(size|dim|rank|width)", -1, 2**24),
        (r".*max_position_embeddings|n_positions|n_ctx|.*window.*", -1, SHAPE_MAX),
        (r".*(seq_len|seq_length|sequence_length)", -1, SHAPE_MAX),
        (r".*token_ids?", -1, SHAPE_MAX),
        (r".*", -_ANY, _ANY),
    )
)
"""By the name of a key, wherever it stands in the configuration: the first that fits it counts."""
_RUNS_CODE = "model_file"


class Unfit(Exception):
    """The folder is none to load a model from; the message names the file, and what is wrong."""


def check_folder(folder: Path) -> None:
    """Raises `Unfit` unless the folder may be read. Allocates nothing by what it says."""
    folder = folder.resolve()
    for path in _files(folder):
        _check_size(path)
    config = _check_config(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.exists():
        _check_numbers(generation, _mapping(generation))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).exists():
            _mapping(path)
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        if (path := folder / name).exists():
            _check_tokens(path, _read_json(path))
    tensors = sum(_check_weights(path) for path in sorted(folder.glob("model*.safetensors")))
    for where, key, value in _numbers(config):
        if re.fullmatch(r"num_hidden_layers|num_layers|n_layers?", key) and value > tensors:
            raise Unfit(
                f"{folder / 'config.json'}: {where} is {value}, but the weights have {tensors} "
                "tensors in all"
            )


# --- files ---------------------------------------------------------------------------------


def _files(folder: Path) -> Iterator[Path]:
    """The files that the libraries may read. Raises `Unfit` for what is no file, or not here."""
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    for place in (folder, folder / "additional_chat_templates"):
        if not place.is_dir():
            continue
        for path in sorted(place.iterdir()):
            if path.is_symlink():
                _check_link(path, allowed)
            mode = path.stat().st_mode
            if stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                raise Unfit(f"{path} is neither a file nor a folder")


def _check_link(path: Path, allowed: list[Path]) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise Unfit(f"{path} is a link that leads nowhere") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise Unfit(
            f"{path} is a link to {target}, outside the model's folder: copy the file, or name "
            "the folder that holds it"
        )


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    limit = next((limit for pattern, limit in SIZES if fnmatch(path.name, pattern)), math.inf)
    if size > limit:
        raise Unfit(f"{path} has {size / MB:.0f} MB; such a file has at most {limit / MB:.0f} MB")


def _mapping(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise Unfit(f"{path} holds no mapping at its top")
    return value


def _read_json(path: Path) -> Any:
    try:
        value = json.loads(path.read_bytes())
        depth = _depth(value)
    except RecursionError:
        depth = DEPTH_MAX + 1
    except ValueError as exc:
        raise Unfit(f"{path} is no JSON: {exc}") from None
    if depth > DEPTH_MAX:
        raise Unfit(f"{path} is nested deeper than {DEPTH_MAX} levels")
    return value


def _depth(value: Any) -> int:
    """How deep a value is nested; stops counting soon after `DEPTH_MAX`."""
    level, depth = [value], 0
    while level and depth <= DEPTH_MAX:
        depth += 1
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
    return depth


# --- numbers -------------------------------------------------------------------------------


def _check_config(path: Path) -> dict[str, Any]:
    config = _mapping(path)
    if config.get(_RUNS_CODE) is not None:
        raise Unfit(
            f"{path}: {_RUNS_CODE} asks to run the model's own program "
            f"{shown(config[_RUNS_CODE])}, which is never done"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", kind):
        raise Unfit(f"{path}: model_type is {shown(kind)}; expected the name of an architecture")
    _check_numbers(path, config)
    return config


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    for where, key, value in _numbers(config):
        _, low, high = next(bounds for bounds in _BOUNDS if bounds[0].fullmatch(key))
        # A fraction that is no size may be what it likes.
        if (isinstance(value, int) or high < _ANY) and not low <= value <= high:
            raise Unfit(f"{path}: {where} is {shown(value)}; expected {low} to {high}")


def _numbers(value: Any, where: str = "", key: str = "") -> Iterator[tuple[str, str, int | float]]:
    """Every number in a configuration: where it stands, the name of its key, and itself."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{where}.{name}" if where else name, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, where, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield where, key, value


def _check_tokens(path: Path, content: Any) -> None:
    """The libraries make a list as long as the largest number of a token."""
    if not isinstance(content, dict):
        return
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else content
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = content.get("added_tokens")
    if isinstance(added, list):
        numbers += [each.get("id") for each in added if isinstance(each, dict)]
    for number in numbers:
        if isinstance(number, int) and not 0 <= number < TOKENS_MAX:
            raise Unfit(f"{path}: a token has the number {shown(number)}; expected 0 to 2^24")


def shown(value: Any) -> str:
    """A value fit for one line of a message."""
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# --- weights -------------------------------------------------------------------------------


def _check_weights(path: Path) -> int:
    """How many tensors a safetensors file has. Raises `Unfit` unless all lie within the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else math.inf
        if length > min(HEADER_BYTES, size - 8):
            raise Unfit(f"{path} is no safetensors file: its header would have {length} bytes")
        text = file.read(int(length))
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise Unfit(f"{path} is no safetensors file: its header cannot be read: {exc}") from None
    if not isinstance(header, dict):
        raise Unfit(f"{path} is no safetensors file: its header is no mapping")
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        if (fault := _fault_of(tensor, size - 8 - int(length))) is not None:
            raise Unfit(f"{path}: the tensor {shown(name)} {fault}")
    return len(header)


def _fault_of(tensor: Any, data_bytes: int) -> str | None:
    """What is wrong with a tensor of a header, if anything is."""
    if not isinstance(tensor, dict):
        return "is not described"
    shape, offsets = tensor.get("shape"), tensor.get("data_offsets")
    if not _are_numbers(shape) or len(shape) > DIMENSIONS_MAX or max(shape, default=0) > SHAPE_MAX:
        return f"has the shape {shown(shape)}"
    if not _are_numbers(offsets) or len(offsets) != 2:
        return f"has the offsets {shown(offsets)}"
    begin, end = offsets
    if not begin <= end <= data_bytes:
        return f"reaches beyond the file: its bytes are {begin} to {end} of {data_bytes}"
    width = _DTYPES.get(str(tensor.get("dtype")))
    if width is not None and math.prod(shape) * width != end - begin:
        return f"of the shape {shown(shape)} has {end - begin} bytes"
    return None


def _are_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
