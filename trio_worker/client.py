"""Calling a worker from Python, on Trio. `client_asyncio` is the same for asyncio."""

from trio_worker.calling.on_trio import Answer, Chunk, Client, Login, open_client

__all__ = ["Answer", "Chunk", "Client", "Login", "open_client"]
