"""The command line of the engine process: `serve` for the worker, the others for people."""

from __future__ import annotations

import argparse
import logging
import os
import sys

from trio_worker.engine.cpu.blas import preload_blas
from trio_worker.engine.sockets import Line
from trio_worker.engine.template_renderer import Renderer
from trio_worker.errors import ExitStatus


def main() -> int:
    """Do what the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(prog="trio_worker.engine")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve the worker at the other end of two sockets")
    serving.add_argument("--control-fd", type=int, required=True)
    serving.add_argument("--tokenise-fd", type=int, required=True)
    preparing = commands.add_parser("prepare", help="download and convert a model, and say where")
    preparing.add_argument("name")
    checking = commands.add_parser("check", help="compare a model's answers alone and batched")
    checking.add_argument("name")
    baseline = commands.add_parser("bare", help="mlx-lm's own loop, for `trio-worker bench`")
    baseline.add_argument("name")
    asked = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Before anything imports mlx.core, hence also the imports below.
    preload_blas()
    if asked.command == "serve":
        control, tokenising = Line(asked.control_fd), Line(asked.tokenise_fd)
        control.leave_when_hung_up()
        renderer = Renderer()
        renderer.start()
        from trio_worker.engine.serve import serve  # noqa: PLC0415

        serve(control, tokenising, renderer)
    from trio_worker.engine.models import CannotLoad  # noqa: PLC0415

    try:
        return {"prepare": _prepare, "check": _check, "bare": _baseline}[asked.command](asked.name)
    except CannotLoad as exc:
        sys.stderr.write(f"{exc}\n")
        return ExitStatus.CONFIG


def _prepare(name: str) -> int:
    from trio_worker.engine.models.resolve import resolve  # noqa: PLC0415

    sys.stdout.write(f"{resolve(name, _say)}\n")
    return ExitStatus.OK


def _check(name: str) -> int:
    from trio_worker.engine.models.check import PROMPTS, check  # noqa: PLC0415
    from trio_worker.engine.models.load import load  # noqa: PLC0415

    model = load(name, None, _say)
    differing = check(model)
    for line in differing:
        sys.stdout.write(f"{line}\n")
    if differing:
        sys.stdout.write(f"{name} does not batch correctly on {model.device}\n")
        return 1
    sys.stdout.write(
        f"{name} batches correctly on {model.device}: {len(PROMPTS)} prompts, same tokens\n"
    )
    return ExitStatus.OK


def _baseline(name: str) -> int:
    from trio_worker.engine.baseline import run_baseline  # noqa: PLC0415
    from trio_worker.engine.models.load import load  # noqa: PLC0415

    run_baseline(load(name, None, _say))
    return ExitStatus.OK


def _say(step: str, done: int, total: int, unit: str) -> None:
    measure = f" {done}/{total} {unit}" if total else ""
    sys.stderr.write(f"{step}{measure}\n")


if __name__ == "__main__":
    sys.exit(main())
