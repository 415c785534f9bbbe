"""Converts a GGUF file of the llama family, with a byte-level BPE tokenizer, to an mlx-lm folder.

The weights stay quantised as they are in the file: the folder is small and quick to write, and
whoever loads it decides (`models.py` dequantises on a CPU, which is faster at float32).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from trio_worker.engine.models.gguf_header import ArrayOf, Header, Malformed, read_header

CONTROL, USER_DEFINED = 3, 4
"""Token types of GGUF: special ones, and added ones that are ordinary text."""

LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


_NEEDED: dict[str, tuple[Any, float, float]] = {
    "llama.attention.head_count": (int, 1, 2**16),
    "llama.attention.head_count_kv": (int, 1, 2**16),
    "llama.attention.key_length": (int, 1, 2**16),
    "llama.attention.layer_norm_rms_epsilon": (float, 0.0, 1.0),
    "llama.block_count": (int, 1, 10_000),
    "llama.context_length": (int, 1, 2**31 - 1),
    "llama.embedding_length": (int, 1, 2**24),
    "llama.feed_forward_length": (int, 1, 2**24),
}
"""What is built by these keys, so they are held to a type and a range."""
_MUST = _NEEDED.keys() - {"llama.attention.head_count_kv", "llama.attention.key_length"}
_TOKEN_IDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "padding"))


class Unsupported(Exception):
    """This file is none that can be converted; the message says why."""


def convert(file: Path, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer's files into `folder`.

    Raises `Unsupported`, and `OSError` if they cannot be written.
    """
    try:
        header = read_header(file)
    except Malformed as exc:
        raise Unsupported(f"{file.name} cannot be read as GGUF: {exc}") from exc
    _check_header(header, file)
    try:
        _convert(file, folder)
    except (Unsupported, OSError):
        raise
    except Exception as exc:
        raise Unsupported(f"{file.name} cannot be converted: {type(exc).__name__}: {exc}") from exc


def _check_header(header: Header, file: Path) -> None:
    """Before anything is built by what the metadata say."""
    metadata = header.metadata
    _check(metadata, file)
    for key, (kind, low, high) in _NEEDED.items():
        value: Any = metadata.get(key, None if key in _MUST else low)
        if type(value) is not kind or not low <= value <= high:
            shown = "missing" if value is None else repr(value)[:60]
            raise Unsupported(f"{file.name}: {key} is {shown}; expected {low} to {high}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if not isinstance(metadata.get(key), ArrayOf):
            raise Unsupported(f"{file.name}: {key} is no array")
    assert isinstance(tokens, ArrayOf)
    for key in _TOKEN_IDS:
        value = metadata.get(key, 0)
        if not isinstance(value, int) or not 0 <= value < tokens.count:
            raise Unsupported(f"{file.name}: {key} is {value!r:.60}, of {tokens.count} tokens")
    if metadata["llama.block_count"] > len(header.tensors):
        raise Unsupported(
            f"{file.name}: llama.block_count is {metadata['llama.block_count']}, but the file has "
            f"{len(header.tensors)} tensors in all"
        )


def _convert(file: Path, folder: Path) -> None:
    arrays, metadata = _load(file, folder)
    plain = {key: _plain(value) for key, value in metadata.items()}
    _check(plain, file)
    weights = _weights(arrays, plain)
    config = _config(plain, weights, arrays)
    weights = {name: _half(array) for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(plain, folder)


def _load(file: Path, folder: Path) -> Any:
    """The arrays and the metadata; of a file that may not be written, by way of a copy."""
    copy = None
    if not os.access(file, os.W_OK):
        # MLX opens it for writing all the same, which fails under a service's read-only system.
        copy = folder / "copy.gguf"
        shutil.copyfile(file, copy)
    try:
        loaded: Any = mx.load(str(copy or file), format="gguf", return_metadata=True)
        # Nothing is left to be read from the file.
        mx.eval(loaded[0])
    except (RuntimeError, ValueError) as exc:
        raise Unsupported(f"{file.name} cannot be read as GGUF: {exc}") from exc
    finally:
        if copy is not None:
            copy.unlink(missing_ok=True)
    return loaded


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, mx.array) else value


def _check(metadata: dict[str, Any], file: Path) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise Unsupported(
            f"{file.name} has the architecture {architecture!r}; only the llama family is "
            "converted: give an mlx-lm folder or a Hugging Face repository of this model instead"
        )
    tokenizer = metadata.get("tokenizer.ggml.model")
    if tokenizer != "gpt2":
        raise Unsupported(
            f"{file.name} has a tokenizer of the kind {tokenizer!r}; only byte-level BPE ('gpt2') "
            "is converted"
        )


def _weights(arrays: dict[str, mx.array], metadata: dict[str, Any]) -> dict[str, mx.array]:
    heads = metadata["llama.attention.head_count"]
    kv_heads = metadata.get("llama.attention.head_count_kv", heads)
    weights = {}
    for name, array in arrays.items():
        if name == "rope_freqs.weight":
            continue
        matched = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|scales|biases|bias)", name)
        layer, part, kind = matched.groups() if matched else (None, name, "")
        known = _TOP_NAMES if layer is None else _BLOCK_NAMES
        if part not in known:
            raise Unsupported(f"the tensor {name!r} is none of a plain llama model")
        prefix = "" if layer is None else f"model.layers.{layer}."
        rotated = {"attn_q": heads, "attn_k": kv_heads}.get(part)
        weights[f"{prefix}{known[part]}.{kind}"] = (
            array if rotated is None else _unpermute(array, rotated)
        )
    return weights


