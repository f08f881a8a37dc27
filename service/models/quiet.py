"""Keeping transformers' notices out of a server's log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging as _untyped_logging

transformers_logging: Any = _untyped_logging


@contextlib.contextmanager
def quiet_transformers(*, show_progress: bool = False) -> Iterator[None]:
    """Errors only from transformers and DeepSpeed (which accelerate imports), and a progress bar or
    none; what was set before is set again afterwards."""
    verbosity = transformers_logging.get_verbosity()
    had_progress = transformers_logging.is_progress_bar_enabled()
    deepspeed_logger = logging.getLogger("DeepSpeed")
    deepspeed_level = deepspeed_logger.level
    transformers_logging.set_verbosity(logging.ERROR)
    deepspeed_logger.setLevel(logging.ERROR)
    _set_progress(show_progress)
    try:
        yield
    finally:
        _set_progress(had_progress)
        deepspeed_logger.setLevel(deepspeed_level)
        transformers_logging.set_verbosity(verbosity)


def _set_progress(show: bool) -> None:
    if show:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()
