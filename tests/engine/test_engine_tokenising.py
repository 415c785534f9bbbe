"""What reaches the chat template, and what form an answer gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from mlx_lm.utils import load_tokenizer
from support.marked_models import write_marked_model
from support.recorded_calls import NOW, TOOLS, WEATHER
from support.tiny_model import write_tiny_model

from trio_worker.engine.grammars import open_grammars
from trio_worker.engine.style import style_of
from trio_worker.engine.template_program import TEXT_BYTES
from trio_worker.engine.template_renderer import Renderer
from trio_worker.engine.tokenising import Tokeniser, message_object
from trio_worker.markup.style import Marks
from trio_worker.markup.tools import tool_objects
from trio_worker.protocol.frames import Tokenise, Tokenised, TokeniseFailed
from trio_worker.protocol.prompt import (
    FREE,
    GENERAL_TOOL_PROMPT,
    Message,
    Prompt,
    Regex,
    Tool,
    ToolCall,
    ToolUse,
    Wanted,
)

pytestmark = pytest.mark.mlx

USER = Message(role="user", content="Weather?")
CALLED = Message(
    role="assistant",
    content="",
    reasoning="Look.",
    tool_calls=(ToolCall(id="c1", name="get_weather", arguments='{"city": "Bern"}'),),
)
RESULT = Message(role="tool", content="Sunny.", tool_call_id="c1", name="get_weather")


@pytest.fixture(scope="module")
def renderer() -> Any:
    with Renderer() as renderer:
        renderer.wait_ready()
        yield renderer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: Any) -> Any:
    folders = {
        family: write_marked_model(tmp_path_factory.mktemp(family), family)
        for family in ("hermes", "mistral", "gemma")
    }
    folders["plain"] = write_tiny_model(tmp_path_factory.mktemp("plain"))
    return {family: load_tokenizer(folder) for family, folder in folders.items()}


@pytest.fixture
def tokeniser(tokenizers: Any, renderer: Renderer) -> Tokeniser:
    return Tokeniser(tokenizers["hermes"], renderer)


def asking(*messages: Message, **wanted: Any) -> Tokenise:
    return Tokenise(prompt=None, messages=messages or (USER,), wanted=Wanted(**wanted))


def prompt_of(tokeniser: Tokeniser, *messages: Message, **wanted: Any) -> Prompt:
    answer = tokeniser.answer(asking(*messages, **wanted))
    assert isinstance(answer, Tokenised), answer
    return answer.prompt


def text_of(tokeniser: Tokeniser, *messages: Message, **wanted: Any) -> str:
    return str(tokeniser._tokenizer.decode(prompt_of(tokeniser, *messages, **wanted).tokens))


@pytest.mark.parametrize(
    ("family", "format_", "reasoning"),
    [
        ("hermes", "json_tools", Marks(start="<think>", end="</think>")),
        ("mistral", "mistral", None),
        ("gemma", "gemma4", Marks(start="<|channel>thought", end="<channel|>")),
        ("plain", None, None),
    ],
)
def test_the_style_is_what_mlx_lm_has_found(
    tokenizers: Any, family: str, format_: Any, reasoning: Any
) -> None:
    style = style_of(tokenizers[family])
    assert (style.calls.format if style.calls else None) == format_
    assert style.reasoning == reasoning


# --- messages ------------------------------------------------------------------------------


def test_a_message_is_what_openai_writes_with_arguments_as_an_object() -> None:
    assert message_object(USER) == {"role": "user", "content": "Weather?"}
    assert message_object(RESULT) == {
        "role": "tool",
        "content": "Sunny.",
        "name": "get_weather",
        "tool_call_id": "c1",
    }
    told = message_object(CALLED)
    assert told["reasoning_content"] == "Look."
    assert told["tool_calls"] == [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Bern"}},
        }
    ]


@pytest.mark.parametrize(("written", "told"), [("", {}), ('{"a": ', '{"a": '), ("{}", {})])
def test_arguments_that_were_cut_off_are_told_as_they_are(written: str, told: Any) -> None:
    call = ToolCall(id="c", name="now", arguments=written)
    message = message_object(msgspec.structs.replace(CALLED, tool_calls=(call,)))
    assert message["tool_calls"][0]["function"]["arguments"] == told


def test_earlier_calls_and_reasoning_reach_the_template(tokeniser: Tokeniser) -> None:
    text = text_of(tokeniser, USER, CALLED, RESULT)
    assert '<think>Look.</think><tool_call>{"name": "get_weather", {"city": "Bern"}' in text
    assert "tool\nSunny." in text


def test_tools_reach_the_template_as_openai_writes_them(tokeniser: Tokeniser) -> None:
    text = text_of(tokeniser, tools=TOOLS)
    told = [json.loads(line) for line in text.splitlines() if line.startswith('{"type"')]
    assert [each["function"]["name"] for each in told] == ["get_weather", "now"]
    assert told[0]["function"]["parameters"] == json.loads(WEATHER.parameters or "")
    assert "get_weather" not in text_of(tokeniser)


# --- variables -----------------------------------------------------------------------------


def test_a_callers_variables_reach_the_template(tokeniser: Tokeniser) -> None:
    assert text_of(tokeniser, template_variables='{"thinking_budget": 7}').endswith("[7]<think>\n")


def test_thinking_is_on_unless_a_caller_says_otherwise(tokeniser: Tokeniser) -> None:
    assert text_of(tokeniser).endswith("assistant\n<think>\n")
    off = text_of(tokeniser, template_variables='{"enable_thinking": false}')
    assert off.endswith("assistant\n")


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "chat_template", "conversations"]
)
def test_what_is_no_variable_of_templates_is_refused(tokeniser: Tokeniser, name: str) -> None:
    answer = tokeniser.answer(asking(template_variables=json.dumps({name: []})))
    assert answer == TokeniseFailed(
        message=f"{name} is no variable of templates", field="chat_template_kwargs"
    )


# --- the form ------------------------------------------------------------------------------


def test_an_answer_begins_in_reasoning_where_the_template_has_begun_it(
    tokeniser: Tokeniser,
) -> None:
    on = prompt_of(tokeniser).form
    assert (on.finds_reasoning, on.starts_in_reasoning) == (True, True)
    off = prompt_of(tokeniser, template_variables='{"enable_thinking": false}').form
    assert (off.finds_reasoning, off.starts_in_reasoning) == (True, False)


@pytest.mark.parametrize("says", ["what is <think>", "<think>", "<think>\n"])
def test_what_a_user_writes_of_marks_begins_no_reasoning(tokeniser: Tokeniser, says: str) -> None:
    message = Message(role="user", content=says)
    off = prompt_of(tokeniser, message, template_variables='{"enable_thinking": false}')
    assert not off.form.starts_in_reasoning


def test_a_mark_that_is_followed_by_text_has_begun_nothing(
    tmp_path: Path, renderer: Renderer
) -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokeniser = Tokeniser(tokenizer_with(tmp_path, "hermes", template), renderer)
    message = Message(role="user", content="<think>")
    assert not prompt_of(tokeniser, message).form.starts_in_reasoning


def test_reasoning_that_an_earlier_answer_ended_is_not_begun(tokeniser: Tokeniser) -> None:
    off = prompt_of(tokeniser, USER, CALLED, USER, template_variables='{"enable_thinking": false}')
    assert not off.form.starts_in_reasoning


def test_the_form_says_what_was_wanted(tokeniser: Tokeniser) -> None:
    form = prompt_of(
        tokeniser,
        tools=TOOLS,
        allowed_tools=("now",),
        parallel_calls=False,
        max_reasoning_tokens=9,
    ).form
    assert (form.tools, form.one_call, form.max_reasoning_tokens) == ((NOW,), True, 9)
    assert not form.is_general
    plain = prompt_of(tokeniser).form
    assert (plain.tools, plain.one_call, plain.max_reasoning_tokens) == ((), False, None)


def test_a_raw_prompt_is_answered_with_text(tokeniser: Tokeniser) -> None:
    answer = tokeniser.answer(Tokenise(prompt="abc <think>", messages=None))
    assert isinstance(answer, Tokenised)
    assert answer.prompt.form == FREE


def test_a_model_that_does_not_think_has_no_bound_for_it(
    tokenizers: Any, renderer: Renderer
) -> None:
    prompt = prompt_of(Tokeniser(tokenizers["plain"], renderer), max_reasoning_tokens=3)
    assert prompt.form == FREE


def test_calls_that_must_come_are_drawn_by_the_grammar_of_the_family(
    tokenizers: Any, renderer: Renderer
) -> None:
    tokenizer = tokenizers["hermes"]
    grammars = open_grammars(tokenizer, end_tokens=[2], size=512)
    tokeniser = Tokeniser(tokenizer, renderer, grammars=grammars)
    form = prompt_of(tokeniser, tools=TOOLS, tool_use=ToolUse.REQUIRED).form
    mark = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert f"<[{mark}]>" in form.grammar
    assert prompt_of(tokeniser, tools=TOOLS).form.grammar == ""
    raw = Tokenise(prompt="a", messages=None, wanted=Wanted(constraint=Regex(pattern="[ab]+")))
    answer = tokeniser.answer(raw)
    assert isinstance(answer, Tokenised)
    assert "[ab]+" in answer.prompt.form.grammar


# --- a model that knows no tools -----------------------------------------------------------


def test_tools_are_refused_where_the_template_tells_of_none(
    tokenizers: Any, renderer: Renderer
) -> None:
    tokeniser = Tokeniser(tokenizers["plain"], renderer, model="tiny")
    assert not tokeniser.knows_tools
    answer = tokeniser.answer(asking(tools=TOOLS))
    assert isinstance(answer, TokeniseFailed)
    assert answer.field == "tools"
    assert "tiny" in answer.message
    assert "worker.tools: prompt" in answer.message
    assert isinstance(tokeniser.answer(asking()), Tokenised)


def tokenizer_with(folder: Path, family: str, template: str) -> Any:
    write_marked_model(folder, family)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        pytest.param("{{ tools }}{{ messages }}", "nothing is known", id="no known format"),
        pytest.param("[TOOL_CALLS]{{ messages }}", "tells of no tools", id="tools passed over"),
        pytest.param(
            "[TOOL_CALLS]{% if tools %}{{ raise_exception('no') }}{% endif %}{{ messages }}",
            "tells of no tools",
            id="tools refused",
        ),
    ],
)
def test_a_template_is_tried_with_a_tool(
    tmp_path: Path, renderer: Renderer, template: str, why: str
) -> None:
    tokeniser = Tokeniser(tokenizer_with(tmp_path, "mistral", template), renderer)
    assert not tokeniser.knows_tools
    answer = tokeniser.answer(asking(tools=TOOLS))
    assert isinstance(answer, TokeniseFailed)
    assert why in answer.message


def test_where_it_is_wanted_tools_are_told_of_in_general_words(
    tokenizers: Any, renderer: Renderer
) -> None:
    tokeniser = Tokeniser(tokenizers["plain"], renderer, general_tool_prompt=True)
    prompt = prompt_of(tokeniser, USER, CALLED, RESULT, tools=TOOLS)
    assert prompt.notes == (GENERAL_TOOL_PROMPT,)
    assert prompt.form.is_general
    assert prompt.form.tools == TOOLS
    text = tokeniser._tokenizer.decode(prompt.tokens)
    assert text.startswith("<|im_start|>system\nYou may call functions")
    assert "<tool_response>\nSunny.\n</tool_response>" in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}' in text
    later = prompt_of(tokeniser, USER, CALLED, RESULT)
    assert (later.notes, later.form) == ((), FREE)
    assert "<tool_response>" in tokeniser._tokenizer.decode(later.tokens)


def test_a_template_that_refuses_tools_is_given_none(tmp_path: Path, renderer: Renderer) -> None:
    template = "{% if tools %}{{ raise_exception('no') }}{% endif %}{{ messages }}"
    tokeniser = Tokeniser(
        tokenizer_with(tmp_path, "hermes", template), renderer, general_tool_prompt=True
    )
    assert prompt_of(tokeniser, tools=TOOLS).form.is_general


def test_a_template_that_tells_of_tools_is_not_replaced_by_general_words(
    tokenizers: Any, renderer: Renderer
) -> None:
    tokeniser = Tokeniser(tokenizers["hermes"], renderer, general_tool_prompt=True)
    prompt = prompt_of(tokeniser, tools=TOOLS)
    assert (prompt.notes, prompt.form.is_general) == ((), False)


def test_large_tools_are_no_excess_of_the_template(renderer: Renderer) -> None:
    """A text may be longer than its messages when it tells of tools."""
    template = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    tools = tool_objects([Tool(name=f"tool_{n}", description="é" * 50_000) for n in range(100)])
    text = renderer.render([message_object(USER)], template, {}, tools)
    assert len(text) > TEXT_BYTES
