"""Loads a model the way that is fastest on this machine, and measures what others must know.

No model's own code is ever run: `trust_remote_code` stays off, for the tokenizer too, and the
folder is looked over before anything reads it (`folder.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from trio_worker.engine.cpu import float32, rotary, stand_ins
from trio_worker.engine.grammars import open_grammars
from trio_worker.engine.models import CannotLoad, ProgressSink
from trio_worker.engine.models.device import accelerator, described, on_cpu
from trio_worker.engine.models.resolve import resolve
from trio_worker.engine.padding import padding_max
from trio_worker.grammar.matching import Grammars


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to compute, and what others must know of it."""

    module: Any
    tokenizer: Any
    name: str
    context_length: int
    cache_bytes_per_token: int
    vocabulary_size: int
    device: str
    accelerator: str
    grammars: Grammars | None
    """None: answers cannot be held to a form."""

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.eos_token_ids)

    @property
    def padding_max(self) -> int:
        """Tokens of padding that a decode step may compute rather than read the weights again."""
        weights = sum(array.nbytes for _, array in tree_flatten(self.module.parameters()))
        return padding_max(weights, self.cache_bytes_per_token)


def load(model: str, model_name: str | None, progress: ProgressSink) -> LoadedModel:
    """Find, prepare and load `model`. Raises `CannotLoad` with a sentence for people."""
    folder = resolve(model, progress)
    progress(f"loading {model}", 0, 0, "")
    try:
        module, config = load_model(folder, lazy=True)
        tokenizer = load_tokenizer(
            folder,
            {"trust_remote_code": False},
            eos_token_ids=config.get("eos_token_id"),
        )
        _prepare(module)
        bytes_per_token, vocabulary_size = _measure(module)
    except CannotLoad:
        raise
    except Exception as exc:
        raise CannotLoad(
            f"the model {model!r} at {folder} cannot be loaded: {type(exc).__name__}: {exc}"
        ) from exc
    grammars = open_grammars(tokenizer, end_tokens=tokenizer.eos_token_ids, size=vocabulary_size)
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        name=model_name or Path(model).name,
        context_length=_context_length(config, tokenizer),
        cache_bytes_per_token=bytes_per_token,
        vocabulary_size=vocabulary_size,
        device=described(module),
        accelerator=accelerator(),
        grammars=grammars,
    )


def _prepare(module: Any) -> None:
    """Bring the weights into memory, in the form that this device computes with fastest."""
    if on_cpu() and float32.fits(module):
        float32.widen(module)
        rotary.use_for(module)
        stand_ins.use_for(module)
    mx.eval(module.parameters())
    if on_cpu():
        mx.clear_cache()


def _measure(module: Any) -> tuple[int, int]:
    """Compute one token: the bytes its cache takes, and the size of the model's vocabulary.

    Measured rather than taken from the configuration, whose names differ between architectures.
    """
    cache = make_prompt_cache(module)
    if not all(hasattr(layer, "merge") for layer in cache):
        raise CannotLoad("mlx-lm cannot batch this model's attention cache, so it cannot be served")
    logits = module(mx.array([[0]]), cache=cache)
    mx.eval(logits, [layer.state for layer in cache])
    total = 0
    for layer in cache:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            # Room for more tokens than the one is made at once.
            total += (keys.nbytes + values.nbytes) // keys.shape[2]
    return total, int(logits.shape[-1])


def _context_length(config: dict[str, Any], tokenizer: Any) -> int:
    for section in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
            if isinstance(length := section.get(key), int) and length > 0:
                return length
    length = getattr(tokenizer, "model_max_length", None)
    # Tokenizers without a limit state one of 10^30.
    return length if isinstance(length, int) and 0 < length < 10**9 else 2048
