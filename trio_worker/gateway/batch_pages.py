"""`/v1/files` and `/v1/batches`: many requests in a file, done whenever there is room.

Rule 1: nobody sees what another one's key has put there; for it that is not there.
Rule 2: a request that is sent again, as clients do that have not heard its answer, does nothing
again: the same request for a batch is the same batch.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import parse_qs

import msgspec
import trio
from loguru import logger
from msgspec.structs import replace

from trio_worker.errors import InvalidRequest
from trio_worker.gateway import browsers
from trio_worker.gateway.answers import WHOLE_HEADERS
from trio_worker.gateway.batch_records import (
    WINDOW_S,
    BatchRecord,
    FileRecord,
    Tally,
    batch_of_file,
    file_object,
    page_of,
)
from trio_worker.gateway.batch_store import KEEP_S, BatchStore, named, parts_of
from trio_worker.gateway.batch_tally import answer_lines, looked_after
from trio_worker.gateway.errors import (
    Refusal,
    Refused,
    method_not_allowed,
    unknown_path,
)
from trio_worker.gateway.json_body import invalid, read_object
from trio_worker.gateway.key_file import KeyFile
from trio_worker.gateway.keys import Key
from trio_worker.gateway.terms import priority_of
from trio_worker.gateway.upload import read_upload
from trio_worker.http.exchange import Exchange
from trio_worker.http.messages import Answer
from trio_worker.jetstream.api import Fault, JetStreamError
from trio_worker.wire.batch_file import URLS
from trio_worker.wire.native.faults import place_and_fault

FILES, BATCHES = "/v1/files", "/v1/batches"
UPLOADS_MAX = 2
"""Files that are read at a time, each as long as `max_file_bytes`; others wait."""
UPLOAD_S = 300.0
RUNS_MAX = 1000
"""How often the same batch may be begun again, after it was cancelled or has failed."""
_LIST_MAX = {FILES: 10_000, BATCHES: 100}
_LIST = {FILES: 10_000, BATCHES: 20}
_JSON_LINES = {"content-type": "application/jsonl", "cache-control": "no-store"}
_FRESH = {"cache-control": "no-store", **WHOLE_HEADERS}
_PRIORITY = "low"
_LEVELS = 3

_Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Page: TypeAlias = Callable[[Exchange, Key], Awaitable[Answer | None]]


class _Wanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[_Text, Annotated[str, msgspec.Meta(max_length=512)]],
            msgspec.Meta(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPages:
    """Answers the calls. Without a `store` it says what to enable."""

    store: BatchStore | None
    results: str
    """The name of the stream of answers."""
    keep_results_s: int
    key_file: KeyFile
    cors_origins: tuple[str, ...]
    max_file_bytes: int
    max_body_bytes: int
    uploads: trio.CapacityLimiter
    now: Callable[[], float]
    """Seconds since 1970."""

    def takes(self, path: str) -> bool:
        return any(path == each or path.startswith(f"{each}/") for each in (FILES, BATCHES))

    async def __call__(self, exchange: Exchange) -> Answer | None:
        """Raises what is to be answered instead."""
        key = self.key_file.keys().admit(exchange.request.headers)
        page = self._page_of(exchange)
        try:
            return await page(exchange, key)
        except JetStreamError as error:
            logger.warning("A call for a batch has failed: {}", error)
            if exchange.has_begun:
                exchange.cut("its answers cannot be read on")
                return None
            raise _unavailable(error) from error

    def _page_of(self, exchange: Exchange) -> _Page:
        """Raises `Refused` where there is nothing, or nothing for this method."""
        request = exchange.request
        kind = FILES if request.path.startswith(FILES) else BATCHES
        rest = request.path.removeprefix(kind).strip("/").split("/")
        pages: dict[str, _Page]
        match kind, rest:
            case "/v1/files", [""]:
                pages = {"POST": self._upload, "GET": self._list_files}
            case "/v1/files", [_]:
                pages = {"GET": self._file, "DELETE": self._delete_file}
            case "/v1/files", [_, "content"]:
                pages = {"GET": self._content}
            case "/v1/batches", [""]:
                pages = {"POST": self._create, "GET": self._list_batches}
            case "/v1/batches", [_]:
                pages = {"GET": self._batch}
            case "/v1/batches", [_, "cancel"]:
                pages = {"POST": self._cancel}
            case _:
                raise unknown_path(request.path)
        if request.method not in pages:
            raise method_not_allowed(request.method, tuple(pages))
        return pages[request.method]

    @property
    def _kept(self) -> BatchStore:
        if self.store is None:
            raise Refused(
                Refusal.BATCHES_NOT_ENABLED,
                "files and batches are not enabled here: they need JetStream, "
                "cluster.nats.jetstream.enabled: true, in the gateway's configuration and in that "
                "of the workers",
            )
        return self.store

    # --- files ------------------------------------------------------------------------------

    async def _upload(self, exchange: Exchange, key: Key) -> Answer:
        store, headers = self._kept, exchange.request.headers
        browsers.require_own_page(headers, origins=self.cors_origins)
        async with self.uploads:
            body = await exchange.read_body(limit_bytes=self.max_file_bytes, within_s=UPLOAD_S)
            upload = read_upload(body, headers.get("content-type", ""))
            del body
            second = int(self.now())
            record = FileRecord(
                id=f"file-{secrets.token_hex(12)}",
                caller=named(key.caller),
                filename=upload.filename,
                bytes=len(upload.content),
                created_at=second,
                expires_at=second + KEEP_S,
                parts=parts_of(upload.content),
            )
            await store.put_file(record, upload.content)
        return _told(record.told())

    async def _list_files(self, exchange: Exchange, key: Key) -> Answer:
        query = _query(exchange)
        told = [each.told() for each in await self._kept.files(key.caller)]
        for record in await self._kept.batches(key.caller):
            if record.is_over and record.failed_at is None:
                told += self._outputs(*await self._looked_after(key, record.id))
        purpose = query.get("purpose")
        told = [each for each in told if purpose in (None, each["purpose"])]
        return _told(_listed(FILES, told, query, is_newest_first=query.get("order") != "asc"))

    def _outputs(self, record: BatchRecord, tally: Tally) -> list[dict[str, Any]]:
        told = record.told(tally)
        ids = (told["output_file_id"], told["error_file_id"])
        return [self._output(record, each) for each in ids if each is not None]

    def _output(self, record: BatchRecord, file_id: str) -> dict[str, Any]:
        return file_object(
            file_id,
            filename=f"{file_id.removeprefix('file-')}.jsonl",
            # It is made when it is asked for.
            size=0,
            created_at=record.ended_at,
            expires_at=record.created_at + self.keep_results_s,
            purpose="batch_output",
        )

    async def _file(self, exchange: Exchange, key: Key) -> Answer:
        file_id = _id_in(exchange)
        if (of := batch_of_file(file_id)) is not None:
            await self._found_batch(key, of[0], file_id)
            for told in self._outputs(*await self._looked_after(key, of[0])):
                if told["id"] == file_id:
                    return _told(told)
            raise _no_such("File", file_id)
        return _told((await self._found_file(key, file_id)).told())

    async def _content(self, exchange: Exchange, key: Key) -> None:
        file_id = _id_in(exchange)
        cors = browsers.cors_headers(exchange.request.headers, origins=self.cors_origins)
        if (of := batch_of_file(file_id)) is None:
            record = await self._found_file(key, file_id)
            pieces = self._kept.content(record.id, record.parts)
        else:
            batch, _ = await self._found_batch(key, of[0], file_id)
            if not batch.is_over or batch.failed_at is not None:
                raise _no_such("File", file_id)
            pieces = answer_lines(self._kept, self.results, batch, of_errors=of[1])
        exchange.begin(200, {**_JSON_LINES, **cors})
        async for piece in pieces:
            if piece:
                await exchange.send(piece)

    async def _delete_file(self, exchange: Exchange, key: Key) -> Answer:
        file_id = _id_in(exchange)
        if batch_of_file(file_id) is not None:
            raise InvalidRequest(
                f"{file_id}: it is made of answers, which go by themselves "
                f"{self.keep_results_s} seconds after they have come; leave it",
                details={"field": "file_id"},
            )
        await self._kept.delete_file(await self._found_file(key, file_id))
        return _told({"id": file_id, "object": "file", "deleted": True})

    async def _found_file(self, key: Key, file_id: str) -> FileRecord:
        record = await self._kept.file(key.caller, file_id) if _may_be(file_id) else None
        if record is None:
            raise _no_such("File", file_id)
        return record

    # --- batches ----------------------------------------------------------------------------

    async def _create(self, exchange: Exchange, key: Key) -> Answer:
        store, headers = self._kept, exchange.request.headers
        browsers.require_json(headers)
        wanted = _wanted(read_object(await exchange.read_body(), limit_bytes=self.max_body_bytes))
        priority = headers.get("x-priority", _PRIORITY)
        priority_of(None, None, {"x-priority": priority}, key=key, levels=_LEVELS)
        await self._found_file(key, wanted.input_file_id)
        second = int(self.now())
        for run in range(RUNS_MAX):
            record = BatchRecord(
                id=_batch_id(key, wanted, run),
                caller=named(key.caller),
                input_file_id=wanted.input_file_id,
                endpoint=wanted.endpoint,
                created_at=second,
                expires_at=second + min(WINDOW_S, self.keep_results_s),
                keep_results_s=self.keep_results_s,
                priority=priority,
                most_urgent=key.most_urgent,
                metadata=wanted.metadata,
            )
            if await store.begin(record):
                return _told(record.told(record.tally))
            there, tally = await self._looked_after(key, record.id)
            if there.status not in {"failed", "cancelled", "expired"}:
                return _told(there.told(tally))
        raise InvalidRequest(f"this batch was begun {RUNS_MAX} times; send its file again")

    async def _list_batches(self, exchange: Exchange, key: Key) -> Answer:
        query = _query(exchange)
        told = [each.told(each.tally) for each in await self._kept.batches(key.caller)]
        listed = _listed(BATCHES, told, query, is_newest_first=True)
        for place, each in enumerate(listed["data"]):
            record, tally = await self._looked_after(key, each["id"])
            listed["data"][place] = record.told(tally)
        return _told(listed)

    async def _batch(self, exchange: Exchange, key: Key) -> Answer:
        record, tally = await self._looked_after(key, _id_in(exchange))
        return _told(record.told(tally))

    async def _cancel(self, exchange: Exchange, key: Key) -> Answer:
        browsers.require_own_page(exchange.request.headers, origins=self.cors_origins)
        record, tally = await self._looked_after(key, _id_in(exchange))
        if record.is_over:
            raise Refused(
                Refusal.BATCH_IS_OVER, f"{record.id} is {record.status}, and cannot be cancelled"
            )
        second = int(self.now())
        record = await self._kept.change(
            record,
            lambda now: (
                now if now.cancelling_at is not None else replace(now, cancelling_at=second)
            ),
        )
        await self._kept.ask_for(record.task())
        return _told(record.told(tally))

    async def _looked_after(self, key: Key, batch_id: str) -> tuple[BatchRecord, Tally]:
        record, sequence = await self._found_batch(key, batch_id, batch_id)
        if not record.is_over:
            # For the case that whoever kept it has gone before it came to this.
            await self._kept.ask_for(record.task())
        return await looked_after(self._kept, self.results, record, sequence, self.now)

    async def _found_batch(self, key: Key, batch_id: str, name: str) -> tuple[BatchRecord, int]:
        found = await self._kept.batch(key.caller, batch_id) if _may_be(batch_id) else None
        if found is None:
            raise _no_such("Batch" if name == batch_id else "File", name)
        return found


def _wanted(given: Mapping[str, Any]) -> _Wanted:
    try:
        return msgspec.convert(given, _Wanted)
    except msgspec.ValidationError as exc:
        where, what = place_and_fault(exc)
        if not what:
            raise InvalidRequest(f"{exc}") from exc
        if where == "endpoint":
            what = f"{what}; expected {' or '.join(URLS)}"
        raise invalid(where[:64], what) from exc


def _batch_id(key: Key, wanted: _Wanted, run: int) -> str:
    """The same for the same request: who asks again gets the same batch."""
    said = msgspec.json.encode([key.caller, wanted, run], order="sorted")
    return f"batch_{hashlib.sha256(said).hexdigest()[:24]}"


def _id_in(exchange: Exchange) -> str:
    return exchange.request.path.split("/")[3]


def _may_be(name: str) -> bool:
    """Whether it can be a word of a subject, and so the id of anything."""
    return bool(name) and len(name) <= 128 and name.replace("-", "").replace("_", "").isalnum()


def _query(exchange: Exchange) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(exchange.request.query).items()}


def _listed(
    path: str, told: list[dict[str, Any]], query: Mapping[str, str], *, is_newest_first: bool
) -> dict[str, Any]:
    text = query.get("limit", str(_LIST[path]))
    if not text.isdigit() or not 1 <= int(text) <= _LIST_MAX[path]:
        raise invalid("limit", f"expected a number from 1 to {_LIST_MAX[path]}")
    return dict(
        page_of(told, after=query.get("after"), limit=int(text), is_newest_first=is_newest_first)
    )


def _told(value: Mapping[str, Any]) -> Answer:
    return Answer(headers=_FRESH, body=msgspec.json.encode(value))


def _no_such(kind: str, name: str) -> Refused:
    return Refused(Refusal.NO_SUCH_OBJECT, f"No such {kind} object: {name[:64]}")


def _unavailable(error: JetStreamError) -> Refused:
    full = error.fault in (Fault.FULL, Fault.NO_STORAGE)
    what = "there is no room for more files at the moment" if full else "JetStream does not answer"
    return Refused(Refusal.JOBS_UNAVAILABLE, f"{what}: {error}")
