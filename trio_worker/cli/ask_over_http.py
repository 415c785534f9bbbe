"""How to ask over HTTP, for whoever has just started a worker."""

from __future__ import annotations

import json

from trio_worker.config import Config

_MESSAGES = json.dumps([{"role": "user", "content": "Why is the sky blue?"}])
_MAX_TOKENS = 100
"""A small model may not find an end."""


def how_to_ask_over_http(config: Config, address: str | None) -> str:
    """Lines that work as they stand; `address` is None where somebody else has the port."""
    port = config.gateway.port
    if address is None:
        return (
            f"Port {port} is taken; OpenAI's API on another one: "
            "uv run just run --set gateway.port=8001\n"
        )
    header, key, note = "", "none", ""
    if config.gateway.keys_file is not None:
        header, key = ' -H "Authorization: Bearer $KEY"', "…"
        note = f"The key is one whose hash is in {config.gateway.keys_file}.\n"
    request = f'{{"max_tokens": {_MAX_TOKENS}, "messages": {_MESSAGES}}}'
    model = config.worker.model_name
    asked = f'model="{model}", max_tokens={_MAX_TOKENS}, messages={_MESSAGES}'
    return (
        f"\nFrom any OpenAI client, at {address}/v1:\n"
        f"  curl {address}/v1/chat/completions{header} -H 'Content-Type: application/json'"
        f" -d '{request}'\n\n"
        "  from openai import OpenAI\n"
        f'  client = OpenAI(base_url="{address}/v1", api_key="{key}")\n'
        f"  print(client.chat.completions.create({asked}).choices[0].message.content)\n"
        f"{note}\n"
    )
