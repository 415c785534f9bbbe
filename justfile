set positional-arguments

# `uv run` sets UV; the plain name may not be on PATH.
uv := env("UV", "uv")

# Empty stands for unset: what starts many processes should compile each file once.
export PYTHONDONTWRITEBYTECODE := ""

# what there is
@default:
    "{{ just_executable() }}" --justfile "{{ justfile() }}" --list

# run a worker on this machine, NATS and HTTP included, and ask it one question: just run --set worker.id=one
[no-exit-message]
@run *args:
    exec "{{ uv }}" run trio-worker run --config cluster.yaml --hello --set gateway.port=8000 "$@"

# ask a running worker: just ask "Why is the sky blue?" --stream
[no-exit-message]
@ask *args:
    exec "{{ uv }}" run trio-worker ask "$@"

# measure throughput and latency
[no-exit-message]
@bench *args:
    exec "{{ uv }}" run trio-worker bench "$@"

# run the tests side by side, or some of them one by one: just test tests/config -x
[no-exit-message]
test *args:
    #!/usr/bin/env bash
    set -euo pipefail
    [ $# -gt 0 ] || set -- -n logical --dist worksteal
    exec "{{ uv }}" run pytest "$@"

# the tests that start no process, side by side: for every commit
[no-exit-message]
@test-fast *args:
    exec "{{ uv }}" run pytest -n logical --dist worksteal -m "not mlx and not nats and not process and not browser and not systemd and not thorough and not clients" "$@"

# many runs of a worker or of a fleet in virtual time, or one with its log: just sim seeds=200, just sim seed=123, just sim fleets=100, just sim fleet=12
@sim *options="seeds=200":
    cd tests && "{{ uv }}" run python -m sim "$@"

# hours of load in virtual time, and whether anything grows: just soak hours=2
@soak *options="hours=24":
    cd tests && "{{ uv }}" run python -m sim.soak "$@"

# callers that come, go and fail at a gateway for minutes, and whether anything grows: just soak-gateway seconds=60
@soak-gateway *options="seconds=600":
    cd tests && "{{ uv }}" run python -m chaos.gateway "$@"

# real processes killed and hung, lines broken, and whether anything is lost: just chaos seconds=120 seed=7
@chaos *options="seconds=120":
    cd tests && "{{ uv }}" run python -m chaos "$@"

# a worker and mlx-serving's real controller, from a checkout with its packages: just try-controller checkout=FOLDER engine=mlx
@try-controller *args:
    cd tests && "{{ uv }}" run python -m real_controller "$@"

# durable jobs for three workers while one or nats-server dies or hangs (trouble=workers, server, freeze): just chaos-jobs jobs=500 trouble=server
@chaos-jobs *options="jobs=500":
    cd tests && "{{ uv }}" run python -m chaos.jobs "$@"

# one-line bugs planted one at a time, and which of them no test finds: just mutate trio_worker/core
@mutate *paths:
    cd tests && "{{ uv }}" run python -m mutate "$@"

# look at the pages in a real Chromium: needs Debian's chromium and chromium-driver
@test-page *args:
    exec "{{ uv }}" run pytest -m browser "$@"

# let clients of OpenAI's API ask the gateway, each as it is installed: needs Node 20 with npm, and curl
@test-clients *args:
    exec "{{ uv }}" run pytest -m clients tests/clients "$@"

# what has to pass before a commit
check: lint types test

# The engine process runs no loop. Off: a list of startable functions is kept by nobody (114), frameworks want `async def` (124),
# and checkpoints are not owed on every path (9, off by default).
# look for mistakes and for text that is not formatted
lint:
    "{{ uv }}" run ruff check
    "{{ uv }}" run ruff format --check
    "{{ uv }}" run flake8-async --enable=ASYNC --disable=ASYNC114,ASYNC124,ASYNC9 $(find trio_worker tests scripts -name '*.py' -not -path 'trio_worker/engine/*')

# check the types
types:
    "{{ uv }}" run mypy

# format the code and mend what can be mended
fmt:
    "{{ uv }}" run ruff check --fix-only
    "{{ uv }}" run ruff format

# write the generated parts of the documentation again, and its site into site/; `just docs --check` only looks
docs *args:
    #!/usr/bin/env bash
    set -euo pipefail
    "{{ uv }}" run python scripts/generate_docs.py "$@"
    site=site
    case " $* " in *" --check "*) site="$(mktemp -d)"; trap 'rm -r "$site"' EXIT ;; esac
    export NO_MKDOCS_2_WARNING=1 # mkdocs-material's notice about its own future
    "{{ uv }}" run --isolated --only-group docs mkdocs build --strict --site-dir "$site"
