"""What a simulated engine says under a form: reasoning, calls, and what keeps to a grammar."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from trio_worker.protocol.prompt import CallArguments, CallBegun, Form, Reasoning, Tool
from trio_worker.protocol.turn import (
    Admit,
    FinishReason,
    Output,
    RequestId,
    Sampling,
    TokenLogprob,
    Work,
)
from trio_worker.simulated.batch import SimulatedBatch
from trio_worker.simulated.speech import THOUGHTS_MAX, Speaker, answer_tokens, token_said, word

VOCABULARY = 1000
TOOLS = (Tool(name="look_up"), Tool(name="add"))


@dataclass(slots=True)
class Heard:
    text: str = ""
    reasoning: str = ""
    arguments: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    reasoning_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None

    def add(self, output: Output) -> None:
        self.text += output.text
        self.tokens.append(output.token)
        self.reasoning_tokens += output.is_reasoning
        self.logprobs += output.logprobs
        self.finish = output.finish
        for piece in output.beside:
            match piece:
                case Reasoning(text=text):
                    self.reasoning += text
                case CallBegun(index=index, name=name):
                    assert index not in self.names
                    self.names[index] = name
                case CallArguments(index=index, text=text):
                    self.arguments[index] = self.arguments.get(index, "") + text

    @property
    def calls(self) -> list[tuple[str, str]]:
        return [(name, self.arguments[index]) for index, name in sorted(self.names.items())]


def heard(
    words: str = "hello",
    *,
    form: Form,
    seed: int = 1,
    max_tokens: int = 100,
    produced: tuple[int, ...] = (),
    stop: tuple[str, ...] = (),
    **sampling: Any,
) -> Heard:
    batch = SimulatedBatch(vocabulary=VOCABULARY, prefix_cache_tokens=0)
    admit = Admit(
        request_id=RequestId("one"),
        prompt=batch.tokens_of(words),
        produced=produced,
        max_tokens=max_tokens,
        sampling=Sampling(seed=seed, **sampling),
        stop=stop,
        form=form,
    )
    batch.take_in(Work(admit=(admit,)))
    batch.prefill(10_000)
    all_of_it = Heard()
    while batch.residents:
        (output,) = batch.step(batch.decoding())
        all_of_it.add(output)
    return all_of_it


def test_it_thinks_before_it_answers_where_reasoning_is_looked_for() -> None:
    said = heard(form=Form(finds_reasoning=True), max_tokens=40)
    assert 0 < len(said.reasoning.split()) <= THOUGHTS_MAX
    assert said.reasoning_tokens == len(said.reasoning.split()) + 2, "and its two marks"
    assert len(said.text.split()) == 40 - said.reasoning_tokens
    assert "think" not in said.text + said.reasoning
    assert said.finish is FinishReason.LENGTH


def test_it_thinks_no_more_than_it_may() -> None:
    for seed in range(8):
        said = heard(form=Form(finds_reasoning=True, max_reasoning_tokens=2), seed=seed)
        assert len(said.reasoning.split()) <= 2


def test_it_calls_the_tools_that_it_is_told_of_by_name() -> None:
    form = Form(tools=TOOLS)
    said = heard("please look_up this and add that", form=form)
    assert said.calls == [("look_up", "{}"), ("add", "{}")]
    assert said.finish is FinishReason.TOOL_CALLS
    assert "tool_call" not in said.text
    assert heard("just talk", form=form).calls == []
    assert heard("just talk", form=form).finish is FinishReason.LENGTH


def test_where_one_call_is_wanted_it_ends_there() -> None:
    said = heard("look_up add", form=Form(tools=TOOLS, one_call=True))
    assert [name for name, _ in said.calls] == ["look_up"]
    assert said.finish is FinishReason.TOOL_CALLS


def test_a_call_that_is_cut_off_is_no_whole_answer() -> None:
    whole = heard("look_up", form=Form(tools=TOOLS))
    cut = heard("look_up", form=Form(tools=TOOLS), max_tokens=len(whole.tokens) - 1)
    assert cut.finish is FinishReason.LENGTH


def test_a_stop_string_is_looked_for_in_the_answer_alone() -> None:
    form = Form(finds_reasoning=True)
    free = heard(form=form)
    of_thoughts, of_answer = free.reasoning.split()[0], free.text.split()[1]
    assert of_thoughts not in free.text
    assert heard(form=form, stop=(of_thoughts,)) == free
    stopped = heard(form=form, stop=(of_answer,))
    assert stopped.text == free.text[: free.text.index(of_answer)]
    assert stopped.finish is FinishReason.STOP


@pytest.mark.parametrize(
    ("words", "form"),
    [
        ("hello", Form(finds_reasoning=True)),
        ("look_up and add", Form(tools=TOOLS, finds_reasoning=True)),
        ("hello", Form(grammar='start: "a" /[b-z]{9,20}/\n', finds_reasoning=True)),
    ],
    ids=["reasoning", "calls", "grammar"],
)
def test_what_comes_back_goes_on_at_any_token(words: str, form: Form) -> None:
    whole = heard(words, form=form, logprobs=True)
    for cut in range(len(whole.tokens)):
        begun = heard(words, form=form, max_tokens=cut, logprobs=True) if cut else Heard()
        rest = heard(words, form=form, produced=tuple(whole.tokens[:cut]), logprobs=True)
        assert whole.tokens == [*begun.tokens, *rest.tokens]
        assert whole.finish == rest.finish
        assert whole.text.endswith(rest.text)
        assert whole.reasoning.endswith(rest.reasoning)


def test_log_probabilities_are_of_the_text_alone() -> None:
    form = Form(finds_reasoning=True)
    said = heard(form=form, max_tokens=30, logprobs=True)
    assert "".join(each.token for each in said.logprobs) == said.text
    assert heard("look_up", form=Form(tools=TOOLS), logprobs=True, seed=3).text.split() == [
        each.token.strip()
        for each in heard("look_up", form=Form(tools=TOOLS), logprobs=True, seed=3).logprobs
    ]


def test_an_answer_that_may_be_anything_is_its_words() -> None:
    said = heard(form=Form(), max_tokens=5, seed=7)
    prompt = (Speaker(VOCABULARY).token_of("hello"),)
    assert said.tokens == answer_tokens(prompt, 7, 5, VOCABULARY)
    assert said.text == "".join(f"{word(token)} " for token in said.tokens)


def test_what_it_has_said_is_read_as_the_tokens_it_was() -> None:
    """So a conversation that goes on begins with what is in the cache."""
    said = heard(form=Form(), max_tokens=50, seed=7)
    speaker = Speaker(VOCABULARY)
    assert [speaker.token_of(each) for each in said.text.split()] == said.tokens


def test_only_its_own_words_are_read_so() -> None:
    assert token_said(word(0)) == 0
    assert token_said(word(907)) == 907
    for text in ("", "b", "hello", "bab", word(0) + word(7), "Debago", "de" * 10_000):
        assert token_said(text) is None
    assert Speaker(100).token_of(word(907)) < 100
    assert Speaker(100).token_of("de" * 10_000) < 100
