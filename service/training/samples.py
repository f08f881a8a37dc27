"""Token sequences with loss weights, and the batches of one epoch.

Two forms are trained: `text<|endoftext|>`, so that plain generation writes such texts, and the
prompt with its answer, `Text: ...\\nSentiment: label\\nExplanation: ...<|endoftext|>`. An epoch is
a pure function of (train rows, seed, epoch number): a resumed run rebuilds it exactly.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptjet.service.embedded import build_prompt
from gptjet.service.training.augment import Augmenter, RatedText, neighbours
from gptjet.service.training.corpus import LABELS, NEUTRAL_BELOW, Corpus, Row, label_for
from gptjet.service.training.explain import NO_TONE, ToneLexicon, explanation_for
from gptjet.service.training.tokenizer import CONTEXT_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# How far a mean rating is taken to be uncertain. The archive's raters deviate by 0.7 to 0.9 points,
# so the standard error of twenty is about 0.18; twice that keeps labels near a threshold soft.
RATING_SPREAD = 0.35

# Shares of train rows per epoch, beside one prompt sample of every row.
PLAIN_SHARE = 0.10
PASSAGES_PER_EPOCH = 150
LONG_PROMPTS_PER_EPOCH = 250
MADE_SHARE = 0.25
EXCHANGE_SHARE = 0.35
LOWERCASE_SHARE = 0.10
# Naming a word is one or two tokens among fifty, and the hardest ones to learn.
COPY_WEIGHT = 6.0
# Every phrase an explanation is built from; their tokens are not copies.
_PHRASES = (
    "\nExplanation: the word words sound sounds positive negative neutral, and but."
    f"{NO_TONE} only the word;; the whole reads positive negative neutral."
)
# Text tokens replaced by a random token at the input, so that no single word decides.
NOISE_SHARE = 0.02


@dataclass(frozen=True)
class Sample:
    """One sequence: `ids` [S]; `weights` [S] is the loss weight of predicting ids[i].

    `label_at` is the position whose next token is the label (-1: a plain text), `target` the
    probabilities of LABELS there, and `rating` the mean rating. `noisy` marks the positions that
    input noise may touch: [first, last).
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    noisy: tuple[int, int]
    label_at: int = -1
    target: tuple[float, ...] = (0.0, 0.0, 0.0)
    rating: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Right-padded samples.

    input_ids, targets int64 [B, S]; weights float [B, S]; copies bool [B, S] (the target is part
    of a named word); label_at int64 [B] (-1 where none); label_target float [B, 3]; rating [B].
    """

    input_ids: Tensor
    targets: Tensor
    weights: Tensor
    copies: Tensor
    label_at: Tensor
    label_target: Tensor
    rating: Tensor


def label_probabilities(rating: float) -> tuple[float, ...]:
    """Probabilities of LABELS when a mean rating is known to RATING_SPREAD (normal error)."""
    below = _normal_cdf((-NEUTRAL_BELOW - rating) / RATING_SPREAD)
    above = 1.0 - _normal_cdf((NEUTRAL_BELOW - rating) / RATING_SPREAD)
    by_label = {"negative": below, "neutral": 1.0 - below - above, "positive": above}
    return tuple(by_label[label] for label in LABELS)


def answer_for(text: str, rating: float, tones: ToneLexicon) -> str:
    """The reference answer to the prompt, from the label on and without `<|endoftext|>`."""
    label = label_for(rating)
    return f" {label}\nExplanation:{explanation_for(text, label, tones)}"


class SampleBuilder:
    """Builds samples of a corpus and the shuffled, length-bucketed batches of an epoch."""

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tones: ToneLexicon, seed: int
    ) -> None:
        self._rows = corpus.train
        self._tokenizer = tokenizer
        self._tones = tones
        self._seed = seed
        self._augmenter = Augmenter(corpus.lexicon, tones)
        self._end = int(tokenizer.eos_token_id)
        self._phrase_ids = set(self._encode(_PHRASES))
        documents: dict[str, list[Row]] = defaultdict(list)
        for row in corpus.train:
            documents[row.document].append(row)
        self._documents = [rows for rows in documents.values() if len(rows) > 1]

    def epoch(self, number: int) -> list[Sample]:
        """All samples of epoch `number`, unshuffled."""
        rng = random.Random(f"{self._seed}:{number}:samples")
        samples = [self._prompt(self._vary(row, rng)) for row in self._rows]
        count = len(self._rows)
        samples += [
            self._plain(row.text) for row in rng.sample(self._rows, int(PLAIN_SHARE * count))
        ]
        samples += [
            self._prompt(self._augmenter.made_text(rng)) for _ in range(int(MADE_SHARE * count))
        ]
        if self._documents:
            for _ in range(min(PASSAGES_PER_EPOCH, count)):
                samples.append(self._plain(self._passage(rng, 4, 12).text))
            for _ in range(min(LONG_PROMPTS_PER_EPOCH, count)):
                samples.append(self._prompt(self._passage(rng, 2, 4)))
        return samples

    def groups(self, number: int, batch_tokens: int) -> list[list[Sample]]:
        """Epoch `number` in shuffled groups of at most `batch_tokens` padded tokens."""
        rng = random.Random(f"{self._seed}:{number}:order")
        return group_by_length(self.epoch(number), batch_tokens, rng)

    def batch(self, group: Sequence[Sample], number: int, index: int) -> Batch:
        """The batch of a group. Its noise depends only on seed, epoch and place in the epoch."""
        noise = random.Random(f"{self._seed}:{number}:noise:{index}")
        return collate(group, noise, len(self._tokenizer))

    def _vary(self, row: Row, rng: random.Random) -> RatedText:
        text = row.text
        draw = rng.random()
        if draw < EXCHANGE_SHARE:
            text = self._augmenter.exchange_tones(text, rng)
        elif draw < EXCHANGE_SHARE + LOWERCASE_SHARE:
            text = text.lower()
        return RatedText(text, row.mean_rating)

    def _passage(self, rng: random.Random, least: int, most: int) -> RatedText:
        return neighbours(rng.choice(self._documents), least, most, rng)

    def _plain(self, text: str) -> Sample:
        ids = [*self._encode(text)[: CONTEXT_TOKENS - 1], self._end]
        # Nothing precedes the first token, so nothing predicts it.
        return Sample(tuple(ids), (0.0, *[1.0] * (len(ids) - 1)), noisy=(0, 0))

    def _prompt(self, rated: RatedText) -> Sample:
        answer = self._encode(answer_for(rated.text, rated.rating, self._tones))
        head, tail = self._frame()
        text = self._encode(" " + rated.text)
        text = text[: CONTEXT_TOKENS - len(head) - len(tail) - len(answer) - 1]
        prompt = head + text + tail
        ids = [*prompt, *answer, self._end]
        # Made sentences teach the answer, not how people write.
        text_weight = 0.0 if rated.made else 1.0
        weights = [0.0] * len(head) + [text_weight] * len(text) + [0.1] * len(tail)
        # The label itself (first token of the answer) has its own loss.
        weights += [0.0, *self._answer_weights(answer[1:], text), 1.0]
        return Sample(
            ids=tuple(ids),
            weights=tuple(weights),
            noisy=(len(head), len(head) + len(text)),
            label_at=len(prompt) - 1,
            target=label_probabilities(rated.rating),
            rating=rated.rating,
        )

    def _answer_weights(self, answer: Sequence[int], text: Sequence[int]) -> list[float]:
        """COPY_WEIGHT for tokens of named words, 1 for the phrases around them."""
        copied = set(text) - self._phrase_ids
        return [COPY_WEIGHT if token in copied else 1.0 for token in answer]

    def _frame(self) -> tuple[list[int], list[int]]:
        before, after = build_prompt("\0").split(" \0")
        return self._encode(before), self._encode(after)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))


def group_by_length(
    samples: Sequence[Sample], batch_tokens: int, rng: random.Random
) -> list[list[Sample]]:
    """Shuffled batches of samples of similar length, each within `batch_tokens` after padding."""
    shuffled = list(samples)
    rng.shuffle(shuffled)
    # Stable sort of a shuffled list: equal lengths stay in random order.
    shuffled.sort(key=lambda sample: len(sample.ids))
    groups: list[list[Sample]] = []
    current: list[Sample] = []
    for sample in shuffled:
        if current and (len(current) + 1) * len(sample.ids) > batch_tokens:
            groups.append(current)
            current = []
        current.append(sample)
    if current:
        groups.append(current)
    rng.shuffle(groups)
    return groups


def collate(group: Sequence[Sample], noise: random.Random, vocab_size: int) -> Batch:
    """Pad a group of samples on the right; shift targets and weights to the predicting position."""
    length = max(len(sample.ids) for sample in group)
    input_ids = torch.zeros(len(group), length, dtype=torch.int64)
    targets = torch.zeros(len(group), length, dtype=torch.int64)
    weights = torch.zeros(len(group), length)
    for index, sample in enumerate(group):
        ids = torch.tensor(sample.ids, dtype=torch.int64)
        size = len(ids)
        input_ids[index, :size] = ids
        targets[index, : size - 1] = ids[1:]
        weights[index, : size - 1] = torch.tensor(sample.weights[1:])
        for position in range(*sample.noisy):
            if noise.random() < NOISE_SHARE:
                input_ids[index, position] = noise.randrange(1, vocab_size)
    return Batch(
        input_ids=input_ids,
        targets=targets,
        weights=weights,
        copies=weights == COPY_WEIGHT,
        label_at=torch.tensor([sample.label_at for sample in group]),
        label_target=torch.tensor([sample.target for sample in group]),
        rating=torch.tensor([sample.rating for sample in group]),
    )


def _normal_cdf(value: float) -> float:
    return 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))
