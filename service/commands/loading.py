"""From settings to a loaded model: the one place that joins the two."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from gptjet.service.commands.server_settings import MODEL_SETTINGS

if TYPE_CHECKING:
    from gptjet.service.backends.factory import LoadedModel
    from gptjet.service.config import ServerConfig


def load_model(config: ServerConfig) -> LoadedModel:
    """Load what the settings name. Raises BackendLoadError; blocks.

    Progress is drawn on stderr where that is a terminal.
    """
    # Here, not above: it imports transformers, and a server's health has to answer meanwhile.
    from gptjet.service.backends.factory import load_backend

    # Every setting of the model, whatever is added to them; `load_backend` has the same names.
    options = {name: getattr(config, name) for name in MODEL_SETTINGS}
    return load_backend(
        options.pop("backend"),
        options.pop("model"),
        max_sequences=config.max_sequences,
        progress=sys.stderr.isatty(),
        **options,
    )


def follows(config: ServerConfig) -> bool:
    """Whether this process shares rank 0's model instead of serving one: a launcher said so."""
    shares = config.backend in ("deepspeed", "auto")
    return shares and os.environ.get("RANK", "0") != "0"


def follow(config: ServerConfig) -> int:
    """Take part in rank 0's model until rank 0 stops; the exit code. Raises BackendLoadError."""
    from gptjet.service.backends.deepspeed.loader import follow_leader
    from gptjet.service.backends.factory import LoadOptions

    options = {name: getattr(config, name) for name in MODEL_SETTINGS if name != "backend"}
    follow_leader(LoadOptions(max_sequences=config.max_sequences, progress=False, **options))
    return 0
