"""mlx-lm's own batched loop, without a worker: what `trio-worker bench` compares a worker with.

The same model, number type and BLAS as the engine has. One JSON object a line: asked
`{"prompts": [[{"role", "content"}, …], …], "max_tokens", "concurrent"}`, it answers
`{"tokens", "seconds"}`, and `{"device"}` once at the start.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from mlx_lm.generate import BatchGenerator

from trio_worker.engine.models.load import LoadedModel


def run_baseline(model: LoadedModel) -> None:
    """Measure what standard input asks for until it ends."""
    answers = sys.stdout
    # What libraries print must not come between the answers.
    sys.stdout = sys.stderr

    def answer(fields: dict[str, object]) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer({"device": model.device})
    for line in sys.stdin:
        asked = json.loads(line)
        tokens, seconds = _generate(model, **asked)
        answer({"tokens": tokens, "seconds": seconds})


def _generate(
    model: LoadedModel, prompts: list[Any], max_tokens: int, concurrent: int
) -> tuple[int, float]:
    tokenizer = model.tokenizer
    began_at = time.perf_counter()
    tokenised = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True) for messages in prompts
    ]
    generator = BatchGenerator(
        model.module,
        stop_tokens=[[token] for token in model.end_tokens],
        completion_batch_size=concurrent,
        prefill_batch_size=concurrent,
    )
    tokens = 0
    try:
        running = set(generator.insert(tokenised, max_tokens=[max_tokens] * len(prompts)))
        while running:
            _, responses = generator.next()
            tokens += len(responses)
            running -= {each.uid for each in responses if each.finish_reason is not None}
    finally:
        generator.close()
    return tokens, time.perf_counter() - began_at
