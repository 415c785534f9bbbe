"""The engine process: the only code that imports mlx or mlx_lm; it never imports trio.

The worker starts it as `python -m trio_worker.engine serve …` and talks to it in frames.
"""
