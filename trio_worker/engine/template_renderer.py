"""Turns messages into tokens as the model's chat template says, which is rendered elsewhere.

The template is a program that came with the model: it runs in `template_program.py`, a process of
its own that is killed when it takes too long. A function in place of a template, as mlx-lm and
transformers have for some models, came with the library, and is called as it is.

Imports nothing slow: the process is started before MLX is imported, and is ready as early.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Self

import msgspec

from trio_worker.engine.frame_socket import FrameSocket
from trio_worker.engine.mended_mlx_lm import has_text_template
from trio_worker.engine.template_program import (
    MOST_BYTES,
    Answer,
    Excess,
    Question,
    Ready,
    Refused,
    Rendered,
)
from trio_worker.protocol.framing import HungUp

log = logging.getLogger("trio_worker.engine")

WITHIN_S = 1.0
"""How long one rendering may take; that of a thousand messages takes a hundredth of it."""
START_S = 10.0
"""How long the process may take to start, which is a second of work."""


class TemplateRefused(Exception):
    """The template does not take these messages; the message is its own."""


class TemplateFailed(Exception):
    """The template takes more time or memory than it may, whatever the messages: it is broken."""


class Renderer:
    """The process that renders. Its state: that process, our end of its line, and the bounds.

    Not to be used by two threads at a time.
    """

    def __init__(self) -> None:
        self.within_s = WITHIN_S
        self.start_s = START_S
        self._process: subprocess.Popen[bytes] | None = None
        self._line: FrameSocket | None = None
        self._is_ready = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def limit(self, answer_within_s: float) -> None:
        """From now on starting and rendering together take less than this."""
        self.within_s = min(WITHIN_S, answer_within_s / 4)
        self.start_s = min(START_S, answer_within_s / 2)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process unless there is one; `wait_ready` says when it can be asked."""
        if self._line is not None:
            return
        ours, theirs = socket.socketpair()
        self._line = FrameSocket(ours, most_bytes=MOST_BYTES)
        with theirs:
            # In the engine's process group: who kills that group kills this process, too.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trio_worker.engine.template_program"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
            )

    def stop(self) -> None:
        """Kill the process, if there is one, and reap it."""
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._line, self._process, self._is_ready = None, None, False

    def wait_ready(self) -> None:
        """Return once the process can be asked. Raises as `render` does."""
        self.start()
        if not self._is_ready:
            answer = self._receive(self.start_s, "it could not be started")
            assert isinstance(answer, Ready)
            self._is_ready = True

    def render(
        self,
        messages: list[dict[str, Any]],
        template: str,
        variables: dict[str, Any],
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The text that transformers makes of `messages` with this template and these variables.

        Raises `TemplateRefused`, and `TemplateFailed`: then the next process is on its way if this
        one had to be killed.
        """
        self.wait_ready()
        question = Question(
            messages=messages,
            tools=tools,
            template=template,
            variables=variables,
            within_s=self.within_s,
        )
        assert self._line is not None
        with suppress(OSError):  # then there is no answer either
            self._line.send(msgspec.msgpack.encode(question))
        answer = self._receive(self.within_s, f"it takes longer than {self.within_s:g} s")
        if isinstance(answer, Refused):
            raise TemplateRefused(answer.message)
        if isinstance(answer, Excess):
            raise TemplateFailed(answer.message)
        assert isinstance(answer, Rendered)
        return answer.text

    def _receive(self, within_s: float, too_late: str) -> Answer:
        assert self._line is not None
        self._line.socket.settimeout(within_s)
        try:
            answer: Answer = msgspec.msgpack.decode(self._line.receive(), type=Answer)
        except TimeoutError:
            self._replace()
            raise TemplateFailed(too_late) from None
        except (HungUp, OSError):
            self._replace()
            raise TemplateFailed("the process that renders it has ended") from None
        return answer

    def _replace(self) -> None:
        self.stop()
        self.start()


def tokens_of(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    renderer: Renderer,
    *,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """What `tokenizer.apply_chat_template` gives, by way of `renderer`; raises as that does.

    `variables` are the caller's, which the template may know.
    """
    if not has_text_template(tokenizer):
        given = {**variables} if tools is None else {**variables, "tools": tools}
        tokens = tokenizer.apply_chat_template(messages, **given, add_generation_prompt=True)
    else:
        text = text_of(tokenizer, messages, renderer, tools=tools, variables=variables)
        tokens = tokenizer.encode(text, add_special_tokens=False)
    return list(tokens)


def text_of(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    renderer: Renderer,
    *,
    tools: list[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """What the model's own template makes of it."""
    known = {
        **tokenizer.special_tokens_map,
        "enable_thinking": tokenizer.has_thinking,
        **variables,
        "add_generation_prompt": True,
    }
    return renderer.render(messages, tokenizer.get_chat_template(tools=tools), known, tools)
