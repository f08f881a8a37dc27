"""Package data from a finished run: FP16 weights, config, tokenizer, held-out rows, record."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, GPTJForCausalLM

from gptjet.service.training.corpus import SPLITS, Corpus, Row, fingerprint
from gptjet.service.training.loop import TrainingRun
from gptjet.service.training.model import untie
from gptjet.service.training.tokenizer import END_OF_TEXT, save_tokenizer

MAX_WEIGHT_BYTES = 16_000_000
WEIGHTS_NAME = "model.safetensors"
RECORD_NAME = "training.json"


def export_checkpoint(run: TrainingRun, corpus: Corpus, folder: Path) -> None:
    """Write a finished run's best model as loadable package data into `folder`.

    Made beside it and moved in once it is whole: the checkpoint that is there, perhaps the one that
    ships, is not mixed with half of another. Raises ValueError when the weights exceed
    MAX_WEIGHT_BYTES.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as name:
        made = Path(name)
        save_half(run.best_model(), made)
        save_tokenizer(run.tokenizer, made)
        write_json(made / RECORD_NAME, training_record(run, corpus))
        for file in sorted(made.iterdir()):
            file.replace(folder / file.name)


def save_half(model: GPTJForCausalLM, folder: Path) -> None:
    """Save `model` in FP16 with its config and generation config; the model is left alone."""
    half = copy.deepcopy(model)
    untie(half)
    cast(nn.Module, half).half()
    end = half.config.eos_token_id
    half.generation_config = cast(Any, GenerationConfig)(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, max_new_tokens=64
    )
    half.save_pretrained(str(folder))
    # safetensors writes a file only its owner can read, which would not survive packaging.
    (folder / WEIGHTS_NAME).chmod(0o644)
    size = (folder / WEIGHTS_NAME).stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise ValueError(f"{WEIGHTS_NAME} has {size} bytes, more than {MAX_WEIGHT_BYTES}")


def training_record(run: TrainingRun, corpus: Corpus) -> dict[str, object]:
    """How the checkpoint was trained, for the model card: settings, data, time, validation."""
    return {
        "config": dataclasses.asdict(run.config),
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "end_of_text": END_OF_TEXT,
        "rows": {split: len(corpus.rows(split)) for split in SPLITS},
        "fingerprints": {split: fingerprint(corpus.rows(split)) for split in SPLITS},
        "steps": run.progress.step,
        "step_seconds": round(run.progress.seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "best_epoch": run.progress.best_epoch,
        "validation": run.progress.history,
    }


def write_heldout(rows: Sequence[Row], path: Path) -> None:
    """The held-out rows as JSON lines: id, source, text, mean_rating, label."""
    lines = [
        json.dumps(
            {
                "id": row.id,
                "source": row.source,
                "text": row.text,
                "mean_rating": row.mean_rating,
                "label": row.label,
            },
            ensure_ascii=False,
        )
        for row in rows
    ]
    write_text(path, "\n".join(lines) + "\n")


def write_json(path: Path, content: object) -> None:
    """`content` as indented JSON, written atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` into `path`, atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
