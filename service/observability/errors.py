"""What keeps a server from being watched as it was told to."""

from __future__ import annotations


class ObservabilityError(Exception):
    """Metrics or traces cannot be had; the message is one line for a person."""
