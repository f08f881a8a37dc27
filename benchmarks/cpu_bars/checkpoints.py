"""The three checkpoints of the bars: S fits a processor's cache, M and W do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from gptjet.benchmarks.checkpoint_copy import copy_with_context
from gptjet.benchmarks.geometry import EMBEDDED, Geometry, config_of, geometry_from_config
from gptjet.benchmarks.make_checkpoint import write_checkpoint
from gptjet.benchmarks.peers.environments import ROOT

CONTEXT = 2048
"""Of every checkpoint: a prompt of 1,000 tokens and the longest output fit."""


@dataclass(frozen=True, slots=True)
class BarModel:
    """One of S, M and W.

    source  "embedded", or a name in models.toml
    about   what it is, for a table's caption
    """

    name: str
    source: str
    about: str

    @property
    def geometry(self) -> Geometry:
        """What its bytes are counted from."""
        return geometry_from_config(config_of(self.source))


MODELS = {
    model.name: model
    for model in (
        BarModel(
            "S", EMBEDDED, f"the embedded checkpoint, 4 x 256, as a copy with context {CONTEXT}"
        ),
        BarModel("M", "medium-50400", "24 x 1024, vocabulary 50400, seeded random weights"),
        BarModel("W", "wide", "2 x 4096, vocabulary 50400, seeded random weights"),
    )
}


def checkpoint_folder(model: BarModel, root: Path = ROOT) -> Path:
    """The checkpoint's folder, written if it is not there yet."""
    folder = root / "checkpoints" / model.name
    if (folder / "config.json").exists():
        return folder
    # Under another name until it is whole: one that was killed half-way is not taken for it.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    if model.source == EMBEDDED:
        copy_with_context(EMBEDDED, CONTEXT, partial)
    else:
        write_checkpoint(partial, model.source, context=CONTEXT)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def read_vocab_size(folder: Path) -> int:
    """Of a checkpoint's folder."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(fields["vocab_size"])
