"""Finds the model that a name means, and loads it the way that is fastest on this machine.

No model's own code is ever run: `trust_remote_code` stays off, for the tokenizer too, and the
folder is looked over before anything reads it (`folder.py`).
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

from trio_worker.engine.cpu import rotary, vectorised
from trio_worker.engine.cpu.blas import MISSING, preload_blas
from trio_worker.engine.models.folder import Unfit, check_folder
from trio_worker.engine.models.store import (
    DEMO_NAME,
    CannotPrepare,
    ProgressSink,
    prepare_demo,
    prepare_gguf,
)
from trio_worker.engine.padding import padding_max

_REPOSITORY = re.compile(r"\A[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_SHARE_OF_MEMORY = 0.6
"""Weights are dequantised for a CPU only while they take less than this of its memory."""


class CannotLoad(Exception):
    """Loading this model again would fail again; the message is for the person who named it."""


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
    try:
        folder = resolve(model, progress)
    except CannotPrepare as exc:
        raise CannotLoad(str(exc)) from exc
    progress(f"loading {model}", 0, 0, "")
    try:
        module, config = load_model(folder, lazy=True)
        tokenizer = load_tokenizer(
            folder,
            {"trust_remote_code": False},
            eos_token_ids=config.get("eos_token_id"),
        )
        _for_this_device(module)
        bytes_per_token, vocabulary_size = _measure(module)
    except CannotLoad:
        raise
    except Exception as exc:
        raise CannotLoad(
            f"the model {model!r} at {folder} cannot be loaded: {type(exc).__name__}: {exc}"
        ) from exc
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        name=model_name or Path(model).name,
        context_length=_context_length(config, tokenizer),
        cache_bytes_per_token=bytes_per_token,
        vocabulary_size=vocabulary_size,
        device=_device(module),
        accelerator=_accelerator(),
    )


def resolve(model: str, progress: ProgressSink) -> Path:
    """The mlx-lm folder that `model` means; downloaded or converted if need be."""
    if model == DEMO_NAME:
        return prepare_demo(progress)
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise CannotLoad(f"there is no file {model!r}")
        return prepare_gguf(path, progress)
    if path.is_dir():
        return _checked(path, model)
    if path.exists():
        raise CannotLoad(f"{model!r} is a file; a model is an mlx-lm folder or a .gguf file")
    if _REPOSITORY.match(model):
        return _checked(_fetch_repository(model, progress), model)
    if model.startswith(("/", ".", "~")) or "/" in model:
        raise CannotLoad(f"there is no folder {model!r}")
    near = difflib.get_close_matches(model.lower(), [DEMO_NAME], cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise CannotLoad(
        f"unknown model {model!r}{hint}: name the built-in {DEMO_NAME}, an mlx-lm folder, a .gguf "
        "file, or a Hugging Face repository such as mlx-community/Qwen3-0.6B-4bit"
    )


def _checked(folder: Path, model: str) -> Path:
    for pattern in ("config.json", "model*.safetensors", "tokenizer*"):
        if not any(folder.glob(pattern)):
            raise CannotLoad(
                f"the model {model!r} is broken: {folder} has no {pattern}; "
                "an mlx-lm folder has config.json, model*.safetensors and a tokenizer"
            )
    try:
        check_folder(folder)
    except (Unfit, OSError) as exc:
        raise CannotLoad(f"the model {model!r} cannot be loaded: {exc}") from exc
    return folder


def _fetch_repository(model: str, progress: ProgressSink) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, and seldom needed
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    try:
        local = Path(snapshot_download(model, allow_patterns=_WANTED_FILES, local_files_only=True))
        if any(local.glob("model*.safetensors")) and (local / "config.json").exists():
            return local
    except Exception:  # noqa: BLE001, S110 - whatever is wrong with the copy: fetch it
        pass
    progress(f"downloading {model}", 0, 0, "")
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED_FILES))
    except GatedRepoError as exc:
        raise CannotLoad(
            f"the model {model!r} is gated: accept its terms on its Hugging Face page and set "
            "HF_TOKEN"
        ) from exc
    except RepositoryNotFoundError as exc:
        raise CannotLoad(
            f"there is no Hugging Face repository {model!r}, or it is private (then set HF_TOKEN); "
            "there is no local folder of this name either"
        ) from exc
    except HfHubHTTPError as exc:
        raise CannotLoad(f"the model {model!r} could not be downloaded: {exc}") from exc
    except Exception as exc:
        raise CannotLoad(
            f"the model {model!r} is not in the local cache and could not be downloaded "
            f"({type(exc).__name__}): is this machine offline?"
        ) from exc


def _for_this_device(module: Any) -> None:
    """Bring the weights into the form that this device computes with fastest."""
    if not _on_cpu():
        mx.eval(module.parameters())
        return
    # Only float32 matrix products reach the BLAS; quantised and 16-bit ones are some ten times
    # slower on a CPU.
    if _size_at_float32(module) <= _SHARE_OF_MEMORY * _memory_bytes():
        _unpack_common(module)
        dequantize_model(module)
        module.update(tree_map(_widen, module.parameters()))
        rotary.use_for(module)
        vectorised.use_for(module)
    mx.eval(module.parameters())
    mx.clear_cache()


def _unpack_common(module: Any) -> None:
    """Dequantise the common kinds of layers, some five times as fast as MLX does on a CPU."""
    plain = []
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        if layer.mode != "affine" or layer.bits not in {4, 8}:
            continue
        new: Any = (
            nn.Linear(1, 1, bias=False)
            if isinstance(layer, nn.QuantizedLinear)
            else nn.Embedding(1, 1)
        )
        new.weight = mx.array(_unpack(layer))
        if "bias" in layer:
            new.bias = layer.bias
        plain.append((name, new))
    module.update_modules(tree_unflatten(plain))


def _unpack(layer: Any) -> npt.NDArray[np.float32]:
    packed = np.array(layer.weight).view(np.uint8)
    if layer.bits == 4:
        # The first of two numbers is in the lower half of their byte.
        packed = np.stack((packed & 15, packed >> 4), axis=-1)
    groups = packed.reshape(*layer.scales.shape, layer.group_size).astype(np.float32)
    groups *= np.array(layer.scales.astype(mx.float32))[..., None]
    groups += np.array(layer.biases.astype(mx.float32))[..., None]
    return groups.reshape(*layer.weight.shape[:-1], -1)


def _widen(array: mx.array) -> mx.array:
    narrow = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(mx.float32) if narrow else array


def _size_at_float32(module: Any) -> int:
    size = 0
    for name, array in tree_flatten(module.parameters()):
        if array.dtype == mx.uint32 and name.endswith(".weight"):
            size += array.size * 32  # at most eight 4-bit numbers in each, of four bytes then
        else:
            size += array.size * 4
    return size


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _on_cpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def _accelerator() -> str:
    if _on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


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


def _device(module: Any) -> str:
    kinds = {array.dtype for _, array in tree_flatten(module.parameters())}
    number = next(
        (
            str(kind).rpartition(".")[2]
            for kind in (mx.float32, mx.bfloat16, mx.float16)
            if kind in kinds
        ),
        "quantised",
    )
    if _on_cpu():
        blas = preload_blas()
        if blas == "none":
            blas = "without BLAS"
        return " ".join(part for part in ("cpu", number, blas) if part)
    chip = str(mx.device_info().get("device_name") or mx.default_device())
    packed = " quantised" if mx.uint32 in kinds else ""
    return f"{chip} {number}{packed}"


def blas_warning() -> str | None:
    """What the user loses, where that is so."""
    return MISSING if _on_cpu() and preload_blas() == "none" else None
