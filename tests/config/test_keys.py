"""What is read off a struct's annotations: checks and their words, schema, and the reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from trio_worker.config import generated, keys
from trio_worker.config.keys import Key, Section


class Inner(Struct, frozen=True, kw_only=True):
    ratio: Annotated[float, Meta(ge=0.0, le=1e300, description="how much")] = 0.5
    mode: Annotated[Literal["fast", "safe"], Meta(description="how", examples=["safe"])] = "fast"


class Root(Struct, frozen=True, kw_only=True):
    count: Annotated[int, Meta(ge=1, le=9, description="how many|few")] = 3
    is_on: Annotated[bool, Meta(description="whether")] = True
    name: (
        Annotated[str, Meta(min_length=1, max_length=4, pattern=r"\A\D*\Z", description="who")]
        | None
    ) = None
    password: Annotated[str, Meta(description="what opens it"), Meta(extra={"secret": True})] = "pw"
    token: Annotated[
        str,
        Meta(pattern=keys.SUBJECT_TOKEN, description="a word", extra={"derived": "the host"}),
    ] = "w1"
    subjects: Annotated[
        tuple[Annotated[str, Meta(pattern=keys.SUBJECT)], ...],
        Meta(min_length=1, max_length=2, description="where"),
    ] = ("a.b",)
    inner: Annotated[Inner | None, Meta(description="the inner part")] = None


keys._PATTERNS.setdefault(r"\A\D*\Z", "text without digits")

ROOT = keys.describe(Root)
KEYS = {each.path: each for each in ROOT.leaves()}


def test_a_struct_is_read_as_sections_and_keys() -> None:
    assert (ROOT.path, ROOT.nullable, ROOT.description) == ("", False, "")
    inner = ROOT.children["inner"]
    assert isinstance(inner, Section)
    assert (inner.path, inner.nullable, inner.description) == ("inner", True, "the inner part")
    assert [each.path for each in ROOT.sections()] == ["", "inner"]
    assert {
        path: (key.default, key.nullable, key.secret, key.derived, key.examples, key.is_text)
        for path, key in KEYS.items()
    } == {
        "count": (3, False, False, None, (), False),
        "is_on": (True, False, False, None, (), False),
        "name": (None, True, False, None, (), True),
        "password": ("pw", False, True, None, (), True),
        "token": (None, True, False, "the host", (), True),
        "subjects": (("a.b",), False, False, None, (), False),
        "inner.ratio": (0.5, False, False, None, (), False),
        "inner.mode": ("fast", False, False, None, ("safe",), False),
    }
    assert not Key(
        path="a", type=KEYS["count"].type, default=1, nullable=False, description=""
    ).secret


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("count", 1, 1),
        ("count", 9, 9),
        ("is_on", False, False),
        ("name", None, None),
        ("name", "abcd", "abcd"),
        ("name", "a\ue000", "a\ue000"),
        ("name", "a\ud7ff", "a\ud7ff"),
        ("token", None, None),
        ("subjects", ["a.>", "b.*"], ("a.>", "b.*")),
        ("inner.ratio", 0, 0.0),
        ("inner.ratio", 2**53 - 1, 2.0**53 - 1),
        ("inner.mode", "safe", "safe"),
    ],
)
def test_a_good_value_is_taken_as_the_struct_holds_it(
    path: str, value: object, accepted: object
) -> None:
    assert keys.check(KEYS[path], value) == (accepted, None)
    assert type(keys.check(KEYS[path], value)[0]) is type(accepted)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("count", 0, "0 is not in 1…9"),
        ("count", 10, "10 is not in 1…9"),
        ("count", True, "true is a truth value, not a whole number in 1…9"),
        ("count", 1.5, "1.5 is a number, not a whole number in 1…9"),
        ("is_on", "yes", '"yes" is text, not true or false'),
        ("is_on", None, "null is nothing, not true or false"),
        ("name", "", '"" is empty'),
        ("name", "abcde", '"abcde" is longer than 4 characters'),
        ("name", "a1", '"a1" is not text without digits'),
        ("name", 12, "12 is a whole number, not text without digits; put it in quotes"),
        ("name", 1.5, "1.5 is a number, not text without digits; put it in quotes"),
        ("name", True, "true is a truth value, not text without digits; put it in quotes"),
        ("name", ["a"], '["a"] is a list, not text without digits'),
        ("name", {}, "a mapping is a mapping, not text without digits"),
        ("name", "a\0", '"a\\u0000" holds a NUL or half a character'),
        ("name", "a\ud800", '"a\\ud800" holds a NUL or half a character'),
        ("name", "a\udfff", '"a\\udfff" holds a NUL or half a character'),
        ("password", 7, "the value is a whole number, not text; put it in quotes"),
        ("token", "a b", '"a b" is not 1 to 64 of the characters A-Z a-z 0-9 _ -'),
        ("subjects", [], "[] has 0 entries, not 1 to 2"),
        ("subjects", ["a", "b", "c"], '["a", "b", "c"] has 3 entries, not 1 to 2'),
        ("subjects", ["a", "a"], '["a", "a"] has "a" twice'),
        ("subjects", ["a", "b c"], '["a", "b c"] has an entry "b c" that is not a NATS subject'),
        ("subjects", "a", '"a" is text, not a list of 1 to 2, each a NATS subject'),
        ("inner.ratio", 2**53, "9007199254740992 is a whole number, not a number in 0.0…1e+300"),
        ("inner.ratio", -0.5, "-0.5 is not in 0.0…1e+300"),
        ("inner.mode", "slow", '"slow" is not one of fast, safe'),
    ],
)
def test_of_a_bad_value_is_told_what_is_wrong_and_what_was_expected(
    path: str, value: object, fault: str
) -> None:
    key = KEYS[path]
    assert keys.check(key, value) == (None, f"{fault}; expected {key.description}")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 1}, "a mapping"),
        ([1, 2, 3, 4], "[1, 2, 3, 4]"),
        ([1, 2, 3, 4, 5], "a list"),
        (["x" * 76], f'["{"x" * 76}"]'),
        (["x" * 78], f'["{"x" * 78}"]'),
        (["x" * 79], "a list"),
        (("a", "b"), '["a", "b"]'),
        ("x" * 80, f'"{"x" * 80}"'),
        ("x" * 81, f'"{"x" * 77}…"'),
        ("grün", '"grün"'),
        ("a\n\u200b", '"a\\n\\u200b"'),
        (10**20 - 1, "99999999999999999999"),
        (10**20, "a very large number"),
        (-(10**20), "a very large number"),
        (1e22, "1e+22"),
        (True, "true"),
        (None, "null"),
        ("nats://u:p@host:1", '"nats://***@host:1"'),
        ("u:p@host", '"***@host"'),
        ("a://b://u:p@q@host", '"a://b://***@host"'),
        ("u@x://host", '"u@x://host"'),
    ],
)
def test_a_value_is_shown_on_one_short_line_without_a_login(value: object, expected: str) -> None:
    assert keys.shown(value) == expected


PATHS = ("nats.url", "nats.tls.ca_file", "http.port", "http.min_size_mb", "memory.max_size_mb")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("http.prot", "http.port"),
        ("http.url", "nats.url"),
        ("nats.port", "http.port"),
        # Another way to spell a name found elsewhere is nearer than a similar neighbour.
        ("http.max-size_mb", "memory.max_size_mb"),
        ("http.maxSizeMB", "memory.max_size_mb"),
        ("http.max_size_mb", "memory.max_size_mb"),
        # A neighbour need not be as similar as a stranger.
        ("http.mix_sze", "http.min_size_mb"),
        ("nats.mix_sze", None),
        ("http.completely_different", None),
        ("url", "nats.url"),
    ],
)
def test_the_path_that_was_probably_meant(written: str, expected: str | None) -> None:
    assert keys.nearest(written, PATHS) == expected


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_equal_names_the_one_with_more_parents_in_common_is_meant(*, turned: bool) -> None:
    paths = ["a.b.size", "x.y.size"]
    for written, expected in (("a.c.size", "a.b.size"), ("x.c.size", "x.y.size")):
        assert keys.nearest(written, paths[::-1] if turned else paths) == expected
    deeper = ["a.b.size", "a.x.size"]
    assert keys.nearest("a.b.c.size", deeper[::-1] if turned else deeper) == "a.b.size"
    assert keys.nearest("b.b.size", ["c.b.size", "b.c.size"][:: -1 if turned else 1]) == "b.c.size"


def test_the_schema_says_what_the_checks_say() -> None:
    assert generated.schema(ROOT) == {
        "type": ["object", "null"],
        "properties": {
            "count": {
                "description": "how many|few",
                "type": "integer",
                "minimum": 1,
                "maximum": 9,
                "default": 3,
            },
            "is_on": {"description": "whether", "type": "boolean", "default": True},
            "name": {
                "description": "who",
                "type": ["string", "null"],
                "minLength": 1,
                "maxLength": 4,
                "pattern": r"^\D*$",
                "default": None,
            },
            "password": {"description": "what opens it", "type": "string", "default": "pw"},
            "token": {
                "description": "a word; default: the host",
                "type": ["string", "null"],
                "pattern": "^[A-Za-z0-9_-]{1,64}$",
                "default": None,
            },
            "subjects": {
                "description": "where",
                "type": "array",
                "items": {"type": "string", "pattern": r"^[^\s.*>]+(\.([^\s.*>]+|\*))*(\.>)?$"},
                "minItems": 1,
                "maxItems": 2,
                "uniqueItems": True,
                "default": ["a.b"],
            },
            "inner": {
                "description": "the inner part",
                "type": ["object", "null"],
                "properties": {
                    "ratio": {
                        "description": "how much",
                        "type": "number",
                        "minimum": 0.0,
                        "maximum": 1e300,
                        "default": 0.5,
                    },
                    "mode": {
                        "description": "how",
                        "type": "string",
                        "enum": ["fast", "safe"],
                        "default": "fast",
                        "examples": ["safe"],
                    },
                },
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    }


def test_the_reference_has_a_table_for_each_section() -> None:
    outer: Any = Section(path="", nullable=False, description="", children={"root": ROOT})
    named = keys.describe(Root, path="root", description="all of it")
    assert generated.markdown(outer) == generated.markdown(ROOT)
    assert generated.markdown(named) == (
        "### root\n\n"
        "All of it.\n\n"
        "| key | value | default | meaning |\n"
        "|---|---|---|---|\n"
        "| `root.count` | a whole number in 1…9 | `3` | How many\\|few. |\n"
        "| `root.is_on` | true or false | `true` | Whether. |\n"
        "| `root.name` | text without digits or null | `null` | Who. |\n"
        "| `root.password` | text | `pw` | What opens it. |\n"
        "| `root.token` | 1 to 64 of the characters A-Z a-z 0-9 _ - or null | the host "
        "| A word. |\n"
        '| `root.subjects` | a list of 1 to 2, each a NATS subject | `["a.b"]` | Where. |\n'
        "\n"
        "### root.inner\n\n"
        "The inner part.\n\n"
        "| key | value | default | meaning |\n"
        "|---|---|---|---|\n"
        "| `root.inner.ratio` | a number in 0.0…1e+300 | `0.5` | How much. |\n"
        "| `root.inner.mode` | one of fast, safe | `fast` | How. |\n"
    )
    assert generated.markdown(ROOT).startswith("### \n\n| key | value |"), "no word of nothing"


def test_the_words_for_the_patterns_of_the_wire() -> None:
    assert list(keys._PATTERNS.values())[:5] == [
        "text",
        "1 to 64 of the characters A-Z a-z 0-9 _ -",
        "a NATS subject",
        "the beginning of a subject, without wildcards",
        "a name without blanks, dots, slashes and wildcards",
    ]
