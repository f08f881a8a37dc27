"""MODEL_CARD.md of the embedded checkpoint, written from its recorded figures.

No number in the card is typed: they come from `training.json` (the run) and `evaluation.json`
(the measurement) in the checkpoint's folder.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from gptjet.service.embedded import LABELS
from gptjet.service.training.corpus import (
    NEUTRAL_BELOW,
    SDIST_NAME,
    SDIST_SHA256,
    SHINGLE_WORDS,
    TEST_SHARE,
    VALIDATION_SHARE,
)
from gptjet.service.training.export import RECORD_NAME, write_text
from gptjet.service.training.model import COPY_HEADS
from gptjet.service.training.samples import (
    COPY_WEIGHT,
    EXCHANGE_SHARE,
    LOWERCASE_SHARE,
    MADE_SHARE,
    NOISE_SHARE,
    PLAIN_SHARE,
    RATING_SPREAD,
)

_COLUMNS = 100
CARD_NAME = "MODEL_CARD.md"
_NAMES = {
    "embedded": "**this checkpoint**",
    "vader": "VADER, compound +-0.05",
    "tfidf_lr": "TF-IDF logistic regression",
    "tfidf_lr_balanced": "the same, classes balanced",
}


def write_card(folder: Path) -> None:
    """Write MODEL_CARD.md beside the two result files in `folder`."""
    record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    write_text(folder / CARD_NAME, card(record, result))


def card(record: dict[str, Any], result: dict[str, Any]) -> str:
    """The model card for a training record and an evaluation result."""
    parts = (
        _head(record, result),
        _data(record, result),
        _training(record),
        _figures(result),
        _examples(result),
        _limits(result),
    )
    return wrap_paragraphs("\n".join(parts))


def wrap_paragraphs(markdown: str) -> str:
    """`markdown` with its paragraphs and list items wrapped; tables, headings, code stay as is."""
    wrapped: list[str] = []
    paragraph: list[str] = []

    def finish() -> None:
        if paragraph:
            indent = "  " if paragraph[0].startswith("- ") else ""
            wrapped.extend(
                textwrap.wrap(
                    " ".join(line.strip() for line in paragraph),
                    _COLUMNS,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
            paragraph.clear()

    in_code = False
    for line in markdown.split("\n"):
        fence = line.startswith("```")
        if in_code or fence or not line or line.startswith(("#", "|", "<!--")):
            finish()
            wrapped.append(line)
            in_code ^= fence
            continue
        if line.startswith("- "):
            finish()
        paragraph.append(line)
    finish()
    return "\n".join(wrapped)


def _head(record: dict[str, Any], result: dict[str, Any]) -> str:
    config = record["config"]
    return f"""\
# The embedded checkpoint

<!-- written by `python -m gptjet.service.training.evaluate`; edit service/training/card.py -->

A small, genuine GPT-J (`GPTJForCausalLM`: {config["layers"]} layers x {config["width"]},
{config["heads"]} heads, untied output with bias, partial rotary positions, context 512,
byte-level BPE of 4096) that ships inside the package, so that the service, its streaming and the
sentiment app run for real on any machine, without a download. {record["parameters"] / 1e6:.2f} M
trained parameters (the embedding matrix is stored twice), FP16 safetensors of
{result["weight_bytes"] / 1e6:.2f} MB.

It does two things. It continues text in the manner of short reviews, tweets and editorials, and
it answers the prompt `Text: ...\\nSentiment:` with ` positive|negative|neutral\\nExplanation:
...<|endoftext|>`. It is meant for trying the service and for tests. It is not a general language
model and knows nothing beyond its training texts.
"""


def _data(record: dict[str, Any], result: dict[str, Any]) -> str:
    rows = record["rows"]
    total = sum(rows.values())
    choices = "\n".join(
        f"| {choice['neutral_below']} | {choice['neutral_share']:.0%} | "
        f"{choice['vader']['macro_f1']:.3f} | {choice['vader']['accuracy']:.3f} |"
        for choice in result["label_choice"]
    )
    loose = result["tfidf_lr_on_random_tenth"]
    strict = result["figures"]["tfidf_lr"]
    return f"""\
## Data

