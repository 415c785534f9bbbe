"""The part of YAML that a configuration needs, and where in the text something is wrong."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_worker.config.strict_yaml import DEPTH_MAX, Document, NotYaml, parse


def test_values_stay_what_they_look_like_and_dates_stay_text() -> None:
    text = b"""\
a: 1
b: [1.5, yes, null, text, "7", 2024-01-02, 2024-01-02 03:04:05]
c: {d: !  x, e: {}}
"""
    assert parse(text) == Document(
        value={
            "a": 1,
            "b": [1.5, True, None, "text", "7", "2024-01-02", "2024-01-02 03:04:05"],
            "c": {"d": "x", "e": {}},
        },
        lines={"a": 1, "b": 2, "c": 3, "c.d": 3, "c.e": 3},
        repeated=[],
    )


def test_nothing_is_no_value() -> None:
    for text in (b"", b"# a remark\n", b"---\n", b"\n\n"):
        assert parse(text).value is None


def test_of_a_key_written_twice_the_first_counts_and_both_lines_are_known() -> None:
    document = parse(b"a:\n  b: 1\n  c: 2\n  b: 3\na: 4\n")
    assert document.value == {"a": {"b": 1, "c": 2}}
    assert document.repeated == [("a.b", 2, 4), ("a", 1, 5)]
    assert document.lines == {"a": 1, "a.b": 2, "a.c": 3}


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}")])
def test_sixteen_levels_are_read_and_no_more(opening: str, closing: str) -> None:
    def nested(depth: int) -> bytes:
        return (opening * depth + "x" + closing * depth).encode()

    assert DEPTH_MAX == 16
    assert parse(nested(16)).value
    with pytest.raises(NotYaml, match="nested deeper than 16 levels"):
        parse(nested(17))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [1", "line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        (b"a: 1\nb: }", "line 2, column 4: expected the node content, but found '}'"),
        (b"a: &x 1", "line 1, column 4: an anchor or a tag; put text in quotes"),
        (b"a: !!str 1", "line 1, column 4: an anchor or a tag; put text in quotes"),
        (b"a: !pass 1", "line 1, column 4: an anchor or a tag; put text in quotes"),
        (b"a: !p!ss 1", "line 1, column 4: found undefined tag handle '!…'"),
        (b"\na: *x", "line 2, column 4: an alias; put text in quotes"),
        (b"a: 1\n? [b]\n: 2", "line 2, column 3: a key that is not text"),
        (b"a: 1\n---\nb: 2", "line 2, column 1: a second YAML document"),
        (b"a: \0", "unacceptable character #x0000: special characters are not allowed"),
        (b"a: 0x_", "a value that cannot be read"),
        (b"\xff", "unacceptable character #x00ff: invalid start byte"),
    ],
)
def test_what_is_wrong_and_where(text: bytes, message: str) -> None:
    with pytest.raises(NotYaml) as caught:
        parse(text)
    assert str(caught.value) == message


@given(st.text(alphabet="{}[]:,-\"'#&*!|>%@`?<=\n \tab01~.", max_size=60))
@settings(max_examples=300)
def test_no_scraps_of_yaml_raise_anything_but_not_yaml(text: str) -> None:
    with contextlib.suppress(NotYaml):
        parse(b"cluster: " + text.encode())
