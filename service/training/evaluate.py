"""Measure the embedded checkpoint: `python -m gptjet.service.training.evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import logging as transformers_logging

from gptjet.service.embedded import LABELS, Label, build_prompt, embedded_path
from gptjet.service.training.answers import AnswerFigures, answer_figures, answers_for
from gptjet.service.training.baselines import (
    LabelChoice,
    label_choice,
    random_tenth,
    tfidf_decisions,
    vader_decisions,
)
from gptjet.service.training.card import write_card
from gptjet.service.training.corpus import (
    Corpus,
    CorpusError,
    Row,
    fetch_sdist,
    fingerprint,
    load_corpus,
)
from gptjet.service.training.explain import build_tone_lexicon, explanation_for
from gptjet.service.training.export import WEIGHTS_NAME, write_json
from gptjet.service.training.loop import checkpoint_path
from gptjet.service.training.measures import Figures, TextFigures, figures_for, text_figures
from gptjet.service.training.scoring import decide, label_log_probs, model_logits
from gptjet.service.training.train import positive

RESULT_NAME = "evaluation.json"
# Greedy answers are generated for every n-th held-out row.
ANSWER_STRIDE = 5
EXAMPLES = (
    "The food was wonderful and the staff were kind.",
    "The battery died after two days and support never answered.",
    "The meeting starts at nine on Tuesday.",
    "The plot is not very good.",
    "A charming cast is wasted on a dull, predictable script.",
)
PLAIN_PROMPTS = ("The food was wonderful", "The movie is a", "I bought this camera")
_LETTERS: dict[str, Label] = {label[2]: label for label in LABELS}


@dataclass(frozen=True)
class Parity:
    """The saved FP16 weights beside the FP32 weights that training ended with."""

    rows: int
    max_weight_difference: float
    max_log_prob_difference: float
    same_decisions: float
    # The same FP16 weights computed in FP16 instead of FP32, over fewer rows.
    half_arithmetic_rows: int
    half_arithmetic_same_decisions: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m gptjet.service.training.evaluate",
        description=(
            "Accuracy, macro-F1 and confusion of the embedded checkpoint on its held-out rows, "
            "beside VADER and a TF-IDF logistic regression on the same rows; perplexity of "
            "held-out text; how its explanations hold up. Writes evaluation.json and "
            "MODEL_CARD.md into the checkpoint's folder."
        ),
    )
    parser.add_argument("--sdist", type=Path, help="vaderSentiment-3.3.2.tar.gz, instead of pip")
    parser.add_argument("--cache-dir", type=Path, default=Path("build/corpus"))
    parser.add_argument("--model", type=Path, default=None, help="checkpoint (the embedded one)")
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("build/embedded-run"),
        help="the training run, for the parity of saved and trained weights (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result file, no tables")
    parser.add_argument("--dry-run", action="store_true", help="write no files")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (%(default)s)")
    return parser.parse_args(arguments)


def load_checkpoint(folder: Path) -> tuple[GPTJForCausalLM, Tokenizer]:
    """Model (FP16 weights in FP32 arithmetic, evaluation mode) and tokenizer, without network."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return cast(GPTJForCausalLM, model), cast(Tokenizer, tokenizer)


def encode_decisions(labels: Sequence[Label]) -> str:
    """One letter a row in row order: g (negative), u (neutral), s (positive)."""
    letter_of = {label: letter for letter, label in _LETTERS.items()}
    return "".join(letter_of[label] for label in labels)


def decode_decisions(letters: str) -> list[Label]:
    """The labels that `encode_decisions` wrote."""
    return [_LETTERS[letter] for letter in letters]


def measure_parity(
    model: GPTJForCausalLM, tokenizer: Tokenizer, run_dir: Path, texts: Sequence[str]
) -> Parity:
    """Compare the saved model with the trained weights in `run_dir`, and FP16 with FP32 use."""
    state = torch.load(checkpoint_path(run_dir), weights_only=True)["best"]
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    difference = max(float((saved[name] - state[name]).abs().max()) for name in state)
    from_saved = label_log_probs(model_logits(model), tokenizer, texts)
    half = texts[::ANSWER_STRIDE]
    cast(nn.Module, model).half()
    in_half = label_log_probs(model_logits(model), tokenizer, half)
    cast(nn.Module, model).float()
    model.load_state_dict(state)
    from_trained = label_log_probs(model_logits(model), tokenizer, texts)
    model.load_state_dict(saved)
    same = (from_saved.argmax(-1) == from_trained.argmax(-1)).float().mean()
    same_half = (from_saved[::ANSWER_STRIDE].argmax(-1) == in_half.argmax(-1)).float().mean()
    return Parity(
        rows=len(texts),
        max_weight_difference=difference,
        max_log_prob_difference=float((from_saved - from_trained).abs().max()),
        same_decisions=float(same),
        half_arithmetic_rows=len(half),
        half_arithmetic_same_decisions=float(same_half),
    )


