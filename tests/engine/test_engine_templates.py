"""Chat templates, which are programs that came with a model, rendered where they do no harm."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio
from mlx_lm.utils import load_tokenizer
from support.engine_conformance import admits
from support.engine_rig import chat, opened, until
from support.tiny_model import write_tiny_model

from trio_worker.engine import template_program as render
from trio_worker.engine.mended_mlx_lm import has_text_template
from trio_worker.engine.template_renderer import (
    START_S,
    WITHIN_S,
    Renderer,
    TemplateFailed,
    TemplateRefused,
    tokens_of,
)
from trio_worker.engine.tokenising import Tokeniser
from trio_worker.errors import EngineFailed, InvalidRequest
from trio_worker.protocol.frames import Tokenise, TokeniseFailed
from trio_worker.protocol.prompt import Message
from trio_worker.protocol.turn import Work

pytestmark = pytest.mark.mlx

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße, <|im_start|> “you”!\n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "  and now?  "},
]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ON_DEMAND = (
    "{% if messages[0]['content'] == 'bad' %}" + LOOP + "{% endif %}x{{ messages[0].content }}"
)


@pytest.fixture(scope="module")
def renderer() -> Any:
    with Renderer() as renderer:
        renderer.wait_ready()
        yield renderer


def tokenizer_with(folder: Path, template: Any, **settings: Any) -> Any:
    write_tiny_model(folder)
    file = folder / "tokenizer_config.json"
    given = {**json.loads(file.read_text()), **settings, "chat_template": template}
    if template is None:
        del given["chat_template"]
    file.write_text(json.dumps(given))
    return load_tokenizer(folder)


def says(renderer: Renderer, template: str, *contents: str) -> str:
    messages = [{"role": "user", "content": each} for each in contents or ("x",)]
    return renderer.render(messages, template, {"add_generation_prompt": True})


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
            id="names of special tokens",
        ),
        pytest.param(
            "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
            "{%- for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}"
            "{{ m | tojson }}{{ loop.index }}\n{%- endfor %}",
            id="loop controls, tojson and thinking",
        ),
        pytest.param(
            [
                {"name": "default", "template": "{{ messages | length }}{{ tools is none }}"},
                {"name": "tool_use", "template": "tools"},
            ],
            id="the default one of several",
        ),
        pytest.param(
            "{% set ns = namespace(found=false) %}{% for m in messages if m.role == 'system' %}"
            "{% set ns.found = true %}{% endfor %}{{ ns.found }}{{ documents is none }}"
            "{% generation %}{{ messages[-1].content }}{% endgeneration %}",
            id="namespaces and generation blocks",
        ),
    ],
)
def test_the_tokens_are_those_of_the_library(
    tmp_path: Path, renderer: Renderer, template: Any
) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    assert has_text_template(tokenizer)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert tokens_of(tokenizer, CHAT, renderer) == expected


def test_a_function_of_the_library_is_called_as_it_is(tmp_path: Path, renderer: Renderer) -> None:
    tokenizer = tokenizer_with(tmp_path, None, chat_template_type="deepseek_v32")
    assert not has_text_template(tokenizer)
    expected = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)
    assert tokens_of(tokenizer, CHAT[:2], renderer) == expected


def test_what_a_template_raises_is_its_refusal(renderer: Renderer) -> None:
    pid = renderer.pid
    with pytest.raises(TemplateRefused, match="TemplateError: no tools here"):
        says(renderer, "{{ raise_exception('no tools here') }}")
    with pytest.raises(TemplateRefused, match="TemplateSyntaxError"):
        says(renderer, "{% for %}")
    with pytest.raises(TemplateRefused, match="SecurityError"):
        says(renderer, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    assert renderer.pid == pid


@pytest.mark.parametrize(
    ("template", "why"),
    [
        pytest.param(LOOP, "longer than", id="a loop"),
        pytest.param("{{ 9 ** (9 ** 9) }}", "longer than", id="a number"),
        pytest.param("{{ 'x' * 10 ** 10 }}", "memory", id="memory at once"),
        pytest.param("{{ 'x' * 10 ** 7 }}", "characters", id="a long text"),
        pytest.param(
            "{% set ns = namespace(x='xx') %}{% for a in range(64) %}"
            "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory",
            id="memory by doubling",
        ),
    ],
)
def test_a_template_without_end_is_ended_and_the_next_one_is_rendered(
    renderer: Renderer, template: str, why: str
) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateFailed, match=why):
        says(renderer, template)
    assert time.monotonic() - began < renderer.within_s + 1
    assert says(renderer, "{{ messages[0].content }}", "next") == "next"


def test_many_messages_are_no_excess(renderer: Renderer) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert says(renderer, template, *["a"] * 20_000).count("<|im_end|>") == 20_000


def test_a_process_that_dies_is_replaced(renderer: Renderer) -> None:
    assert renderer.pid is not None
    os.kill(renderer.pid, signal.SIGKILL)
    with pytest.raises(TemplateFailed, match="has ended"):
        says(renderer, "x")
    assert says(renderer, "x") == "x"


def test_nothing_is_left_of_it() -> None:
    with Renderer() as renderer:
        renderer.wait_ready()
        process = psutil.Process(renderer.pid)
    assert not process.is_running()


def test_it_ends_with_the_other_end_though_a_template_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the engine is killed alone: nobody is left to kill this process."""
    renderer = Renderer()
    renderer.wait_ready()
    process = psutil.Process(renderer.pid)
    assert renderer._line is not None
    question = render.Question(
        messages=[{"role": "user", "content": "x"}], template=LOOP, variables={}, within_s=0.1
    )
    renderer._line.send(msgspec.msgpack.encode(question))
    renderer._line.close()
    assert renderer._process is not None
    assert renderer._process.wait(10) == -signal.SIGALRM
    assert not process.is_running()


