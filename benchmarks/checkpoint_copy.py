"""A copy of a checkpoint that claims a longer context, to measure speed at lengths beyond it.

Only for models with rotary positions: they have no table of positions to outgrow, so the work a
token takes is that of a model trained for the length. What it writes past its own context is not
text to judge, and every result made with it says so.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gptjet.benchmarks.geometry import EMBEDDED, GeometryError, config_of, embedded_folder

_ROTARY = frozenset({"gptj", "codegen", "gpt_neox", "llama", "mistral"})
_CONTEXT_FIELDS = ("n_positions", "max_position_embeddings", "n_ctx")
_SKIPPED = (".py", ".pyc", ".jsonl", ".md")


def copy_with_context(checkpoint: str, context: int, target: Path) -> str:
    """Copy `checkpoint` (a folder or "embedded") into `target` and return what changed, one line.

    Raises GeometryError for a hub name, for a model without rotary positions, and where the
    checkpoint's own context is already that long.
    """
    source = embedded_folder() if checkpoint == EMBEDDED else Path(checkpoint)
    if not (source / "config.json").is_file():
        raise GeometryError(f"{checkpoint}: serving a copy needs a folder with the checkpoint")
    fields = config_of(checkpoint)
    if fields.get("model_type") not in _ROTARY:
        raise GeometryError(
            f"{checkpoint}: a {fields.get('model_type')} model has a table of positions and cannot "
            f"be served beyond its context"
        )
    names = [name for name in _CONTEXT_FIELDS if isinstance(fields.get(name), int)]
    own = min((int(fields[name]) for name in names), default=context)
    if not names or own >= context:
        raise GeometryError(f"{checkpoint}: its context is {own}, so none of {context} is needed")
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _SKIPPED:
            shutil.copyfile(file, target / file.name)
    changed = fields | dict.fromkeys(names, context)
    (target / "config.json").write_text(json.dumps(changed, indent=2), encoding="utf-8")
    return f"a copy with context {context} instead of {own}: speed only, not text"