def measure(model: GPTJForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> dict[str, object]:
    """Every figure of the result file that needs only the checkpoint and the corpus."""
    rows = corpus.test
    texts = [row.text for row in rows]
    truth = [row.label for row in rows]
    decisions = decide(label_log_probs(model_logits(model), tokenizer, texts))
    compared = {
        "embedded": decisions,
        "vader": vader_decisions(texts),
        "tfidf_lr": tfidf_decisions(corpus.train, texts, balanced=False),
        "tfidf_lr_balanced": tfidf_decisions(corpus.train, texts, balanced=True),
    }
    rest, tenth = random_tenth(corpus)
    loose = tfidf_decisions(rest, [row.text for row in tenth], balanced=False)
    return {
        "figures": {name: _plain(figures_for(truth, made)) for name, made in compared.items()},
        "macro_f1_by_source": _by_source(rows, compared),
        "text": _plain(text_figures(model_logits(model), tokenizer, texts)),
        "explanations": _plain(_explanations(model, tokenizer, corpus)),
        "label_choice": [_plain(choice) for choice in label_choice(corpus)],
        "tfidf_lr_on_random_tenth": _plain(figures_for([row.label for row in tenth], loose)),
        "examples": _examples(model, tokenizer),
        "plain_generation": _plain_generation(model, tokenizer),
        "decisions": encode_decisions(decisions),
    }


def _by_source(
    rows: Sequence[Row], compared: dict[str, list[Label]]
) -> dict[str, dict[str, float]]:
    by_source: dict[str, dict[str, float]] = {}
    for source in sorted({row.source for row in rows}):
        at = [index for index, row in enumerate(rows) if row.source == source]
        truth = [rows[index].label for index in at]
        by_source[source] = {"rows": len(at)} | {
            name: figures_for(truth, [made[index] for index in at]).macro_f1
            for name, made in compared.items()
        }
    return by_source


def _explanations(model: GPTJForCausalLM, tokenizer: Tokenizer, corpus: Corpus) -> AnswerFigures:
    rows = corpus.test[::ANSWER_STRIDE]
    tones = build_tone_lexicon(corpus.lexicon, corpus.train)
    answers = answers_for(model, tokenizer, [row.text for row in rows])
    references = [explanation_for(row.text, row.label, tones) for row in rows]
    return answer_figures([row.text for row in rows], answers, references)


def _examples(model: GPTJForCausalLM, tokenizer: Tokenizer) -> list[dict[str, str]]:
    answers = answers_for(model, tokenizer, EXAMPLES)
    return [
        {"prompt": build_prompt(text), "answer": answer or ""}
        for text, answer in zip(EXAMPLES, answers, strict=True)
    ]


def _plain_generation(model: GPTJForCausalLM, tokenizer: Tokenizer) -> list[dict[str, str]]:
    samples = []
    for prompt in PLAIN_PROMPTS:
        torch.manual_seed(0)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            output = cast(Any, model).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                max_new_tokens=40,
            )
        text = str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        samples.append({"prompt": prompt, "continuation": text})
    return samples


def _plain(
    figures: Figures | TextFigures | AnswerFigures | LabelChoice | Parity,
) -> dict[str, object]:
    return dataclasses.asdict(figures)


def _environment(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    weights = (folder / WEIGHTS_NAME).read_bytes()
    packages = ("torch", "transformers", "tokenizers", "scikit-learn", "vaderSentiment")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python -m gptjet.service.training.evaluate",
        "versions": {name: version(name) for name in packages},
        "threads": options.threads,
        "weight_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def print_tables(result: dict[str, object]) -> None:
    """The main figures for a person."""
    figures = cast(dict[str, dict[str, object]], result["figures"])
    print(f"{'held-out':20} {'accuracy':>9} {'macro-F1':>9}   F1 of {', '.join(LABELS)}")
    for name, scores in figures.items():
        f1 = cast(dict[str, float], scores["f1"])
        per_class = "  ".join(f"{f1[label]:.3f}" for label in LABELS)
        print(f"{name:20} {scores['accuracy']:9.3f} {scores['macro_f1']:9.3f}   {per_class}")
    print("\nconfusion of the embedded checkpoint (rows: true, columns: decided)")
    for label, counts in zip(
        LABELS, cast(list[list[int]], figures["embedded"]["confusion"]), strict=True
    ):
        print(f"{label:>10} " + " ".join(f"{count:6d}" for count in counts))
    for name in ("text", "explanations", "parity"):
        print(f"\n{name}: {json.dumps(result.get(name), indent=2)}")
    for example in cast(list[dict[str, str]], result["examples"]):
        print(f"\n{example['prompt']}{example['answer']}")
    for sample in cast(list[dict[str, str]], result["plain_generation"]):
        print(f"\n{sample['prompt']} ->{sample['continuation']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    quiet: Any = transformers_logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    folder = options.model or embedded_path()
    try:
        corpus = load_corpus(options.sdist or fetch_sdist(options.cache_dir))
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model, tokenizer = load_checkpoint(folder)
    result: dict[str, object] = _environment(folder, options)
    result["heldout_fingerprint"] = fingerprint(corpus.test)
    result |= measure(model, tokenizer, corpus)
    if checkpoint_path(options.run_dir).exists():
        texts = [row.text for row in corpus.test]
        result["parity"] = _plain(measure_parity(model, tokenizer, options.run_dir, texts))
    elif (folder / RESULT_NAME).exists():
        # Only the machine that trained has the FP32 weights; keep what it recorded of this file.
        recorded = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
        if recorded.get("weights_sha256") == result["weights_sha256"]:
            result["parity"] = recorded.get("parity")
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_tables(result)
    if not options.dry_run:
        write_json(folder / RESULT_NAME, result)
        write_card(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