Rated snippets of movie reviews, product reviews, tweet-like texts and newspaper editorials, each
with the mean of fifteen to twenty human ratings in [-4, 4]:
`additional_resources/hutto_ICWSM_2014.tar.gz` in the source distribution of vaderSentiment 3.3.2
(`{SDIST_NAME}`, sha256 `{SDIST_SHA256}`), and the rated lexicon in the same distribution.
Licence: MIT, C.J. Hutto (`LICENSE-DATA.txt`); the snippets were collected by the authors of the
paper from public reviews, articles and tweets.

Cleaning: HTML entities decoded, quotes made plain, whitespace collapsed to single spaces. Texts
with the same words (case and punctuation ignored) count once: {total} rows remain.

**Splits.** {rows["train"]} train, {rows["validation"]} validation, {rows["test"]} held out (aimed
at {1 - TEST_SHARE - VALIDATION_SHARE:.0%}, {VALIDATION_SHARE:.0%} and {TEST_SHARE:.0%}). All
snippets of one product review or one editorial fall on one side, and so do texts with
{SHINGLE_WORDS} consecutive words in common. The archive numbers movie snippets through without
saying which review they come from: two differing sentences of one movie review can therefore fall
on two sides. Fingerprint of the held-out rows: `{result["heldout_fingerprint"][:16]}`. Nothing
was trained on them and the epoch was chosen on the validation rows; while the recipe was developed,
the baselines' figures on them, and an early version's figures and some of its answers, were read.

**Labels.** Neutral is a mean rating strictly between -{NEUTRAL_BELOW} and {NEUTRAL_BELOW} (raters
answered in whole points, so this rounds to their 0); beyond that positive or negative. Thresholds
compared, with VADER's own figures on a random tenth of all rows:

| neutral below | neutral rows | VADER macro-F1 | VADER accuracy |
|---|---|---|---|
{choices}

On such a random tenth, where sentences of one review stand on both sides, the TF-IDF regression
has macro-F1 {loose["macro_f1"]:.3f} and accuracy {loose["accuracy"]:.3f}; on the stricter
held-out split used here it has {strict["macro_f1"]:.3f} and {strict["accuracy"]:.3f}.
"""


def _training(record: dict[str, Any]) -> str:
    config = record["config"]
    best = next(item for item in record["validation"] if item["epoch"] == record["best_epoch"])
    return f"""\
## Training

