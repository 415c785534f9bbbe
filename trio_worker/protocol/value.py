"""What all that is said over the line between the two processes is made of."""

from __future__ import annotations

import msgspec


# Without the collector of cycles: what is frozen cannot come to refer to itself.
class Value(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Sent as the array of its fields, in the order in which they stand here."""
