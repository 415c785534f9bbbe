"""Writes a Llama with random weights and a byte-level BPE tokenizer: milliseconds, no download.

What the tests compute with, and `trio-worker bench tiny`: a model so small that what is around it
shows.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from trio_worker.engine.text import byte_alphabet

VOCABULARY = 512
HIDDEN = 64
LAYERS = 2
HEADS = 4
KV_HEADS = 2
CONTEXT = 2048

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
"""The token that ends an answer."""

FIRST_BYTE = len(SPECIAL)
MERGES = (
    ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("a", "n"), ("an", "d"),
    ("Ġ", "and"), ("l", "l"), ("e", "ll"), ("ell", "o"), ("h", "ello"), ("Ġ", "w"), ("o", "r"),
    ("Ġw", "or"), ("l", "d"), ("Ġwor", "ld"), ("s", "t"), ("in", "g"), ("o", "n"),
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_token(byte: int) -> int:
    """The token of a single byte."""
    return FIRST_BYTE + list(byte_alphabet().values()).index(byte)


def write_tiny_model(folder: Path, *, seed: int = 0, endless: bool = False) -> Path:
    """An mlx-lm folder; the same weights for the same seed.

    Greedy answers of an endless one never end by themselves, and each of their tokens is text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float) -> mx.array:
        return mx.array(random.normal(0, scale, (rows, columns)).astype(np.float32))

    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, 1.0),
        "model.norm.weight": mx.ones((HIDDEN,)),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN, 0.3),
    }
    head = HIDDEN // HEADS
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN, 0.2),
            f"{prefix}.self_attn.k_proj.weight": matrix(KV_HEADS * head, HIDDEN, 0.2),
            f"{prefix}.self_attn.v_proj.weight": matrix(KV_HEADS * head, HIDDEN, 0.2),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN, 0.2),
            f"{prefix}.mlp.gate_proj.weight": matrix(2 * HIDDEN, HIDDEN, 0.2),
            f"{prefix}.mlp.up_proj.weight": matrix(2 * HIDDEN, HIDDEN, 0.2),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, 2 * HIDDEN, 0.2),
            f"{prefix}.input_layernorm.weight": mx.ones((HIDDEN,)),
            f"{prefix}.post_attention_layernorm.weight": mx.ones((HIDDEN,)),
        }
    if endless:
        # Among so many, the likeliest logit is above 0.
        for token in _not_text():
            weights["lm_head.weight"][token] = 0.0
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "eos_token_id": END,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    return folder


def _not_text() -> list[int]:
    """The tokens that are special, not printable, of a part of a character, or of nothing."""
    printable = [byte_token(byte) for byte in range(0x20, 0x7F)]
    merged = FIRST_BYTE + len(byte_alphabet())
    texts = {*printable, *range(merged, merged + len(MERGES))}
    return [token for token in range(VOCABULARY) if token not in texts]


def _write_tokenizer(folder: Path) -> None:
    tokens = [*SPECIAL, *byte_alphabet(), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(
        BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(MERGES))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