`python -m gptjet.service.training.train`, from random weights, seed {config["seed"]},
{config["epochs"]} epochs of {record["steps"] // config["epochs"]} steps of up to
{config["batch_tokens"]} tokens, AdamW with peak learning rate {config["peak_learning_rate"]}
(warm-up, cosine), weight decay {config["weight_decay"]}, dropout {config["dropout"]},
{"bfloat16 autocast" if config["bfloat16"] else "FP32"}; the shipped weights are an exponential
average (decay {config["average_decay"]}) after epoch {record["best_epoch"]}, the best by
validation macro-F1 ({best["macro_f1"]:.3f}). {record["step_seconds"] / 60:.0f} minutes of
training steps with {record["threads"]} CPU threads on a machine that was doing other work too
(torch {record["torch"]}).

Every epoch shows each train row once with its answer: {EXCHANGE_SHARE:.0%} with some tone words
exchanged for words the lexicon rates alike, {LOWERCASE_SHARE:.0%} in lower case,
{NOISE_SHARE:.0%} of text tokens replaced at the input. Beside them: {PLAIN_SHARE:.0%} as many
plain texts, passages of consecutive snippets of one document, and {MADE_SHARE:.0%} as many short
texts made from the rated lexicon in plain sentences ("The food was wonderful."), of which only
the answer is learnt. The label's target is soft: the probability of each class when the mean
rating is uncertain by {RATING_SPREAD}; label weights are the class frequencies to the power
-{config["label_balance"]}. A rating regression on the label position helps training and is not
part of the checkpoint. Input and output embeddings are one matrix while training and are stored as
two. To learn to name words in so short a training, tokens of named words weigh {COPY_WEIGHT:.0f}
times as much as others, and {COPY_HEADS} heads of the last layer are shown where to look: a loss on
their attention to the word that is named next.

Explanations are computed, not written by people: up to three words of the text that the lexicon
rates at least 1 in strength, or that a ridge regression of the ratings on the words of the train
split finds as strong; a negator up to three words before turns the tone and is named with the
word.
"""


def _figures(result: dict[str, Any]) -> str:
    figures, text = result["figures"], result["text"]
    lines = "\n".join(
        f"| {_NAMES[name]} | {scores['macro_f1']:.3f} | {scores['accuracy']:.3f} | "
        + " | ".join(f"{scores['f1'][label]:.3f}" for label in LABELS)
        + " |"
        for name, scores in figures.items()
    )
    sources = "\n".join(
        f"| {source} | {scores['rows']} | "
        + " | ".join(f"{scores[name]:.3f}" for name in figures)
        + " |"
        for source, scores in result["macro_f1_by_source"].items()
    )
    confusion = "\n".join(
        f"| {label} | " + " | ".join(str(count) for count in counts) + " |"
        for label, counts in zip(LABELS, figures["embedded"]["confusion"], strict=True)
    )
    answers = result["explanations"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"""\
## Figures

On the {figures["embedded"]["rows"]} held-out rows, {result["date"]}, {versions}. The decision
takes the most probable of three single-token labels after the prompt; no prior is subtracted,
nothing calibrated.

| | macro-F1 | accuracy | F1 {" | F1 ".join(LABELS)} |
|---|---|---|---|---|---|
{lines}

| macro-F1 by source | rows | {" | ".join(_NAMES[name] for name in figures)} |
|---|---|---|---|---|---|
{sources}

| true \\ decided | {" | ".join(LABELS)} |
|---|---|---|---|
{confusion}

Held-out text: {text["perplexity_per_token"]:.1f} perplexity a token, {text["bits_per_byte"]:.3f}
bits a byte.

Greedy answers to {answers["rows"]} of these rows: {answers["well_formed"]:.1%} well-formed and
ended; of those, {answers["named_words_all_occur"]:.1%} name only words that stand in the text,
{answers["names_words"]:.1%} name any, {answers["same_words_as_reference"]:.1%} name exactly the
words of the computed explanation.
{_parity(result.get("parity"))}"""


def _parity(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return ""
    return f"""
Saved FP16 weights against the trained FP32 weights, {parity["rows"]} rows: weights differ by at
most {parity["max_weight_difference"]:.1e}, log-probabilities of the labels by at most \
{parity["max_log_prob_difference"]:.1e}, {parity["same_decisions"]:.2%} of decisions are the same.
The FP16 weights computed in FP16 instead of FP32, {parity["half_arithmetic_rows"]} rows: \
{parity["half_arithmetic_same_decisions"]:.2%} the same.
"""


def _examples(result: dict[str, Any]) -> str:
    answers = "\n\n".join(item["prompt"] + item["answer"] for item in result["examples"])
    plain = "\n\n".join(
        item["prompt"] + item["continuation"] for item in result["plain_generation"]
    )
    return f"""\
## Examples

Greedy answers, not selected:

```text
{answers}
```

Plain continuations (temperature 0.7, top-p 0.9, seed 0), not selected:

```text
{plain}
```
"""


def _limits(result: dict[str, Any]) -> str:
    scores = result["figures"]["embedded"]
    return f"""\
## Limits

- English only, and the English of American reviews, tweets and editorials of about 1990 to 2013.
- About {1 - scores["accuracy"]:.0%} of held-out rows are decided wrongly; "neutral" is the
  hardest class (F1 {scores["f1"]["neutral"]:.2f}). Irony, comparisons and tone without toned
  words are mostly missed.
- The explanation names words that carry tone by themselves. It is written after the label and is
  not how the label was computed; a right label can come with an unhelpful explanation.
- A text of more than about 440 tokens is cut by the evaluation's prompt; texts longer than one or
  two sentences are rare in training.
- Plain continuations have the manner of reviews, not their sense, and sometimes go over into the
  answer form ("Sentiment: ...") by themselves. They can repeat opinions, names
  and prejudices of the training texts. Nothing it writes is a statement of fact.
- Do not use it to judge people or to decide anything.
"""
