"""The command line of the engine process: `serve` for the worker, the others for people."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

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
    writing = commands.add_parser("tiny", help="write a tiny model, for `trio-worker bench`")
    writing.add_argument("name", help="the folder")
    comparing = commands.add_parser("http", help="mlx-lm's HTTP server, for `trio-worker bench`")
    comparing.add_argument("name")
    comparing.add_argument("--port", type=int, required=True)
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
    if asked.command == "http":
        from trio_worker.engine.http_baseline import run_http_server  # noqa: PLC0415

        run_http_server(asked.name, asked.port)
    from trio_worker.engine.models import CannotLoad  # noqa: PLC0415

    ways = {"prepare": _prepare, "check": _check, "bare": _baseline, "tiny": _tiny}
    try:
        return ways[asked.command](asked.name)
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


def _tiny(name: str) -> int:
    from trio_worker.engine.models.tiny import write_tiny_model  # noqa: PLC0415

    write_tiny_model(Path(name), endless=True)
    return ExitStatus.OK


def _say(step: str, done: int, total: int, unit: str) -> None:
    measure = f" {done}/{total} {unit}" if total else ""
    sys.stderr.write(f"{step}{measure}\n")


if __name__ == "__main__":
    sys.exit(main())
