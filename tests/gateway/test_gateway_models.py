"""The models there are, by the workers' own words."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.errors import ModelNotFound
from trio_worker.gateway.models import (
    Limits,
    Offer,
    limits_of,
    list_body,
    model_body,
    read_offer,
)

INFO = {
    "type": "io.nats.micro.v1.info_response",
    "name": "trio-worker",
    "id": "w1",
    "version": "0.1.0",
    "metadata": {
        "worker_id": "w1",
        "model": "demo",
        "context_length": "8192",
        "device": "simulated",
        "priority_levels": "5",
        "max_tokens_limit": "4096",
        "timeout_limit_ms": "600000",
    },
    "endpoints": [],
}
OFFERS = [
    Offer(
        worker_id="w1",
        model="big",
        since=20,
        context_length=8192,
        max_tokens_limit=4096,
        timeout_limit_ms=600_000,
        priority_levels=5,
    ),
    Offer(
        worker_id="w2",
        model="big",
        since=10,
        context_length=4096,
        max_tokens_limit=8000,
        timeout_limit_ms=900_000,
    ),
    Offer(worker_id="w3", model="a-small", since=30, max_tokens_limit=100),
]


def test_a_workers_metadata_is_read_as_the_numbers_it_is() -> None:
    assert read_offer(msgspec.json.encode(INFO), since=7) == Offer(
        worker_id="w1",
        model="demo",
        since=7,
        context_length=8192,
        max_tokens_limit=4096,
        timeout_limit_ms=600_000,
        priority_levels=5,
    )


def test_what_a_worker_does_not_say_is_not_known() -> None:
    info = {"metadata": {"worker_id": "w1", "model": "demo"}}
    assert read_offer(msgspec.json.encode(info), since=7) == Offer(
        worker_id="w1", model="demo", since=7
    )


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"{}",
        b'{"metadata": null}',
        b'{"metadata": {"model": "demo"}}',
        b'{"metadata": {"worker_id": "w1", "model": "demo", "context_length": "long"}}',
        b'{"metadata": {"worker_id": "w1", "model": "demo", "context_length": "0"}}',
    ],
)
def test_what_no_worker_says_is_passed_over(info: bytes) -> None:
    assert read_offer(info, since=7) is None


@given(st.binary(max_size=100))
def test_any_bytes_are_an_offer_or_none(info: bytes) -> None:
    assert read_offer(info, since=7) is None


def test_the_least_that_a_worker_allows_is_what_holds() -> None:
    assert limits_of(OFFERS, "big") == Limits(
        max_tokens=4096, timeout_ms=600_000, priority_levels=3
    )
    assert limits_of(OFFERS, "a-small") == Limits(max_tokens=100)
    assert limits_of(OFFERS, None).max_tokens == 100


def test_where_no_worker_is_known_nothing_is() -> None:
    assert limits_of([], "big") == limits_of([], None) == Limits()


def test_an_unknown_model_names_those_that_there_are() -> None:
    with pytest.raises(ModelNotFound, match=r"gpt-9; there is: a-small, big$") as caught:
        limits_of(OFFERS, "gpt-9")
    assert caught.value.details == {"field": "model"}
    with pytest.raises(ModelNotFound, match="no worker is known"):
        model_body([], "big")
    many = [Offer(worker_id=f"w{n}", model=f"m{n:02}", since=1) for n in range(20)]
    with pytest.raises(ModelNotFound, match=r"m15, …$"):
        model_body(many, "x" * 1000)


def test_models_are_listed_by_name() -> None:
    assert msgspec.json.decode(list_body(OFFERS)) == {
        "object": "list",
        "data": [
            {
                "id": "a-small",
                "object": "model",
                "created": 30,
                "owned_by": "trio-worker",
                "max_model_len": None,
            },
            {
                "id": "big",
                "object": "model",
                "created": 10,
                "owned_by": "trio-worker",
                "max_model_len": 4096,
            },
        ],
    }
    assert msgspec.json.decode(list_body([])) == {"object": "list", "data": []}


def test_one_model_is_told_as_in_the_list() -> None:
    listed = msgspec.json.decode(list_body(OFFERS))["data"]
    assert [msgspec.json.decode(model_body(OFFERS, each["id"])) for each in listed] == listed
