"""The command line."""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import trio
from loguru import logger

from trio_worker import __version__
from trio_worker.client import Client, open_client
from trio_worker.config import (
    VARIABLE_PREFIX,
    Config,
    Loaded,
    effective_yaml,
    json_schema,
    load_config,
    load_with_sources,
    quoted,
    warnings,
)
from trio_worker.deploy import unit as units
from trio_worker.errors import ConfigError, ExitStatus, NoWorker, StopWorker, WorkerError
from trio_worker.exception_groups import sole_exceptions
from trio_worker.launch import launch, login_of
from trio_worker.logs import FORMATS, LEVELS, Terminal, set_up_logging
from trio_worker.ports import Broker

HELLO = "What is the capital of France?"
ANSWERED_WITH_AN_ERROR = 1
BENCH_PARTS = {
    "engine": ("batching", "bare", "prefix", "seeds", "newcomer", "mixing"),
    "scheduling": ("overhead", "priority", "preemption"),
}
INTERRUPTED = 128 + signal.SIGINT


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    args = make_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except StopWorker as exc:
        _say_why(exc)
        return exc.status
    except BaseExceptionGroup as group:
        return _report(group)
    except KeyboardInterrupt:
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trio-worker",
        description="Serve a language model with Apple MLX to callers on NATS.",
    )
    parser.add_argument("--version", action="version", version=f"trio-worker {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a worker until it is told to stop")
    _add_config(run)
    run.add_argument(
        "--engine",
        choices=("mlx", "simulated"),
        default="mlx",
        help="the model, or an engine that needs none and answers with made-up words",
    )
    run.add_argument(
        "--hello", action="store_true", help="ask one question over NATS once the worker is ready"
    )
    run.add_argument(
        "--log-format",
        choices=FORMATS,
        default="auto",
        help="auto: JSON under systemd and launchd, for people otherwise",
    )
    run.add_argument("--log-level", choices=LEVELS, default="info")
    run.set_defaults(command=_run)

    ask = commands.add_parser("ask", help="ask a running worker")
    ask.add_argument("prompt", metavar="PROMPT")
    _add_config(ask)
    ask.add_argument("--url", help="where NATS listens, instead of the configuration's")
    ask.add_argument("--worker", metavar="ID", help="this worker, instead of any")
    ask.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the answer while it is made",
    )
    ask.add_argument("--priority", help="high, medium, low, or the number of a level")
    ask.add_argument("--max-tokens", type=int, metavar="N", help="the longest answer")
    ask.add_argument("--seed", type=int, metavar="N", help="makes the answer repeatable")
    ask.add_argument("--temperature", type=float, metavar="T", help="0…2; 0 is greedy")
    ask.add_argument(
        "--timeout", type=float, metavar="S", default=30.0, help="seconds until the end (30)"
    )
    ask.add_argument("--json", action="store_true", help="print every message as it came")
    ask.add_argument(
        "--inbox-prefix",
        metavar="PREFIX",
        default="_INBOX",
        help="answers come below this subject (_INBOX); for accounts with inboxes of their own",
    )
    ask.set_defaults(command=_ask)

    check = commands.add_parser(
        "check-config",
        help="check the configuration and print it whole, with where each value comes from",
    )
    _add_config(check)
    check.set_defaults(command=_check_config)

    schema = commands.add_parser("schema", help="print the JSON Schema of cluster.yaml")
    schema.set_defaults(command=_schema)

    _add_unit(commands)

    model = commands.add_parser("model", help="prepare or check a model")
    actions = model.add_subparsers(required=True, metavar="ACTION")
    for action, text in (
        ("prepare", "download and convert a model, and say where it is"),
        ("check", "compare a model's greedy answers alone and in a batch"),
    ):
        each = actions.add_parser(action, help=text)
        each.add_argument("name", metavar="NAME")
        each.set_defaults(command=partial(_model, action))

    bench = commands.add_parser("bench", help="measure a worker on this machine")
    _add_config(bench)
    bench.add_argument(
        "what",
        nargs="?",
        default="batching",
        choices=(*BENCH_PARTS, *itertools.chain(*BENCH_PARTS.values())),
        help="batching: eight requests together against one at a time; bare: against mlx-lm's own "
        "loop; prefix: with and without reuse; seeds: half of them against none; mixing: against "
        "greedy requests only; "
        "newcomer: gaps beside a long prompt; engine: all of these; overhead: the core's "
        "operations; priority: an urgent request among many; preemption: what it costs; "
        "scheduling: these three",
    )
    bench.add_argument("--engine", choices=("mlx", "simulated"), default="mlx")
    bench.add_argument("--max-tokens", type=int, metavar="N", default=64)
    bench.add_argument("--rounds", type=int, metavar="N", default=3)
    bench.set_defaults(command=_bench)
    return parser


