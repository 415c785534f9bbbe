"""What form a simulated answer is to have: as an engine works it out, of a model that can all.

It thinks where the template's variables ask for that, as a model does whose template leaves it to
them.
"""

from __future__ import annotations

import json
from typing import Any

from trio_worker.grammar.forms import callable_tools, grammar_of
from trio_worker.grammar.matching import Grammars
from trio_worker.markup.style import Style
from trio_worker.protocol.prompt import Form, Wanted
from trio_worker.simulated.speech import STYLE

SILENT = Style(calls=STYLE.calls)
"""As it answers where it does not think."""


def form_of(wanted: Wanted, grammars: Grammars, *, is_chat: bool) -> Form:
    """Raises `FormRefused` where such an answer cannot be had."""
    thinks = is_chat and is_to_think(wanted)
    return Form(
        grammar=grammar_of(wanted, STYLE if thinks else SILENT, grammars),
        finds_reasoning=thinks,
        max_reasoning_tokens=wanted.max_reasoning_tokens if thinks else None,
        tools=callable_tools(wanted),
        one_call=bool(wanted.tools) and not wanted.parallel_calls,
    )


def is_to_think(wanted: Wanted) -> bool:
    variables: dict[str, Any] = json.loads(wanted.template_variables or "{}")
    if "enable_thinking" in variables:
        return bool(variables["enable_thinking"])
    return variables.get("reasoning_effort") not in (None, "none")
