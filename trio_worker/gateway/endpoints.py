"""What a gateway answers, and where.

Rule 1: until a worker has said its first word, an error has its own status; after it the stream
ends with an event that says what went wrong, and without `[DONE]`.
Rule 2: whoever leaves is cancelled here, and so at the worker.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import trio
from loguru import logger

from trio_worker.errors import InvalidRequest, NoWorker, QueueFull, RequestTimeout, WorkerError
from trio_worker.gateway import browsers
from trio_worker.gateway.answers import STREAM_HEADERS, WHOLE_HEADERS, AnswerWriter
from trio_worker.gateway.batch_pages import BatchPages
from trio_worker.gateway.counts import GatewayCounts
from trio_worker.gateway.directory import Directory
from trio_worker.gateway.errors import Refused, method_not_allowed, reply_to, unknown_path
from trio_worker.gateway.fields import Asked, Rules, read_request
from trio_worker.gateway.forward import Forward, Piece, Pieces
from trio_worker.gateway.joined import JoinedAnswer
from trio_worker.gateway.key_file import KeyFile
from trio_worker.gateway.keys import RunningRequests
from trio_worker.gateway.models import list_body, model_body
from trio_worker.gateway.shapes import Endpoint
from trio_worker.http.exchange import Exchange
from trio_worker.http.messages import Answer
from trio_worker.ports import Broker

MODELS = "/v1/models"
_FRESH = {"cache-control": "no-store", "x-content-type-options": "nosniff"}

Exposition: TypeAlias = Callable[[GatewayCounts, str], tuple[bytes, str]]
"""From counts and an Accept header to the metrics and their content type."""
Files: TypeAlias = Mapping[str, tuple[str, bytes]]
"""Content type and content by path."""
_Page: TypeAlias = Callable[["Exchange"], Awaitable[Answer | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """One gateway: an endpoint of the HTTP server, by calling it."""

    broker: Broker
    forward: Forward
    directory: Directory
    key_file: KeyFile
    running: RunningRequests
    counts: GatewayCounts
    rules: Rules
    batches: BatchPages
    exposition: Exposition
    page: Files
    page_headers: Mapping[str, str]
    cors_origins: Sequence[str]
    is_for_this_machine: bool
    """It listens on a loopback address: then nobody may call it by another name."""

    async def __call__(self, exchange: Exchange) -> Answer | None:
        """The answer, or None where it was sent in pieces."""
        headers = exchange.request.headers
        cors = browsers.cors_headers(headers, origins=self.cors_origins)
        try:
            if self.is_for_this_machine:
                browsers.require_own_name(headers)
            if exchange.request.method == "OPTIONS":
                granted = browsers.preflight_headers(headers, origins=self.cors_origins)
                return Answer(status=204, headers=granted)
            answer = await self._page_of(exchange)(exchange)
        except (WorkerError, Refused) as error:
            answer = _error(error)
        return None if answer is None else _with(answer, cors)

    # --- which page -------------------------------------------------------------------------

    def _page_of(self, exchange: Exchange) -> _Page:
        """Raises `Refused` where there is nothing, or nothing for this method."""
        path, method = exchange.request.path, exchange.request.method
        methods: tuple[str, ...]
        page: _Page
        if path in (Endpoint.CHAT, Endpoint.COMPLETIONS):
            methods, page = ("POST",), self._complete
        elif path == MODELS or path.startswith(f"{MODELS}/"):
            methods, page = ("GET", "HEAD"), self._models
        elif self.batches.takes(path):
            return self.batches
        elif path in _PROBES or path in self.page:
            methods, page = ("GET", "HEAD"), self._read
        else:
            raise unknown_path(path)
        if method not in methods:
            raise method_not_allowed(method, methods)
        return page

    async def _read(self, exchange: Exchange) -> Answer:
        request = exchange.request
        if request.path == "/health":
            return _probe("nats", is_well=self.broker.statistics().connected)
        if request.path == "/readyz":
            is_well = self.broker.statistics().connected and bool(self.directory.offers)
            return _probe("a worker", is_well=is_well)
        if request.path == "/metrics":
            body, kind = self.exposition(self.counts, request.headers.get("accept", "*/*"))
            return Answer(headers={**_FRESH, "content-type": kind}, body=body)
        kind, body = self.page[request.path]
        return Answer(headers={**self.page_headers, "content-type": kind}, body=body)

    async def _models(self, exchange: Exchange) -> Answer:
        request = exchange.request
        self.key_file.keys().admit(request.headers)
        offers = self.directory.offers
        if request.path == MODELS:
            body = list_body(offers)
        else:
            body = model_body(offers, request.path.removeprefix(f"{MODELS}/"))
        return Answer(headers={**_FRESH, **WHOLE_HEADERS}, body=body)

    # --- a request for a model --------------------------------------------------------------

    async def _complete(self, exchange: Exchange) -> Answer | None:
        """As `__call__`, of a request that a worker is to answer."""
        headers = exchange.request.headers
        request_id = secrets.token_hex(16)
        began_at = trio.current_time()
        status = "left"
        with (
            self.counts.running_request(headers.get("x-stainless-retry-count")),
            logger.contextualize(request_id=request_id),
        ):
            try:
                answer = await self._answer(exchange, request_id, began_at)
                status = "broken" if exchange.is_cut else "200"
            except (WorkerError, Refused) as error:
                status, answer = await self._fail(exchange, error, request_id)
            finally:
                if status == "left":
                    self.counts.left.add()
                else:
                    self.counts.answers.add(labels=(status,))
        return answer

    async def _answer(self, exchange: Exchange, request_id: str, began_at: float) -> Answer | None:
        """Raises what the request fails with, also after its answer has begun."""
        headers = exchange.request.headers
        browsers.require_json(headers)
        key = self.key_file.keys().admit(headers)
        with self.running.another(key):
            asked = read_request(
                Endpoint(exchange.request.path),
                await exchange.read_body(),
                headers,
                key=key,
                rules=self.rules,
                limits_of=self.directory.limits_of,
            )
            logger.debug("Request for {}, {}", asked.model or "any model", asked.endpoint)
            try:
                with self.forward.ask(
                    asked.fields,
                    request_id=request_id,
                    choices=asked.choices,
                    is_handed_on=asked.stream,
                ) as pieces:
                    if not asked.stream:
                        return await self._whole(asked, pieces, request_id, began_at)
                    await self._stream(exchange, asked, pieces, request_id, began_at)
            except NoWorker as error:
                raise self._why_nobody_takes_it(error, asked.model) from error
            except InvalidRequest as error:
                asked.spelled.put_right(error)
                raise
        return None

    def _why_nobody_takes_it(self, error: NoWorker, model: str | None) -> WorkerError:
        """Workers that are there and do not listen have no room: a full one leaves its group."""
        serving = [each for each in self.directory.offers if model in (None, each.model)]
        if not serving or not self.broker.statistics().connected:
            return error
        return QueueFull("every worker that could answer this is full, or about to stop")

    async def _whole(
        self, asked: Asked, pieces: Pieces, request_id: str, began_at: float
    ) -> Answer:
        def begin() -> JoinedAnswer:
            return JoinedAnswer(
                is_chat=asked.endpoint is Endpoint.CHAT,
                has_logprobs=asked.fields.get("logprobs", False) is not False,
                choices=asked.choices,
            )

        joined = begin()
        try:
            async for together in pieces:
                for piece in together:
                    if piece.opens == 0:
                        joined = begin()
                    if not piece.is_last:
                        joined.add(piece.body)
        except RequestTimeout as error:
            if joined.text:
                error.details["text"] = joined.text
            raise
        self.counts.first_byte.observe(trio.current_time() - began_at)
        headers = _headers(asked, request_id, piece, WHOLE_HEADERS)
        return Answer(headers=headers, body=AnswerWriter(asked).whole(joined.closing(piece.body)))

    async def _stream(
        self, exchange: Exchange, asked: Asked, pieces: Pieces, request_id: str, began_at: float
    ) -> None:
        writer = AnswerWriter(asked)
        opened = 0
        async for together in pieces:
            if not exchange.has_begun:
                cors = browsers.cors_headers(exchange.request.headers, origins=self.cors_origins)
                kind = {**STREAM_HEADERS, **cors}
                exchange.begin(200, _headers(asked, request_id, together[0], kind))
                self.counts.first_byte.observe(trio.current_time() - began_at)
            events, opened = _events(writer, together, opened)
            await exchange.send(events)

    async def _fail(
        self, exchange: Exchange, error: WorkerError | Refused, request_id: str
    ) -> tuple[str, Answer | None]:
        """What is counted, and what is answered."""
        if exchange.has_begun:
            logger.info("An answer that had begun failed: {}", error.message)
            await exchange.send(reply_to(error).event())
            return "broken", None
        answer = _with(_error(error), {"x-request-id": request_id})
        return str(answer.status), answer


_PROBES = ("/health", "/readyz", "/metrics")


def _probe(what: str, *, is_well: bool) -> Answer:
    body = msgspec.json.encode({"status": "ok" if is_well else f"{what} cannot be reached"})
    return Answer(status=200 if is_well else 503, headers={**_FRESH, **WHOLE_HEADERS}, body=body)


def _events(writer: AnswerWriter, together: Sequence[Piece], opened: int) -> tuple[bytes, int]:
    """What has come as events, and how many choices are open then.

    Another opening is that of a worker that has taken over.
    """
    events = []
    for piece in together:
        if piece.opens is not None:
            if piece.opens < opened:
                continue
            opened += 1
        events.append(writer.closing(piece.body) if piece.is_last else writer.event(piece.body))
    return b"".join(events), opened


def _headers(
    asked: Asked, request_id: str, piece: Piece, kind: Mapping[str, str]
) -> dict[str, str]:
    return {
        **kind,
        "x-request-id": request_id,
        "x-worker-id": piece.worker_id,
        **asked.ignored_header(),
    }


def _error(error: WorkerError | Refused) -> Answer:
    reply = reply_to(error)
    return Answer(status=reply.status, headers=reply.headers, body=reply.body())


def _with(answer: Answer, headers: Mapping[str, str]) -> Answer:
    if not headers:
        return answer
    return Answer(status=answer.status, headers={**answer.headers, **headers}, body=answer.body)