def _add_unit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    unit = commands.add_parser(
        "unit", help="print a unit that runs a worker of this installation as a service"
    )
    managers = unit.add_subparsers(required=True, metavar="MANAGER")
    for manager, text in (
        ("systemd", "a unit for systemd, on Linux"),
        ("launchd", "an agent for launchd, on macOS"),
    ):
        each = managers.add_parser(manager, help=text)
        _add_config(each)
        each.add_argument(
            "--name",
            default=units.NAME,
            help=f"of the service ({units.NAME}); each worker on a machine needs its own",
        )
        each.add_argument("--engine", choices=("mlx", "simulated"), default="mlx")
        each.set_defaults(command=partial(_unit, manager))
        if manager == "systemd":
            whose = each.add_mutually_exclusive_group()
            whose.add_argument(
                "--user", action="store_true", help="a service of your own manager, without root"
            )
            whose.add_argument(
                "--as",
                dest="run_as",
                metavar="USER",
                help="whom the machine's manager runs it as (you; for root, a user made for it)",
            )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a cluster.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override one key, such as worker.model=models/mine; may be repeated",
    )


def _load(args: argparse.Namespace) -> Config:
    return _load_with_sources(args).config


def _load_with_sources(args: argparse.Namespace) -> Loaded:
    return load_with_sources(
        args.config,
        environ=os.environ,
        overrides=args.overrides,
        hostname=socket.gethostname(),
    )


# --- run ----------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    # A watchdog ends a worker that hangs with SIGABRT: this says where it was.
    faulthandler.enable()
    terminal = set_up_logging(log_format=args.log_format, level=args.log_level)
    config = _load(args)
    for warning in warnings(config, total_memory_bytes=psutil.virtual_memory().total):
        logger.warning("{}", warning)
    trio.run(_serve, config, args, terminal)
    return ExitStatus.OK


async def _serve(config: Config, args: argparse.Namespace, terminal: Terminal) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            await launch(
                config,
                engine=args.engine,
                stops=signals,
                on_progress=terminal.progress,
                on_ready=lambda _: terminal.end_progress(),
                greet=partial(_hello, config) if args.hello else None,
            )
        finally:
            terminal.end_progress()


async def _hello(config: Config, broker: Broker) -> None:
    """Ask one question as any caller would, show the answer, and say how to ask more."""
    request = {"messages": [{"role": "user", "content": HELLO}], "max_tokens": 64}
    sys.stdout.write(f"\n> {HELLO}\n")
    try:
        await _show(Client(broker), request, config.worker.id)
    except WorkerError as error:
        sys.stdout.write(f"{error.code}: {error.message}\n")
    sys.stdout.write(
        "\nAsk from another terminal:\n"
        '  uv run just ask "Why is the sky blue?"    or    '
        f'trio-worker ask --url {config.nats.url} "…"\n'
        "Ctrl-C stops the worker.\n\n"
    )
    sys.stdout.flush()


async def _show(client: Client, request: Mapping[str, Any], worker_id: str | None) -> None:
    """Stream an answer to standard output, and a line about it."""
    async with client.ask({"stream": True, **request}, worker_id=worker_id) as answer:
        async for chunk in answer:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    assert chunk.usage is not None
    assert chunk.worker is not None
    seconds = (chunk.worker["prefill_ms"] + chunk.worker["decode_ms"]) / 1000
    sys.stdout.write(
        f"\n({chunk.usage['completion_tokens']} tokens in {seconds:.1f} s, "
        f"seed {chunk.worker['seed']}, worker {chunk.worker['id']})\n"
    )


# --- ask ----------------------------------------------------------------------------------


def _ask(args: argparse.Namespace) -> int:
    set_up_logging(log_format="human", level="error")
    config = _load(args)
    url = args.url or config.nats.url
    try:
        if not trio.run(_ask_until_interrupted, args, config, url):
            sys.stderr.write("\nCancelled.\n")
            return INTERRUPTED
    except NoWorker as error:
        sys.stderr.write(
            f"No worker answered on {url}: {error.message}. `just run` starts one; it answers "
            "once its model is loaded.\n"
        )
        return ExitStatus.UNAVAILABLE
    except trio.TooSlowError:
        sys.stderr.write(
            f"No worker answered on {url} within {args.timeout:g} s: "
            "NATS could not be reached. `just run` starts it, and a worker.\n"
        )
        return ExitStatus.UNAVAILABLE
    except WorkerError as error:
        retry = f" (retry after {error.retry_after_ms} ms)" if error.retry_after_ms else ""
        sys.stderr.write(f"{error.code}: {error.message}{retry}\n")
        return ANSWERED_WITH_AN_ERROR
    return ExitStatus.OK


async def _ask_until_interrupted(args: argparse.Namespace, config: Config, url: str) -> bool:
    """Ask and show; False if Ctrl-C ended it. Leaving the answer cancels it at the worker."""
    answered = False
    with sole_exceptions(), trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel_at_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel(reason="interrupted")

            nursery.start_soon(cancel_at_signal)
            await _ask_and_show(args, config, url)
            answered = True
            nursery.cancel_scope.cancel(reason="answered")
    return answered


