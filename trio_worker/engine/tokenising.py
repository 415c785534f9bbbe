"""Turns what is asked into tokens, and what its answer is to be like into a form.

Messages, tools and a caller's variables reach the model's chat template; a template that knows no
tools is told of them in general words, where that is wanted, or refuses them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from trio_worker.engine.mended_mlx_lm import has_text_template
from trio_worker.engine.style import style_of
from trio_worker.engine.template_renderer import (
    Renderer,
    TemplateFailed,
    TemplateRefused,
    text_of,
    tokens_of,
)
from trio_worker.grammar.forms import FormRefused, callable_tools, grammar_of
from trio_worker.grammar.matching import Grammars
from trio_worker.markup.general import GENERAL_CALLS, told_of_tools
from trio_worker.markup.style import PLAIN
from trio_worker.markup.tools import tool_objects
from trio_worker.protocol.frames import Tokenise, Tokenised, TokeniseFailed
from trio_worker.protocol.prompt import (
    GENERAL_TOOL_PROMPT,
    NO_TEMPLATE_VARIABLES,
    Form,
    Message,
    Prompt,
    Tool,
    ToolCall,
    Wanted,
)

log = logging.getLogger("trio_worker.engine")

PROBE = Tool(name="a_tool_to_look_for", description="Is it told of?")
AFTER_MARK_MOST = 8
"""Tokens of white space that a template may write after the mark that begins reasoning."""


class Tokeniser:
    """Of one model. Not to be used by two threads at a time."""

    def __init__(
        self,
        tokenizer: Any,
        renderer: Renderer,
        *,
        model: str = "",
        grammars: Grammars | None = None,
        general_tool_prompt: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._model = model
        self._grammars = grammars
        self._general_tool_prompt = general_tool_prompt
        self._style = style_of(tokenizer)

    def answer(self, asked: Tokenise) -> Tokenised | TokeniseFailed:
        """The tokens of a prompt, or of messages as the model's chat template writes them."""
        try:
            prompt = self._prompt(asked)
        except FormRefused as exc:
            return TokeniseFailed(message=exc.message, field=exc.field)
        except TemplateRefused as exc:
            return TokeniseFailed(message=str(exc))
        except TemplateFailed as exc:
            log.warning("the model's chat template fails: %s", exc)
            return TokeniseFailed(message=str(exc), is_models_fault=True)
        except Exception as exc:  # noqa: BLE001 - whatever the tokenizer has against this input
            return TokeniseFailed(message=f"{type(exc).__name__}: {exc}")
        if not prompt.tokens:
            return TokeniseFailed(message="the prompt has no tokens")
        return Tokenised(prompt=prompt)

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the template tells of tools, and mlx-lm can read this model's calls."""
        if self._style.calls is None:
            return False
        message, tools = [{"role": "user", "content": "?"}], tool_objects([PROBE])
        try:
            if has_text_template(self._tokenizer):
                text = text_of(self._tokenizer, message, self._renderer, tools=tools)
            else:
                text = self._tokenizer.apply_chat_template(
                    message, tools=tools, add_generation_prompt=True, tokenize=False
                )
        except Exception as exc:  # noqa: BLE001 - a template, or a function in its place
            log.info("the chat template takes no tools: %s", exc)
            return False
        return PROBE.name in text

    def _prompt(self, asked: Tokenise) -> Prompt:
        if asked.prompt is not None:
            # Raw text has no turns in which anything is reasoned or called.
            tokens = self._tokenizer.encode(asked.prompt)
            grammar = grammar_of(asked.wanted, PLAIN, self._grammars)
            return Prompt(tokens=_numbers(tokens), form=Form(grammar=grammar))
        if not self._tokenizer.has_chat_template:
            raise TemplateRefused(
                "this model has no chat template: send `prompt` instead of `messages`"
            )
        messages: Sequence[Message] = asked.messages or ()
        wanted = asked.wanted
        is_general = bool(wanted.tools) and not self.knows_tools
        if is_general and not self._general_tool_prompt:
            raise FormRefused("tools", self._refusal())
        if self._general_tool_prompt and not self.knows_tools:
            messages = told_of_tools(messages, wanted.tools)
        tokens = tokens_of(
            self._tokenizer,
            [message_object(message) for message in messages],
            self._renderer,
            tools=None if is_general else tool_objects(wanted.tools) or None,
            variables=_variables(wanted),
        )
        return Prompt(
            tokens=_numbers(tokens),
            form=self._form(wanted, tokens, is_general=is_general),
            notes=(GENERAL_TOOL_PROMPT,) if is_general else (),
        )

    def _form(self, wanted: Wanted, tokens: Sequence[int], *, is_general: bool) -> Form:
        style = replace(self._style, calls=GENERAL_CALLS) if is_general else self._style
        finds_reasoning = style.reasoning is not None
        starts_in_reasoning = finds_reasoning and self._ends_in_reasoning(tokens)
        return Form(
            grammar=grammar_of(
                wanted, style, self._grammars, starts_in_reasoning=starts_in_reasoning
            ),
            finds_reasoning=finds_reasoning,
            starts_in_reasoning=starts_in_reasoning,
            max_reasoning_tokens=wanted.max_reasoning_tokens if finds_reasoning else None,
            tools=callable_tools(wanted),
            is_general=is_general,
            one_call=bool(wanted.tools) and not wanted.parallel_calls,
        )

    def _ends_in_reasoning(self, tokens: Sequence[int]) -> bool:
        """Whether nothing but white space comes after a mark that begins reasoning.

        What a user writes of such marks is followed by the end of their turn.
        """
        mark = list(self._tokenizer.think_start_tokens)
        tail = list(tokens[-len(mark) - AFTER_MARK_MOST :])
        for at in range(len(tail) - len(mark), -1, -1):
            if tail[at : at + len(mark)] == mark:
                return not str(self._tokenizer.decode(tail[at + len(mark) :])).strip()
        return False

    def _refusal(self) -> str:
        model = self._model or "this model"
        if has_text_template(self._tokenizer) and self._style.calls is None:
            what = f"nothing is known of how {model} writes calls of tools"
        else:
            what = f"the chat template of {model} tells of no tools"
        return f"{what}; `worker.tools: prompt` would tell of them in general words"


def message_object(message: Message) -> dict[str, Any]:
    """A message as OpenAI writes it, but for a call's arguments, which templates want as such."""
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        told["name"] = message.name
    if message.reasoning is not None:
        told["reasoning_content"] = message.reasoning
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told


def _arguments(call: ToolCall) -> Any:
    """An object; of what an earlier answer did not finish, the text."""
    try:
        return json.loads(call.arguments or "{}")
    except ValueError:
        return call.arguments


def _variables(wanted: Wanted) -> dict[str, Any]:
    """The caller's. Raises `FormRefused` for what is no variable of templates."""
    if not wanted.template_variables:
        return {}
    variables = json.loads(wanted.template_variables)
    if taken := sorted(NO_TEMPLATE_VARIABLES & variables.keys()):
        message = f"{taken[0]} is no variable of templates"
        raise FormRefused("chat_template_kwargs", message)
    if "enable_thinking" in variables:
        # Some templates know it by another name.
        variables.setdefault("thinking", variables["enable_thinking"])
    return dict(variables)


def _numbers(tokens: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(token) for token in tokens)
