"""GGUF files written by hand."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from support.tiny_model import (
    CHAT_TEMPLATE,
    CONTEXT,
    END,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MERGES,
    SPECIAL,
)
from trio_worker.engine.text import byte_alphabet


def quiet(*step: Any) -> None:
    pass


def permuted(array: Any, heads: Any) -> Any:
    """As GGUF stores q and k: the inverse of what the converter must undo."""
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def write_gguf(file: Any, weights: Any, **changes: Any) -> None:
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    arrays = {}
    for name, array in weights.items():
        part = name.removesuffix(".weight")
        prefix = ""
        if part.startswith("model.layers."):
            _, _, layer, part = part.split(".", 3)
            prefix = f"blk.{layer}."
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
        stored = array if heads is None else permuted(array, heads)
        arrays[f"{prefix}{names[part]}.weight"] = stored.astype(mx.float16)
    tokens = [*SPECIAL, *byte_alphabet(), *("".join(pair) for pair in MERGES)]
    metadata: Any = {
        "general.architecture": "llama",
        "llama.embedding_length": mx.array(HIDDEN),
        "llama.feed_forward_length": mx.array(2 * HIDDEN),
        "llama.block_count": mx.array(LAYERS),
        "llama.attention.head_count": mx.array(HEADS),
        "llama.attention.head_count_kv": mx.array(KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "llama.context_length": mx.array(CONTEXT),
        "llama.rope.freq_base": mx.array(10000.0),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.token_type": mx.array([3] * 3 + [1] * (len(tokens) - 3)),
        "tokenizer.ggml.bos_token_id": mx.array(1),
        "tokenizer.ggml.eos_token_id": mx.array(END),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    mx.save_gguf(str(file), arrays, metadata | changes)
