"""The settings in a mock model's name, so that a server of known behaviour starts as any other.

`gptjet serve --backend mock --model mock:prefill_ms=20,decode_ms=5` sleeps so long in each step: a
load generator, a sweep or a clock can be checked against it. `mock:hang_at_step=100` makes a fault
happen, which `mock_faults` describes: on a real server, for whoever wants to see what callers get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from gptjet.service.engine.errors import BackendLoadError

_PREFIX = "mock:"
_MAX_DELAY_MS = 60_000
_MAX_COUNT = 1_000_000_000


@dataclass(frozen=True, slots=True)
class MockSettings:
    """What a mock does besides its rule. A count of 0 is: never, or the backend's own default.

    prefill_ms, decode_ms   slept in each prefill and decode step
    context                 most tokens of a sequence
    paged                   1: the paged KV cache, with prompts in chunks of max_prefill_tokens and
                            max_prefill_batch_size prompts a step
    the others              see mock_faults
    """

    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    context: int = 512
    paged: int = 0
    max_prefill_tokens: int = 0
    max_prefill_batch_size: int = 1
    fail_at_step: int = 0
    fail_from_step: int = 0
    nan_at_step: int = 0
    hang_at_step: int = 0
    die_at_step: int = 0
    oom_above_tokens: int = 0
    oom_above_sequences: int = 0

    @property
    def has_faults(self) -> bool:
        """Whether any fault is asked for."""
        return any(getattr(self, field.name) for field in fields(self) if _is_fault(field.name))


def settings_of(model: str) -> MockSettings:
    """The settings of a name that begins with "mock:"; the defaults for any other.

    Raises BackendLoadError for a setting that there is not and for a value out of its limits.
    """
    settings = MockSettings()
    if not model.startswith(_PREFIX):
        return settings
    defaults = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for part in model.removeprefix(_PREFIX).split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or name not in defaults:
            raise BackendLoadError(
                f"model {model!r}: {part.strip()!r} is no setting of the mock: give some of "
                f"{', '.join(defaults)}, such as mock:prefill_ms=20,decode_ms=5"
            )
        read = _delay if isinstance(defaults[name], float) else _count
        given: dict[str, Any] = {name: read(model, name, text)}
        settings = replace(settings, **given)
    return settings


def _is_fault(name: str) -> bool:
    return name.endswith("_step") or name.startswith("oom_")


def _delay(model: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _MAX_DELAY_MS:
        raise BackendLoadError(
            f"model {model!r}: {name} must be 0 to {_MAX_DELAY_MS} ms, got {text!r}"
        )
    return value


def _count(model: str, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _MAX_COUNT):
        raise BackendLoadError(
            f"model {model!r}: {name} must be a whole number from 0 to {_MAX_COUNT}, got {text!r}"
        )
    return int(text)
