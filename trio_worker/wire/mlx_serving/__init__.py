"""The dialect of mlx-serving's controller: JSON with its names. Pure: bytes in, bytes out.

A request is read by `request` and answered by what `answer` and `error_reply` write, put together
in `dialect`; what a worker says of itself, so that it gets any, is in `membership`.
"""

from trio_worker.wire.mlx_serving.dialect import MlxServing
from trio_worker.wire.mlx_serving.membership import Load, Member, Status, member_id
from trio_worker.wire.mlx_serving.request import request_id_in

__all__ = ["Load", "Member", "MlxServing", "Status", "member_id", "request_id_in"]
