"""Finds the folder that the name of a model means: built in, on this disk, or on Hugging Face.

Every folder is looked over before anything reads it (`folder.py`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from trio_worker.engine.models import CannotLoad, ProgressSink
from trio_worker.engine.models.folder import Unfit, check_folder
from trio_worker.engine.models.store import DEMO_NAME, prepare_demo, prepare_gguf

_REPOSITORY = re.compile(r"\A[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_WANTED_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.tiktoken"]


def resolve(model: str, progress: ProgressSink) -> Path:
    """The mlx-lm folder that `model` means; downloaded or converted if need be.

    Raises `CannotLoad` with a sentence for people.
    """
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
