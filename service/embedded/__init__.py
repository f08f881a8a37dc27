"""The embedded checkpoint: a small trained GPT-J that ships inside the package.

Loading it needs no network: `AutoModelForCausalLM.from_pretrained(embedded_path())`. This module
imports nothing beyond the standard library, so a client can build prompts without a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, cast, get_args

EMBEDDED_NAME = "embedded"

Label = Literal["negative", "neutral", "positive"]
LABELS: tuple[Label, ...] = get_args(Label)

PROMPT_TEMPLATE = "Text: {text}\nSentiment:"


@dataclass(frozen=True)
class HeldoutRow:
    """A rated text the checkpoint never saw in training. `mean_rating` is in [-4, 4]."""

    id: str
    source: str
    text: str
    mean_rating: float
    label: Label


def embedded_path() -> Path:
    """The folder with the checkpoint's weights, config, tokenizer, model card and figures."""
    path = Path(str(resources.files(__name__)))
    if not path.is_dir():
        raise FileNotFoundError(f"the package data of {__name__} is not installed as plain files")
    return path


def build_prompt(text: str) -> str:
    """The prompt the checkpoint was trained to answer; `text` becomes one line."""
    return PROMPT_TEMPLATE.format(text=" ".join(text.split()))


def heldout_rows() -> tuple[HeldoutRow, ...]:
    """The held-out test split, in its fixed order."""
    lines = (embedded_path() / "heldout.jsonl").read_text(encoding="utf-8").split("\n")
    return tuple(_row(cast(dict[str, object], json.loads(line))) for line in lines if line)


def _row(fields: dict[str, object]) -> HeldoutRow:
    label = str(fields["label"])
    if label not in LABELS:
        raise ValueError(f"heldout.jsonl has an unknown label {label!r}")
    return HeldoutRow(
        id=str(fields["id"]),
        source=str(fields["source"]),
        text=str(fields["text"]),
        mean_rating=float(str(fields["mean_rating"])),
        label=label,
    )
