"""What the name of a model means, and why it means nothing."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import huggingface_hub.constants
import mlx.core as mx
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support.gguf_files import quiet
from support.tiny_model import (
    write_tiny_model,
)

from trio_worker.engine.models import CannotLoad
from trio_worker.engine.models.load import load

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Any:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_quantised_folder_is_computed_in_float32_on_a_cpu(tmp_path: Any, tiny: Any) -> None:
    if mx.default_device() != mx.cpu:
        pytest.skip("this machine has a GPU")
    module, config = load_model(tiny)
    module, config = quantize_model(module, config, group_size=32, bits=8)
    folder = write_tiny_model(tmp_path / "quantised")
    (folder / "model.safetensors").unlink()
    save_model(folder, module)
    save_config(config, folder / "config.json")
    loaded = load(str(folder), "own name", quiet)
    assert loaded.device.startswith("cpu float32")
    assert loaded.name == "own name"
    tokens = mx.array([[3, 4, 5]])
    assert mx.allclose(loaded.module(tokens), module(tokens), atol=1e-3).item()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-model", "Hugging Face repository such as"),
        ("SmolLM2-135M", "did you mean smollm2-135m-instruct"),
        ("./no/such/folder", "no folder"),
        ("/no/such/file.gguf", "no file"),
        ("a/b/c", "no folder"),
        (__file__, "is a file"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_a_hint(name: Any, said: Any) -> None:
    with pytest.raises(CannotLoad, match=said):
        load(name, None, quiet)


def test_a_repository_that_cannot_be_reached_is_refused_with_a_sentence(monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CannotLoad, match="not in the local cache"):
        load("nobody-at-all/no-such-model", None, quiet)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_with_a_file_missing_names_it(tmp_path: Any, missing: Any) -> None:
    folder = write_tiny_model(tmp_path / "broken")
    (folder / missing).unlink()
    with pytest.raises(CannotLoad, match=missing.partition(".")[0]):
        load(str(folder), None, quiet)


def test_a_folder_with_a_broken_file_names_the_folder(tmp_path: Any) -> None:
    folder = write_tiny_model(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CannotLoad, match="cannot be loaded"):
        load(str(folder), None, quiet)
    write_tiny_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CannotLoad, match="cannot be loaded"):
        load(str(folder), None, quiet)


def test_a_models_own_code_is_never_run(tmp_path: Any) -> None:
    folder = write_tiny_model(tmp_path / "curious")
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("import pathlib; pathlib.Path(__file__ + '.ran').touch()")
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "evil.py"}))
    with pytest.raises(CannotLoad, match="never done"):
        load(str(folder), None, quiet)
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}})
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    settings["tokenizer_class"] = "EvilTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with suppress(CannotLoad):
        load(str(folder), None, quiet)
    assert not (folder / "evil.py.ran").exists()
