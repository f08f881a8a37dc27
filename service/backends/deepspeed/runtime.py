"""The `deepspeed` package itself: imported late, quietly, and with its absence explained."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module, util
from typing import TYPE_CHECKING, Any

from gptjet.service.engine.errors import BackendLoadError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Its setup.py imports torch, so it is built beside the torch that is there; its op comes later.
INSTALL_COMMAND = "DS_BUILD_OPS=0 pip install --no-build-isolation 'gptjet[deepspeed]'"


def deepspeed_installed() -> bool:
    """Whether the package is there, without importing it."""
    return util.find_spec("deepspeed") is not None


def import_deepspeed(device: torch.device) -> Any:
    """The package, imported for a model on `device`.

    Raises BackendLoadError where it is missing, fails to import, or took another accelerator than
    the model's (an environment variable decides that, once a process).
    """
    if not deepspeed_installed():
        raise BackendLoadError(
            f"the deepspeed backend needs the deepspeed package: {INSTALL_COMMAND}"
        )
    with quiet_deepspeed():
        try:
            package = import_module("deepspeed")
            accelerator = import_module("deepspeed.accelerator").get_accelerator()
        except Exception as error:
            raise BackendLoadError(f"deepspeed does not import here: {error}") from error
    if accelerator.device_name() != device.type:
        forced = os.environ.get("DS_ACCELERATOR")
        reason = f"DS_ACCELERATOR={forced}" if forced else "it saw no GPU when it was imported"
        raise BackendLoadError(
            f"deepspeed works on {accelerator.device_name()!r} ({reason}) and the model is on "
            f"{device.type!r}; unset DS_ACCELERATOR, or make the GPU visible"
        )
    return package


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Keep DeepSpeed's own chatter out of the server's output.

    Its INFO log lists every default, `print` calls go to stdout (where `gptjet generate` writes
    text), and it warns of having no GPU even where it was told so. What it printed is kept at
    DEBUG.
    """
    # its import adds a stdout handler and sets its own level, so the level is set again afterwards
    noisy = logging.getLogger("DeepSpeed")
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(max(before, logging.WARNING))
        for handler in noisy.handlers:
            # made while stdout was redirected, it would write to our buffer for ever
            if isinstance(handler, logging.StreamHandler) and handler.stream is printed:
                handler.setStream(sys.stderr)
        for line in printed.getvalue().splitlines():
            logger.debug("deepspeed: %s", line)


@contextlib.contextmanager
def c_stdout_on_stderr() -> Iterator[None]:
    """Send what C code prints to stderr meanwhile.

    DeepSpeed prints a box of figures with `printf` when it allocates its workspace, into the text
    that `gptjet generate` writes to a pipe.
    """
    c_library = ctypes.CDLL(None)
    sys.stdout.flush()
    c_library.fflush(None)
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        c_library.fflush(None)  # printf buffers where stdout is a pipe
        os.dup2(saved, 1)
        os.close(saved)
