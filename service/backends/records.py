"""What offline measurements print: JSON lines, for programs that may not import backends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from gptjet.service.engine.errors import BackendLoadError

Record = dict[str, Any]
"""One line; `kind` says what it is."""


def print_records(make: Callable[[], Iterator[Record]]) -> int:
    """Print what `make()` yields, then what stopped it as a record of the kind "error".

    Exit codes: 0 done, 1 failed, 2 this machine cannot run it (`unavailable`).
    """
    try:
        for record in make():
            print(json.dumps(record), flush=True)
    except BackendLoadError as error:
        print(json.dumps({"kind": "error", "message": str(error), "unavailable": True}), flush=True)
        return 2
    except Exception as error:  # noqa: BLE001 - the caller reads JSON lines, not tracebacks
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(json.dumps({"kind": "error", "message": message, "unavailable": False}), flush=True)
        return 1
    return 0


def parse_cells(text: str) -> list[tuple[int, int]]:
    """ "50:200,1000:50" -> [(50, 200), (1000, 50)]."""
    pairs = [entry.split(":") for entry in text.split(",") if entry]
    return [(int(input_tokens), int(output_tokens)) for input_tokens, output_tokens in pairs]
