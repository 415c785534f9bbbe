"""Who may ask, and how much at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.errors import ConfigError
from trio_worker.gateway.errors import Refusal, Refused
from trio_worker.gateway.keys import (
    ANYBODY,
    Key,
    Keys,
    RunningRequests,
    parse_keys,
    presented_key,
)


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


FILE = f"""
# who          hash                 priority  concurrent
ann            {sha256("sk-ann")}
bob            {sha256("sk-bob")}   medium    # no more than that
batch-2        {sha256("sk-batch").upper()}  low  4
ann            {sha256("sk-ann-new")}
"""


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, name="keys_file")
    return caught.value.problems


def test_a_key_is_known_by_its_hash() -> None:
    keys = parse_keys(FILE, name="keys_file")
    ann, bob, batch = keys.who("sk-ann"), keys.who("sk-bob"), keys.who("sk-batch")
    assert ann is not None
    assert bob is not None
    assert batch is not None
    assert (ann.caller, ann.most_urgent, ann.concurrent) == ("ann", None, None)
    assert (bob.caller, bob.most_urgent, bob.concurrent) == ("bob", "medium", None)
    assert (batch.caller, batch.most_urgent, batch.concurrent) == ("batch-2", "low", 4)
    renewed = keys.who("sk-ann-new")
    assert renewed is not None
    assert renewed.caller == "ann"


@pytest.mark.parametrize("presented", [None, "", "sk-annn", "ann", sha256("sk-ann"), "\ud800"])
def test_what_is_no_key_is_nobodys(presented: str | None) -> None:
    assert parse_keys(FILE, name="keys_file").who(presented) is None
    assert parse_keys(f"ann {sha256('')}", name="k").who(None) is None


def test_without_keys_everybody_is_let_in_whatever_they_present() -> None:
    for presented in (None, "", "sk-anything"):
        assert Keys().who(presented) is ANYBODY


class Counted(tuple[Key, ...]):  # noqa: SLOT001 - such a class can have none
    """Keys that know how many of them were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Key]:
        for key in super().__iter__():
            self.looked_at += 1
            yield key


@pytest.mark.parametrize("presented", ["sk-ann", "sk-ann-new", "wrong", None])
def test_every_key_is_looked_at_whichever_matches(presented: str | None) -> None:
    """Otherwise the time of an answer would tell how far down the file a key is."""
    keys = Counted(parse_keys(FILE, name="keys_file").keys)
    Keys(keys).who(presented)
    assert keys.looked_at == len(keys) == 4


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer sk-1"}, "sk-1"),
        ({"authorization": "bearer   sk-1 "}, "sk-1"),
        ({"x-api-key": "sk-1"}, "sk-1"),
        ({"authorization": "Bearer sk-1", "x-api-key": "sk-2"}, "sk-1"),
        ({"authorization": "Basic sk-1"}, None),
        ({"authorization": "Basic sk-1", "x-api-key": "sk-2"}, "sk-2"),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "sk-1"}, None),
        ({"x-api-key": " "}, None),
        ({}, None),
    ],
)
def test_a_key_is_presented_in_either_header(headers: dict[str, str], key: str | None) -> None:
    assert presented_key(headers) == key


def test_a_wrong_key_is_refused_with_the_way_to_present_one() -> None:
    keys = parse_keys(FILE, name="keys_file")
    assert keys.admit({"x-api-key": "sk-bob"}).caller == "bob"
    with pytest.raises(Refused) as caught:
        keys.admit({"authorization": "Bearer sk-secret"})
    assert caught.value.code is Refusal.INVALID_API_KEY
    assert caught.value.headers == {"www-authenticate": "Bearer"}
    assert "sk-secret" not in caught.value.message


def test_nothing_of_a_key_is_in_what_is_logged() -> None:
    keys = parse_keys(FILE, name="keys_file")
    shown = f"{keys!r} {keys.keys[0]!r} {keys.keys[0]}"
    assert sha256("sk-ann") not in shown
    assert "digest" not in shown
    assert repr(keys.keys[0].digest) not in shown


def test_what_is_wrong_is_said_by_line_without_a_word_of_it() -> None:
    text = f"""ann
sk-secret
a.b {sha256("1")}
ann sk-secret
ann {sha256("2")} urgent
ann {sha256("3")} low 0
ann {sha256("4")} low 1 2
ann {sha256("5")}
bob {sha256("5")}
"""
    found = problems(text)
    assert [problem.split(":")[0] for problem in found] == [
        f"keys_file, line {number}" for number in (1, 2, 3, 4, 5, 6, 7, 9)
    ]
    assert "the same key as in line 8" in found[-1]
    assert "sk-secret" not in "".join(found)
    assert "shasum" in found[3]


@pytest.mark.parametrize("text", ["", "\n", "# ann\n"])
def test_a_file_without_a_key_is_refused_since_it_would_let_everybody_in(text: str) -> None:
    assert "no key" in problems(text)[0]


@given(
    st.text()
    | st.lists(st.sampled_from(["ann", sha256("1"), "low", "4", "#", "\n", " "])).map(" ".join)
)
def test_any_text_is_keys_or_a_list_of_problems(text: str) -> None:
    try:
        found = [key.caller or "" for key in parse_keys(text, name="keys_file").keys]
    except ConfigError as error:
        found = list(error.problems)
    assert found
    assert all(found)


def test_no_more_requests_of_a_caller_run_than_it_may_have() -> None:
    running = RunningRequests()
    key = Key(caller="ann", concurrent=2)
    with running.another(key):
        with running.another(key):
            with pytest.raises(Refused) as caught:
                with running.another(key):
                    pass
            assert caught.value.code is Refusal.TOO_MANY_REQUESTS
            with running.another(Key(caller="bob", concurrent=1)):
                assert running.statistics() == {"ann": 2, "bob": 1}
        with running.another(key):
            pass
        with pytest.raises(KeyError):
            with running.another(key):
                raise KeyError
    assert running.statistics() == {}


def test_nobody_is_counted_where_everybody_is_let_in() -> None:
    running = RunningRequests()
    with running.another(ANYBODY), running.another(ANYBODY):
        assert running.statistics() == {}


def test_callers_without_a_limit_are_counted_too() -> None:
    """Their number is shown, and a limit that a new file sets counts those that run already."""
    running = RunningRequests()
    with running.another(Key(caller="ann")), running.another(Key(caller="ann")):
        assert running.statistics() == {"ann": 2}
        with pytest.raises(Refused):
            with running.another(Key(caller="ann", concurrent=2)):
                pass
