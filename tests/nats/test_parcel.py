"""What fits on the wire, and in which form."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from trio_worker.errors import MessageTooLarge
from trio_worker.nats.parcel import address, seal
from trio_worker.ports import Message


def on_the_wire(headers: Mapping[str, str]) -> int:
    return len(b"NATS/1.0\r\n") + sum(len(f"{k}: {v}\r\n") for k, v in headers.items()) + 2


def test_a_parcel_counts_what_the_server_counts() -> None:
    plain = seal(Message(subject="täter", body=b"12345"), max_payload=5)
    assert plain.head == "PUB täter 5\r\n".encode()
    assert (plain.body, plain.payload_bytes, plain.size) == (b"12345", 5, 11)
    assert (plain.envelope.subject, plain.envelope.reply) == ("täter", "")
    headers = {"A": "b", "Sequence": "10"}
    size = on_the_wire(headers) + 5
    full = seal(
        Message(subject="to", body=b"12345", reply="rückweg", headers=headers), max_payload=size
    )
    block = "NATS/1.0\r\nA: b\r\nSequence: 10\r\n\r\n"
    assert full.head == f"HPUB to rückweg 32 37\r\n{block}".encode()
    assert (full.body, full.payload_bytes, full.size) == (b"12345", size, size + 2 + 8)
    assert (full.envelope.subject, full.envelope.reply) == ("to", "rückweg")


@pytest.mark.parametrize("in_common", [0, 1, 2, 3])
def test_a_message_is_the_same_whatever_of_it_is_on_the_envelope(in_common: int) -> None:
    headers = [("A", " ä "), ("Sequence", "10"), ("Note", "x")]
    whole = seal(
        Message(subject="to", body=b"12345", reply="back", headers=dict(headers)), max_payload=500
    )
    envelope = address("to", "back", dict(headers[:in_common]))
    parts = envelope.seal(b"12345", dict(headers[in_common:]), max_payload=500)
    for each in (whole, parts):
        assert each.envelope.headers | each.headers == {
            "A": "%C3%A4",
            "Sequence": "10",
            "Note": "x",
        }
    assert parts.head == whole.head
    assert (parts.payload_bytes, parts.size) == (whole.payload_bytes, whole.size)


def test_a_header_is_on_the_envelope_or_on_the_message() -> None:
    envelope = address("to", None, {"A": "b"})
    with pytest.raises(ValueError, match="on the envelope too"):
        envelope.seal(b"", {"B": "c", "A": "b"}, max_payload=500)


@pytest.mark.parametrize("headers", [{}, {"A": "b"}, {"A": "", "Long": "x" * 50}])
def test_a_message_has_at_most_the_servers_limit_headers_counted(headers: dict[str, str]) -> None:
    size = 10 + (on_the_wire(headers) if headers else 0)
    message = Message(subject="s", body=b"x" * 10, headers=headers)
    assert seal(message, max_payload=size).payload_bytes == size
    with pytest.raises(MessageTooLarge) as caught:
        seal(message, max_payload=size - 1)
    assert (caught.value.size, caught.value.limit) == (size, size - 1)


@pytest.mark.parametrize("where", ["subject", "reply"])
def test_a_line_that_the_server_would_hang_up_over_is_refused(where: str) -> None:
    """The longest line is `HPUB SUBJECT REPLY HEADER_BYTES TOTAL_BYTES`, with its end."""
    headers = {"A": "b"}
    header_bytes = on_the_wire(headers)
    rest = len(f"HPUB   {header_bytes} {header_bytes + 5}\r\n") + 1
    longest = "x" * (4096 - rest)

    def message(long: str) -> Message:
        subject, reply = (long, "r") if where == "subject" else ("s", long)
        return Message(subject=subject, reply=reply, body=b"12345", headers=headers)

    seal(message(longest), max_payload=1000)
    with pytest.raises(MessageTooLarge) as caught:
        seal(message(longest + "x"), max_payload=1000)
    assert (caught.value.size, caught.value.limit) == (4097, 4096)
    with pytest.raises(MessageTooLarge):
        seal(message("ä" * (len(longest) // 2 + 1)), max_payload=1000)


@pytest.mark.parametrize("space", [" ", "\t", "\r", "\n"])
def test_white_space_would_make_two_words_of_a_subject(space: str) -> None:
    for message in (Message(subject=f"a{space}b"), Message(subject="a", reply=f"{space}b")):
        with pytest.raises(ValueError, match="white space in the subject"):
            seal(message, max_payload=10)
    with pytest.raises(ValueError, match="needs a subject"):
        seal(Message(subject=""), max_payload=10)


@pytest.mark.parametrize("name", ["", "a b", "a:", "ä", "a\n", "a\r\nb", "(", "a\x00"])
def test_what_is_no_header_name_is_refused(name: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="is not the name of a header"):
            seal(Message(subject="s", headers={name: "x"}), max_payload=100)


def test_every_sign_that_a_header_name_may_have_is_taken() -> None:
    name = "!#$%&'*+-.^_`|~09AZaz"
    sealed = seal(Message(subject="s", headers={name: "x"}), max_payload=100)
    assert sealed.envelope.headers == {name: "x"}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("", ""),
        ("as it is: 100 %, ~!", "as it is: 100 %, ~!"),
        ("  at the ends \t\r\n", "at the ends"),
        ("two\r\nlines", "two%0D%0Alines"),
        ("naïve 50%", "na%C3%AFve 50%"),
        ("\x7f\x00", "%7F%00"),
        ("half \ud83d", "half %ED%A0%BD"),
    ],
)
def test_header_values_become_printable_ascii(value: str, plain: str) -> None:
    sealed = seal(Message(subject="s", headers={"A": value}), max_payload=100)
    assert sealed.envelope.headers == {"A": plain}
    assert sealed.head.endswith(f"\r\nA: {plain}\r\n\r\n".encode())
    assert sealed.payload_bytes == on_the_wire({"A": plain})
