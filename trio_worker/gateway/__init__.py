"""OpenAI's HTTP in front of workers on NATS.

What a body, a header or a worker's message means is decided by functions without a loop, a clock
or a socket: `fields` reads what is asked, `answers` writes what comes back, `errors` says what went
wrong, `keys` who may ask, `browsers` from which page, and `models` what there is to ask.
"""
