"""The outside libraries of this room: imported when a rule needs them, and named when missing."""

from __future__ import annotations

import importlib
from typing import Any


class MissingLibraryError(ValueError):
    """A rule needs a library that is not installed."""


def load(module: str, package: str) -> Any:
    """Import a module of the extra `gptjet[governance]`; raises MissingLibraryError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingLibraryError(
            f"needs {package}, which is not installed: pip install 'gptjet[governance]'"
        ) from error
