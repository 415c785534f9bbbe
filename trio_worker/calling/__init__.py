"""Asking a worker: what a call decides, and its two flavours, for Trio and for asyncio."""
