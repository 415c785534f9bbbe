"""What an answer has to keep to: from what a caller asks for to which tokens may come next."""

NOT_BY_BYTES = "this model's tokenizer does not say of which bytes its tokens are"
"""Why no answer of a model can be held to a form, where that is so."""


class GrammarRefused(Exception):
    """Such an answer cannot be had. The message is for who asked for it, and says why."""
