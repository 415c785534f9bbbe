"""Answers that reason and call tools, in the running batch."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from mlx_lm.utils import load_tokenizer
from support.batches import admit, run, turn
from support.marked_models import saying, write_marked_model
from support.recorded_calls import TOOLS

from trio_worker.engine.models.load import load
from trio_worker.engine.read_answer import Answers, ReadAnswer
from trio_worker.engine.serve import open_batch
from trio_worker.engine.style import style_of
from trio_worker.engine.text import AnswerText, Redecoding, Vocabulary
from trio_worker.protocol.prompt import CallArguments, CallBegun, Form, Piece, Reasoning
from trio_worker.protocol.turn import FinishReason

pytestmark = pytest.mark.mlx

FORM = Form(finds_reasoning=True, tools=TOOLS)
TEXTS = {
    "hermes": (
        "<think>\nSo it is.\n</think>\n\nI look.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    ),
    "mistral": 'I look.\n[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich"}[TOOL_CALLS]now[ARGS]{}',
    "gemma": (
        "<|channel>thought\nSo it is.\n<channel|>I look.\n"
        '<|tool_call>call:get_weather{city:<|"|>Zürich<|"|>}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>"
    ),
}
CALLS = [("get_weather", {"city": "Zürich"}), ("now", {})]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Any:
    return {family: write_marked_model(tmp_path_factory.mktemp(family), family) for family in TEXTS}


@pytest.fixture(scope="module")
def hermes(folders: Any) -> Any:
    return load(str(folders["hermes"]), None, lambda *_: None)


@pytest.fixture
def batch(hermes: Any) -> Any:
    return open_batch(hermes, 0)


def form_saying(model: Any, text: str, **settings: Any) -> Form:
    return msgspec.structs.replace(FORM, grammar=saying(model.tokenizer, text), **settings)


def says(
    batch: Any, model: Any, text: str, *, form: Any = None, stop: Any = (), **settings: Any
) -> Any:
    """All outputs of a row that says just this."""
    form = msgspec.structs.replace(form or FORM, grammar=saying(model.tokenizer, text))
    return outputs_of(
        batch,
        msgspec.structs.replace(
            admit("one", stop=stop, **{"max_tokens": 300, **settings}), form=form
        ),
    )


def outputs_of(batch: Any, one: Any) -> Any:
    done, outputs = turn(batch, one), []
    while True:
        outputs += [each for each in done.outputs if each.request_id == one.request_id]
        assert not done.failures, done.failures
        if outputs and outputs[-1].finish is not None:
            return outputs
        done = turn(batch)


def text_of(outputs: Any) -> str:
    return "".join(each.text for each in outputs)


def reasoning_of(outputs: Any) -> str:
    pieces = [piece for each in outputs for piece in each.beside]
    return "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))


def calls_of(outputs: Any) -> Any:
    pieces = [piece for each in outputs for piece in each.beside]
    arguments: dict[int, str] = {}
    for piece in pieces:
        if isinstance(piece, CallArguments):
            arguments[piece.index] = arguments.get(piece.index, "") + piece.text
    begun = [piece for piece in pieces if isinstance(piece, CallBegun)]
    return [(each.name, json.loads(arguments[each.index])) for each in begun]


# --- without a model -----------------------------------------------------------------------


@pytest.mark.parametrize("by_bytes", [True, False], ids=["by bytes", "decoded again"])
@pytest.mark.parametrize("family", TEXTS)
def test_marks_are_seen_though_they_are_special_tokens(
    folders: Any, family: str, *, by_bytes: bool
) -> None:
    tokenizer = load_tokenizer(folders[family])
    vocabulary = Vocabulary(tokenizer)
    if not by_bytes:
        vocabulary._bytes, vocabulary._tokenizer = None, tokenizer
    answer = Answers(vocabulary, style_of(tokenizer)).open((), FORM)
    assert isinstance(answer, ReadAnswer)
    shown, pieces = "", list[Piece]()
    for token in tokenizer.encode(TEXTS[family], add_special_tokens=False):
        shown += answer.feed(token)[0]
        pieces += answer.aside(()).beside
    shown += answer.finish()[0]
    pieces += answer.aside(()).beside
    assert shown == "I look.\n"
    begun = [each.name for each in pieces if isinstance(each, CallBegun)]
    assert begun == ["get_weather", "now"]
    arguments = [each.text for each in pieces if isinstance(each, CallArguments)]
    assert json.loads("".join(arguments).removesuffix("{}")) == {"city": "Zürich"}
    thought = "".join(each.text for each in pieces if isinstance(each, Reasoning))
    assert thought == ("" if family == "mistral" else "So it is.")


def test_an_answer_that_asks_for_nothing_is_plain_and_shows_no_special_token(
    folders: Any,
) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    answers = Answers(Vocabulary(tokenizer), style_of(tokenizer))
    answer = answers.open((), Form(grammar="start: /a/"))
    assert isinstance(answer, AnswerText)
    tokens = tokenizer.encode(TEXTS["gemma"], add_special_tokens=False)
    shown = "".join(answer.feed(token)[0] for token in tokens)
    assert shown == "thought\nSo it is.\nI look.\ncall:get_weather{city:Zürich}call:now{}"


def test_only_special_tokens_of_the_familys_own_marks_are_shown(folders: Any) -> None:
    tokenizer = load_tokenizer(folders["gemma"])
    answer = Answers(Vocabulary(tokenizer), style_of(tokenizer)).open((), FORM)
    (start,) = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    assert answer.feed(start) == ("", False)
    redecoding = Redecoding(tokenizer, frozenset([start]))
    assert redecoding.feed(start) == ""


# --- in the batch --------------------------------------------------------------------------


def test_reasoning_content_and_calls_come_apart(batch: Any, hermes: Any) -> None:
    outputs = says(batch, hermes, TEXTS["hermes"])
    assert text_of(outputs) == "I look.\n"
    assert reasoning_of(outputs) == "So it is."
    assert calls_of(outputs) == CALLS
    assert outputs[-1].finish is FinishReason.TOOL_CALLS
    deltas = [piece for each in outputs for piece in each.beside]
    assert sum(isinstance(each, CallArguments) for each in deltas) > 5, "as they come"


def test_the_tokens_of_the_reasoning_are_told_with_its_marks(batch: Any, hermes: Any) -> None:
    outputs = says(batch, hermes, "<think>abc</think>\nx")
    is_reasoning = [each.is_reasoning for each in outputs]
    tokens = hermes.tokenizer.encode("<think>abc</think>", add_special_tokens=False)
    assert is_reasoning == [True] * len(tokens) + [False] * (len(outputs) - len(tokens))
    within = says(batch, hermes, "abc</think>", form=form_starting_in_reasoning())
    assert all(each.is_reasoning for each in within)


def form_starting_in_reasoning() -> Form:
    return msgspec.structs.replace(FORM, starts_in_reasoning=True)


def test_nothing_is_read_where_nothing_is_asked_for(batch: Any, hermes: Any) -> None:
    outputs = says(batch, hermes, "<think>a</think><tool_call>", form=Form())
    assert text_of(outputs) == "<think>a</think><tool_call>"
    assert not any(each.beside or each.is_reasoning for each in outputs)
    assert outputs[-1].finish is FinishReason.STOP


def test_an_answer_of_one_call_ends_at_its_end_mark(batch: Any, hermes: Any) -> None:
    form = msgspec.structs.replace(FORM, one_call=True)
    outputs = says(batch, hermes, TEXTS["hermes"], form=form)
    assert calls_of(outputs) == CALLS[:1]
    assert outputs[-1].finish is FinishReason.TOOL_CALLS
    assert outputs[-1].token == hermes.tokenizer.convert_tokens_to_ids("</tool_call>")
    assert batch.residents == []


def test_an_answer_that_is_cut_off_says_length_whatever_it_called(batch: Any, hermes: Any) -> None:
    whole = says(batch, hermes, TEXTS["hermes"])
    second = next(
        n
        for n, each in enumerate(whole)
        if any(isinstance(piece, CallBegun) and piece.index == 1 for piece in each.beside)
    )
    cut = says(batch, hermes, TEXTS["hermes"], max_tokens=second)
    assert cut[-1].finish is FinishReason.LENGTH
    assert calls_of(cut) == CALLS[:1]
    assert text_of(cut).startswith('I look.\n<tool_call>{"name": "now"')


def test_half_a_call_is_none_where_the_answer_is_cut_off(folders: Any) -> None:
    """A call that comes whole may be whole without its end mark, but nobody knows."""
    gemma = load(str(folders["gemma"]), None, lambda *_: None)
    text = "<|tool_call>call:now{}<tool_call|>"
    whole = says(open_batch(gemma, 0), gemma, text)
    assert calls_of(whole) == [("now", {})]
    cut = says(open_batch(gemma, 0), gemma, text, max_tokens=len(whole) - 1)
    assert (text_of(cut), calls_of(cut)) == ("<|tool_call>call:now{}", [])
    assert cut[-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize("after", ["", " So."])
def test_the_end_token_after_a_call_says_that_there_was_one(hermes: Any, after: str) -> None:
    batch = open_batch(hermes, 0)
    text = f'<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>{after}<|im_end|>'
    outputs = says(batch, hermes, text, logit_bias=())
    assert (text_of(outputs), outputs[-1].finish) == (after.strip(), FinishReason.TOOL_CALLS)


def test_stop_strings_are_looked_for_in_content_only(batch: Any, hermes: Any) -> None:
    text = (
        '<think>a STOP</think>b <tool_call>{"name": "now", "arguments": {"x": "STOP"}}</tool_call>'
    )
    outputs = says(batch, hermes, text + "c STOP d", stop=("STOP",))
    assert (text_of(outputs), reasoning_of(outputs)) == ("b c ", "a STOP")
    assert calls_of(outputs) == [("now", {"x": "STOP"})]


def test_a_stop_string_does_not_go_on_after_a_call(batch: Any, hermes: Any) -> None:
    text = 'a ST<tool_call>{"name": "now", "arguments": {}}</tool_call>OP b'
    outputs = says(batch, hermes, text, stop=("STOP",))
    assert text_of(outputs) == "a STOP b"
    shown = next(n for n, each in enumerate(outputs) if "ST" in each.text)
    begun = next(n for n, each in enumerate(outputs) if each.beside)
    assert shown >= begun, "it is held back until then"


def test_log_probabilities_are_of_content_alone(batch: Any, hermes: Any) -> None:
    text = "<think>ab</think>\n\ncde<tool_call>" + '{"name": "now", "arguments": {}}</tool_call>f'
    outputs = says(batch, hermes, text, logprobs=True, top_logprobs=2)
    told = [one for each in outputs for one in each.logprobs]
    assert "".join(one.token for one in told) == "cdef"
    assert all(len(one.top) == 2 for one in told)


def test_log_probabilities_wait_with_the_text_that_they_belong_to(batch: Any, hermes: Any) -> None:
    """A mark spelled out in text tokens is one too, and only begun it is content."""
    outputs = says(batch, hermes, "ab<t", logprobs=True)
    assert [[one.token for one in each.logprobs] for each in outputs] == [
        ["a"],
        ["b"],
        [],
        ["<", "t"],
    ]
    outputs = says(batch, hermes, "a<tx", logprobs=True)
    assert [[one.token for one in each.logprobs] for each in outputs] == [
        ["a"],
        [],
        [],
        ["<", "t", "x"],
    ]
    text = "no <tool_call>no"
    outputs = says(batch, hermes, text, logprobs=True)
    assert text_of(outputs) == text
    assert "".join(one.token for each in outputs for one in each.logprobs) == text


def test_log_probabilities_of_white_space_are_of_content_where_there_is_nothing_else(
    batch: Any, hermes: Any
) -> None:
    outputs = says(batch, hermes, "  ", logprobs=True)
    assert [len(each.logprobs) for each in outputs] == [0, 2]
    assert text_of(outputs) == "  "


def test_log_probabilities_of_parts_of_a_character_are_of_content_too(
    batch: Any, hermes: Any
) -> None:
    outputs = says(batch, hermes, "<think>é</think>é", logprobs=True)
    assert len([one for each in outputs for one in each.logprobs]) == 2
    assert text_of(outputs) == "é"


@pytest.mark.parametrize("one_call", [False, True])
def test_an_answer_goes_on_exactly_after_any_token(
    folders: Any, hermes: Any, *, one_call: bool
) -> None:
    tokenizer = hermes.tokenizer
    answers = Answers(Vocabulary(tokenizer), style_of(tokenizer))
    form = msgspec.structs.replace(FORM, one_call=one_call)
    tokens = tokenizer.encode(TEXTS["hermes"] + " é STOP b", add_special_tokens=False)

    def taken(answer: Any, tokens: Any) -> Any:
        return [(answer.feed(token), answer.aside(())) for token in tokens]

    whole = taken(answers.open(("STOP",), form), tokens)
    for cut in range(len(tokens)):
        answer = answers.open(("STOP",), form)
        answer.recall(tokens[:cut])
        assert taken(answer, tokens[cut:]) == whole[cut:], cut


def test_a_row_that_comes_back_goes_on_exactly(batch: Any, hermes: Any) -> None:
    text = '<think>So.</think>I <tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>é'
    one = msgspec.structs.replace(admit("one", max_tokens=300), form=form_saying(hermes, text))
    whole = outputs_of(batch, one)
    tokens = tuple(each.token for each in whole)
    for cut in range(1, len(tokens), 5):
        rest = outputs_of(batch, msgspec.structs.replace(one, produced=tokens[:cut]))
        assert rest == whole[cut:], cut


def test_a_row_that_is_read_changes_nothing_beside_it(batch: Any, hermes: Any) -> None:
    plain = admit("plain", temperature=1.0, seed=3)
    alone = run(batch, plain)["plain"].tokens
    form = form_saying(hermes, TEXTS["hermes"])
    read = msgspec.structs.replace(admit("read", max_tokens=100), form=form)
    assert run(batch, read, plain)["plain"].tokens == alone
