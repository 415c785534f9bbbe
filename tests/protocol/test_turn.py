"""A turn, as the worker and the engine process speak of it: defaults, words and sums."""

from __future__ import annotations

from trio_worker.ports import EngineState, EngineStatistics
from trio_worker.protocol.turn import (
    EngineInfo,
    EngineMemory,
    FinishReason,
    Output,
    Prefill,
    Report,
    RequestId,
    Sampling,
    Work,
)


def fields_of(value: Sampling | Work) -> dict[str, object]:
    return {name: getattr(value, name) for name in type(value).__annotations__}


def test_the_words_for_how_an_answer_ended() -> None:
    assert [each.value for each in FinishReason] == ["stop", "length", "tool_calls"]


def test_by_default_nothing_of_the_sampling_is_switched_on() -> None:
    assert fields_of(Sampling()) == {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": (),
        "seed": 0,
        "logprobs": False,
        "top_logprobs": 0,
    }


def test_by_default_a_turn_does_no_more_than_one_step() -> None:
    assert fields_of(Work()) == {
        "admit": (),
        "remove": (),
        "prefill_tokens": 512,
        "trim_caches": False,
    }
    output = Output(request_id=RequestId("r"), token=1, text="x")
    assert (output.finish, output.logprobs, output.beside) == (None, (), ())
    assert Prefill(request_id=RequestId("r"), done=1, total=2).cached == 0
    info = EngineInfo(
        model="m", context_length=1, vocabulary_size=2, cache_bytes_per_token=1, device="d"
    )
    assert info.accelerator == "cpu"
    reading = EngineStatistics(state=EngineState.LOADING, pid=None, restarts=0, info=None)
    assert reading.restarts_by_reason == {}


def test_the_batch_of_every_step_of_a_turn_is_known() -> None:
    def outputs(*request_ids: str) -> tuple[Output, ...]:
        return tuple(Output(request_id=RequestId(each), token=1, text="") for each in request_ids)

    def sizes(*request_ids: str) -> tuple[int, ...]:
        return Report(
            outputs=outputs(*request_ids),
            prefills=(),
            failures=(),
            residents=frozenset(),
            memory=EngineMemory(active=0, cache=0),
            seconds=0.0,
            prefill_tokens=0,
            prefill_calls=0,
            prefill_seconds=0.0,
        ).batch_sizes

    assert sizes() == ()
    assert sizes("a", "b", "c") == (3,)
    assert sizes("a", "b", "a", "b", "new") == (3, 2)
