"""What is used of mlx-lm below its public names, or replaced in it: all of it, and nothing else.

1. The layers of mlx-lm's models find their attention and their activation as globals of the
   modules that define them; no argument hands them others. Without `call_instead`, a CPU computes
   with MLX's exponential, one element at a time, and no rows can share what they begin with.
   Shown by `test_a_models_layers_call_them_and_say_the_same`.
2. A tokenizer of mlx-lm does not say whether its chat template is a text that came with the model,
   or a function of mlx-lm's or of the tokenizer's own. Without `has_text_template`, the first kind
   would be rendered in this process, where a template without end stops every answer.
   Shown by `test_the_tokens_are_those_of_the_library`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any


def call_instead(
    module: Any, replacements: Mapping[Callable[..., Any], Callable[..., Any]]
) -> None:
    """Have the layers of `module` call others than mlx-lm's functions, for the whole process.

    Each key is a function of mlx-lm's that a layer's Python module may have imported by its name.
    """
    for name in {type(layer).__module__ for layer in module.modules()}:
        names = vars(sys.modules[name])
        for theirs, ours in replacements.items():
            if names.get(theirs.__name__) is theirs:
                names[theirs.__name__] = ours


def has_text_template(tokenizer: Any) -> bool:
    """Whether `tokenizer.apply_chat_template` renders a Jinja text that came with the model."""
    from transformers import PreTrainedTokenizerBase  # noqa: PLC0415 - slow

    inner = tokenizer._tokenizer  # noqa: SLF001
    plain = PreTrainedTokenizerBase.apply_chat_template
    return (
        type(inner).apply_chat_template is plain
        and tokenizer._chat_template is None  # noqa: SLF001
        and inner.chat_template is not None
    )
