"""The delays in a mock model's name, so that a server of known latency is started as any other.

`gptjet serve --backend mock --model mock:prefill_ms=20,decode_ms=5` sleeps so long in each step: a
load generator, a sweep or a clock can be checked against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from gptjet.service.engine.errors import BackendLoadError

_PREFIX = "mock:"
_MAX_DELAY_MS = 60_000


@dataclass(frozen=True, slots=True)
class Delays:
    """What the mock sleeps in each prefill and decode step, in ms."""

    prefill_ms: float = 0.0
    decode_ms: float = 0.0


def delays_of(model: str) -> Delays:
    """The delays of a name that begins with "mock:"; none for any other.

    Raises BackendLoadError for a setting that there is not and for what is no number of ms.
    """
    delays = Delays()
    if not model.startswith(_PREFIX):
        return delays
    known = [field.name for field in fields(Delays)]
    for setting in model.removeprefix(_PREFIX).split(","):
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or name not in known:
            raise BackendLoadError(
                f"model {model!r}: {setting.strip()!r} is no delay: give {' or '.join(known)}, "
                "such as mock:prefill_ms=20,decode_ms=5"
            )
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= _MAX_DELAY_MS:
            raise BackendLoadError(
                f"model {model!r}: {name} must be 0 to {_MAX_DELAY_MS} ms, got {text!r}"
            )
        delays = replace(delays, **{name: value})
    return delays
