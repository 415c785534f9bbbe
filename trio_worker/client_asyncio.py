"""Calling a worker from Python, on asyncio. `client` is the same for Trio."""

from trio_worker.calling.on_asyncio import Answer, Chunk, Client, open_client

__all__ = ["Answer", "Chunk", "Client", "open_client"]
