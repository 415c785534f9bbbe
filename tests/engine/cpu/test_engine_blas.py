"""How MKL is set up."""

from __future__ import annotations

import pytest

from trio_worker.engine.cpu.blas import set_up_mkl

pytestmark = pytest.mark.mlx


@pytest.mark.parametrize(
    ("maker", "before", "after"),
    [
        ("GenuineIntel", {}, {}),
        ("AuthenticAMD", {}, {"MKL_CBWR": "AUTO"}),
        ("AuthenticAMD", {"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "COMPATIBLE"}),
    ],
)
def test_mkl_is_set_up_for_processors_of_other_makers(
    maker: str, before: dict[str, str], after: dict[str, str]
) -> None:
    environ = dict(before)
    set_up_mkl(environ, f"processor\t: 0\nvendor_id\t: {maker}\n")
    assert environ == after