def test_whose_fault_it_is_is_said(tmp_path: Path, renderer: Renderer) -> None:
    tokenizer = tokenizer_with(tmp_path, ON_DEMAND + "{{ raise_exception('no') }}")

    def ask(content: str) -> Any:
        asked = Tokenise(prompt=None, messages=(Message(role="user", content=content),))
        return Tokeniser(tokenizer, renderer).answer(asked)

    assert ask("bad") == TokeniseFailed(message="it takes longer than 1 s", is_models_fault=True)
    assert ask("x") == TokeniseFailed(message="TemplateError: no", is_models_fault=False)


# --- the whole engine ---------------------------------------------------------------------


async def test_a_template_without_end_fails_its_request_alone(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, ON_DEMAND)
    async with opened(str(tmp_path), prewarm=False) as engine:
        await engine.wait_ready()
        pid = engine.statistics().pid
        running = tuple(await admits(engine, max_tokens=500))
        turns = 0
        failed: list[str] = []

        async def ask_for_it() -> None:
            with pytest.raises(
                EngineFailed, match="chat template fails: it takes longer"
            ) as caught:
                await engine.tokenise(chat(("user", "bad")))
            failed.append(caught.value.message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for_it)
            await engine.begin(Work(admit=running, prefill_tokens=512)).report()
            while not failed:
                await engine.begin(Work(prefill_tokens=512)).report()
                turns += 1
        assert turns > 5, "the batch went on meanwhile"
        assert await engine.tokenise(chat(("user", "good")))
        assert engine.statistics().pid == pid
        assert engine.statistics().restarts == 0
        (renderer,) = psutil.Process(pid).children()
    await until(lambda: not renderer.is_running())


async def test_a_model_without_a_template_has_no_process_for_it(tmp_path: Path) -> None:
    tokenizer_with(tmp_path, None)
    async with opened(str(tmp_path), prewarm=False) as engine:
        await engine.wait_ready()
        assert psutil.Process(engine.statistics().pid).children() == []
        with pytest.raises(InvalidRequest, match="no chat template"):
            await engine.tokenise(chat(("user", "x")))


def test_starting_and_rendering_take_less_than_an_answer_may() -> None:
    renderer = Renderer()
    renderer.limit(60.0)
    assert (renderer.within_s, renderer.start_s) == (WITHIN_S, START_S)
    renderer.limit(2.0)
    assert renderer.within_s + renderer.start_s < 2.0
