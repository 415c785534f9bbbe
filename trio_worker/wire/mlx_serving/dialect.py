"""The `Dialect` of one controller's request: all its messages carry that one's id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trio_worker.core.request import Request
from trio_worker.errors import WorkerError
from trio_worker.protocol.turn import RequestId
from trio_worker.wire import native
from trio_worker.wire.mlx_serving.answer import AnswerWriter
from trio_worker.wire.mlx_serving.error_reply import error_body
from trio_worker.wire.mlx_serving.request import parse_body, to_request
from trio_worker.wire.native import Fields, RequestLimits


@dataclass(frozen=True, slots=True)
class MlxServing:
    """Messages have no headers: what ends an answer stands in its body."""

    request_id: RequestId

    @property
    def AnswerWriter(self) -> type[AnswerWriter]:  # noqa: N802 - a class has this name
        return AnswerWriter

    def parse_body(self, body: bytes, limits: RequestLimits, /) -> Fields:
        return parse_body(body, limits)

    def request_id_of(self, fields: Fields, /) -> RequestId | None:
        return native.request_id_of(fields)

    def to_request(
        self,
        fields: Fields,
        limits: RequestLimits,
        /,
        *,
        request_id: RequestId,
        draw_seed: Callable[[], int],
    ) -> Request:
        return to_request(fields, limits, request_id=request_id, draw_seed=draw_seed)

    def error_body(self, error: WorkerError, _retry_after_ms: int | None, /) -> bytes:
        return error_body(error, self.request_id)

    def common_headers(self, *, request_id: RequestId, worker_id: str) -> dict[str, str]:
        del request_id, worker_id
        return {}

    def headers(
        self, *, sequence: int, terminal: bool, error: WorkerError | None = None
    ) -> dict[str, str]:
        del sequence, terminal, error
        return {}