async def _ask_and_show(args: argparse.Namespace, config: Config, url: str) -> None:
    request: dict[str, Any] = {"messages": [{"role": "user", "content": args.prompt}]}
    options = {
        "max_tokens": args.max_tokens,
        "priority": _level(args.priority),
        "seed": args.seed,
        "temperature": args.temperature,
        "timeout_ms": max(1, round(1000 * args.timeout)),
        "stream": args.stream,
    }
    request.update({key: value for key, value in options.items() if value is not None})
    with trio.fail_after(args.timeout) as connecting:
        async with open_client(
            url, login=login_of(config.nats), inbox_prefix=args.inbox_prefix
        ) as client:
            # From here on the request has its own deadline.
            connecting.deadline = math.inf
            if args.json:
                async with client.ask(request, worker_id=args.worker) as answer:
                    async for chunk in answer:
                        sys.stdout.write(json.dumps(chunk.body, ensure_ascii=False) + "\n")
                        sys.stdout.flush()
            else:
                await _show(client, request, args.worker)


def _level(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text


# --- the rest -----------------------------------------------------------------------------


def _check_config(args: argparse.Namespace) -> int:
    loaded = _load_with_sources(args)
    worker = loaded.config.worker
    for warning in warnings(loaded.config, total_memory_bytes=psutil.virtual_memory().total):
        sys.stderr.write(f"warning: {warning}\n")
    source = quoted(str(args.config)) if args.config else "the defaults"
    # A comment, so that the whole can be kept as a file.
    sys.stdout.write(
        f"# {source}: valid. Worker {worker.id} would serve {quoted(worker.model)} "
        f"as {worker.model_name}.\n{effective_yaml(loaded)}"
    )
    return ExitStatus.OK


def _schema(_args: argparse.Namespace) -> int:
    sys.stdout.write(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n")
    return ExitStatus.OK


def _unit(manager: str, args: argparse.Namespace) -> int:
    # As the service will find it: without this shell's variables, and without its secrets.
    config = load_config(
        args.config,
        environ={},
        overrides=args.overrides,
        hostname=socket.gethostname(),
        read_secrets=False,
    )
    unit = units.make_unit(
        config,
        config_file=args.config,
        overrides=args.overrides,
        engine=args.engine,
        name=args.name,
    )
    is_system = manager == "systemd" and not args.user
    user = (args.run_as or units.user_of_process()) if is_system else None
    if is_system:
        text = units.systemd_unit(unit, user=user)
    elif manager == "systemd":
        text = units.systemd_user_unit(unit)
    else:
        text = units.launchd_plist(unit, home=Path.home())
    sys.stdout.write(text)
    for name in sorted(os.environ):
        if name.startswith(VARIABLE_PREFIX):
            sys.stderr.write(f"note: {name} is set here and will not be set in the service\n")
    for remark in units.remarks(unit, is_system=is_system, user=user):
        sys.stderr.write(f"note: {remark}\n")
    return ExitStatus.OK


def _model(action: str, args: argparse.Namespace) -> int:
    """In the engine's own process: this one never imports mlx."""
    command = [sys.executable, "-P", "-m", "trio_worker.engine", action, args.name]
    return subprocess.run(command, check=False).returncode


def _bench(args: argparse.Namespace) -> int:
    from trio_worker.bench import scheduling  # noqa: PLC0415 - only here
    from trio_worker.bench.measurements import PARTS, Bench, run_bench  # noqa: PLC0415

    set_up_logging(log_format="human", level="warning")
    bench = Bench(
        config=_load(args), engine=args.engine, max_tokens=args.max_tokens, rounds=args.rounds
    )
    parts = {**PARTS, **scheduling.PARTS}
    names = BENCH_PARTS.get(args.what, (args.what,))
    trio.run(run_bench, bench, [parts[name] for name in names])
    return ExitStatus.OK


# --- how it ends --------------------------------------------------------------------------


def _say_why(exc: StopWorker) -> None:
    lead = "Configuration error: " if isinstance(exc, ConfigError) else ""
    for line in str(exc).splitlines():
        sys.stderr.write(f"{lead}{line}\n")


def _report(group: BaseExceptionGroup[BaseException]) -> int:
    """The status of the reasons to stop in the group; anything else is a fault of ours."""
    reasons, rest = group.split(StopWorker)
    if rest is not None:
        logger.opt(exception=rest).critical("The worker ended by a fault of its own")
        return ExitStatus.SOFTWARE
    assert reasons is not None
    statuses: list[int] = []
    for reason in _leaves(reasons):
        assert isinstance(reason, StopWorker)
        _say_why(reason)
        statuses.append(reason.status)
    return max(statuses)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for each in group.exceptions
        for leaf in (_leaves(each) if isinstance(each, BaseExceptionGroup) else [each])
    ]
