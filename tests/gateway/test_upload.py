"""Files in forms."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.errors import Refused
from trio_worker.gateway.upload import read_upload

KIND = "multipart/form-data; boundary=XX"


def part(name: str, content: bytes, more: str = "") -> bytes:
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content + b"\r\n"


PURPOSE = part("purpose", b"batch")
FILE = part("file", b"{}\r\n--X\r\n", '; filename="my.jsonl"')
END = b"--XX--\r\n"


def test_a_file_is_taken_byte_by_byte() -> None:
    upload = read_upload(PURPOSE + FILE + END, KIND)
    assert (upload.filename, upload.content) == ("my.jsonl", b"{}\r\n--X\r\n")
    assert read_upload(FILE + PURPOSE + END, f"{KIND}; charset=utf-8") == upload


def test_an_expiry_is_taken_without_effect_and_a_name_is_not_needed() -> None:
    expiry = part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"3600")
    upload = read_upload(expiry + PURPOSE + part("file", b"x") + END, KIND)
    assert upload.filename == "batch.jsonl"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (PURPOSE + END, "file: it is needed"),
        (FILE + END, "purpose: it is needed"),
        (part("purpose", b"vision") + FILE + END, "expected 'batch'"),
        (PURPOSE + part("file", b" \n") + END, "it is empty"),
        (PURPOSE + FILE + FILE + END, "the form has it twice"),
        (PURPOSE + FILE + part("more", b"") + END, "'more' is not a field"),
        (PURPOSE + FILE, "the body is not a form"),
        (b"", "the body is not a form"),
        (part("x", b"") * 9 + END, "Maximum segment count"),
    ],
)
def test_what_is_no_such_form_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(said)):
        read_upload(body, KIND)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/mixed"])
def test_what_is_no_form_at_all_is_refused(kind: str) -> None:
    with pytest.raises(Refused, match="multipart/form-data"):
        read_upload(PURPOSE + FILE + END, kind)


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_whatever_the_bytes_are_it_is_a_file_or_an_error(body: bytes, kind: bytes) -> None:
    for each in (kind.decode("latin-1"), KIND):
        with suppress(InvalidRequest, Refused):
            read_upload(body, each)
