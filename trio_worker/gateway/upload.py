"""Reads an uploaded file out of a form: `multipart/form-data`, as clients of OpenAI's API send it.

Here is all that knows the library which takes forms apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import multipart

from trio_worker.errors import InvalidRequest
from trio_worker.gateway.errors import Refusal, Refused

PURPOSE = "batch"
"""The only use for files that there is."""
_FIELDS = ("file", "purpose")
_WITHOUT_EFFECT = ("expires_after[anchor]", "expires_after[seconds]")
_PARTS_MAX = 8
_FILENAME_MAX = 256
"""Characters that are kept of a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file of requests that somebody has sent."""

    filename: str
    content: bytes


def read_upload(body: bytes, content_type: str) -> Upload:
    """The file in a form.

    Raises `Refused` for another kind of body, and `InvalidRequest` for a form without a file, with
    another purpose, with other fields, or that breaks off.
    """
    kind, options = multipart.parse_options_header(content_type)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise Refused(
            Refusal.UNSUPPORTED_MEDIA_TYPE,
            "a file is sent as a form: Content-Type: multipart/form-data with the fields file and "
            "purpose, as curl -F does",
        )
    parts: dict[str, bytes] = {}
    filename = ""
    try:
        for segment, content in _parts(body, options["boundary"]):
            name = segment.name or ""
            if name in parts:
                raise InvalidRequest(f"{name[:64]}: the form has it twice", details={"field": name})
            if name not in (*_FIELDS, *_WITHOUT_EFFECT):
                raise InvalidRequest(
                    f"{name[:64]!r} is not a field of this form; send file and purpose",
                    details={"field": name[:64]},
                )
            parts[name] = content
            if name == "file":
                filename = segment.filename or ""
    except multipart.MultipartError as exc:
        raise InvalidRequest(f"the body is not a form: {exc}") from exc
    return _upload(parts, filename)


def _upload(parts: dict[str, bytes], filename: str) -> Upload:
    for field in _FIELDS:
        if field not in parts:
            raise InvalidRequest(f"{field}: it is needed, and not there", details={"field": field})
    purpose = parts["purpose"].decode("utf-8", "replace")
    if purpose != PURPOSE:
        raise InvalidRequest(
            f"purpose: {purpose[:64]!r}; files are for batches here: expected {PURPOSE!r}",
            details={"field": "purpose"},
        )
    if not parts["file"].strip():
        raise InvalidRequest("file: it is empty", details={"field": "file"})
    return Upload(filename=filename[:_FILENAME_MAX] or "batch.jsonl", content=parts["file"])


def _parts(body: bytes, boundary: str) -> list[tuple[multipart.MultipartSegment, bytes]]:
    parts: list[tuple[multipart.MultipartSegment, bytes]] = []
    content = bytearray()
    with multipart.PushMultipartParser(
        boundary, content_length=len(body), max_segment_count=_PARTS_MAX, strict=True
    ) as parser:
        for event in parser.parse(body):
            if isinstance(event, multipart.MultipartSegment):
                content = bytearray()
                segment = event
            elif event is None:
                parts.append((segment, bytes(content)))
            else:
                content += event
    return parts