def _unpermute(array: mx.array, heads: int) -> mx.array:
    """GGUF interleaves the rows of each head for its way of rotating; undo it."""
    rows, rest = array.shape[0], array.shape[1:]
    pairs = array.reshape(heads, rows // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(rows, *rest)


def _half(array: mx.array) -> mx.array:
    # A single float32 norm would lift every activation, and the cache, to float32 on a GPU.
    return array.astype(mx.float16) if array.dtype == mx.float32 else array


def _config(
    metadata: dict[str, Any], weights: dict[str, mx.array], arrays: dict[str, mx.array]
) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    hidden = metadata["llama.embedding_length"]
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": metadata.get("llama.attention.key_length", hidden // heads),
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": metadata["llama.context_length"],
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted(_end_tokens(metadata)),
    }
    if "rope_freqs.weight" in arrays:
        # Llama 3.1 and later: the file has the factors worked out, mlx-lm wants their rule.
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": max(_plain(arrays["rope_freqs.weight"])),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    quantised = _quantisation(weights, config)
    if quantised:
        config["quantization"] = quantised
    return config


def _end_tokens(metadata: dict[str, Any]) -> set[int]:
    """Llama 3 ends a turn of a chat and a text with different tokens."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return {metadata[key] for key in keys if key in metadata}


def _quantisation(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, Any]:
    """The group size and bits of every quantised layer; a file may mix them."""
    layers = {}
    for name, scales in weights.items():
        if not name.endswith(".scales"):
            continue
        layer = name.removesuffix(".scales")
        packed = weights[f"{layer}.weight"].shape[-1]
        wide = layer.endswith("down_proj")
        columns = config["intermediate_size"] if wide else config["hidden_size"]
        if layer.endswith("o_proj"):
            columns = config["num_attention_heads"] * config["head_dim"]
        layers[layer] = {
            "group_size": columns // scales.shape[-1],
            "bits": packed * 32 // columns,
        }
    if not layers:
        return {}
    kinds = [tuple(layer.values()) for layer in layers.values()]
    group_size, bits = max(set(kinds), key=kinds.count)
    odd = {
        name: layer for name, layer in layers.items() if tuple(layer.values()) != (group_size, bits)
    }
    return {"group_size": group_size, "bits": bits, **odd}


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=_ignores(metadata)))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre", "default"))
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, type_ in zip(tokens, types, strict=True)
                if type_ == kind
            ]
        )
    named = {
        name: tokens[index]
        for name, key in (
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        )
        if (index := metadata.get(key)) is not None
    }
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
    }
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _ignores(metadata: dict[str, Any]) -> bool:
    return bool(metadata.get("tokenizer.ggml.pre") == "llama-bpe")


def _pre_tokenizer(kind: str) -> Any:
    if kind == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if kind in {"default", "gpt-2"}:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind in {"llama-bpe", "llama3", "llama-v3"}:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise Unsupported(
        f"its text is split in the way {kind!r}; known are smollm, gpt-2 and llama-bpe"
    )
