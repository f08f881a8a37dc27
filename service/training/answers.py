"""Written answers of the finished checkpoint: generate them, take them apart, check them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from gptjet.service.embedded import LABELS, Label
from gptjet.service.training.explain import NO_TONE
from gptjet.service.training.scoring import ANSWER_TOKENS, prompt_ids

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM, PreTrainedTokenizerBase


_ANSWER = re.compile(r"^ (negative|neutral|positive)\nExplanation:(?P<explanation> .+)$")
_CLAUSE = re.compile(r"\bthe words? (.+?) sounds? (positive|negative)\b")


@dataclass(frozen=True)
class Answer:
    """A well-formed answer. `named` holds (words as spelled, tone) pairs."""

    label: Label
    explanation: str
    named: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class AnswerFigures:
    """Shares in [0, 1] over `rows` greedy answers; the last three over well-formed ones."""

    rows: int
    well_formed: float
    names_words: float
    named_words_all_occur: float
    same_words_as_reference: float


def parse_answer(text: str) -> Answer | None:
    """The parts of a generated answer (`<|endoftext|>` already removed); None if malformed."""
    match = _ANSWER.match(text)
    if match is None:
        return None
    explanation = match["explanation"]
    named = named_words(explanation)
    if not named and explanation != NO_TONE:
        return None
    label = LABELS[LABELS.index(match[1])]
    return Answer(label, explanation, named)


def named_words(explanation: str) -> tuple[tuple[str, str], ...]:
    """(words, tone) pairs that an explanation names, in its order."""
    pairs = []
    for listed, tone in _CLAUSE.findall(explanation):
        pairs += [(words, tone) for words in re.split(r", | and ", listed) if words]
    return tuple(pairs)


def occurs(words: str, text: str) -> bool:
    """Whether `words` stand in `text` exactly so, as whole words."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def greedy_continuations(
    model: GPTJForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = ANSWER_TOKENS,
    batch_size: int = 64,
) -> list[str | None]:
    """Greedy continuation of each prompt without its `<|endoftext|>`; None if that never came."""
    end = int(tokenizer.eos_token_id)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: list[str | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in indices)
        input_ids = torch.full((len(indices), longest), end)
        mask = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            size = len(prompts[index])
            input_ids[row, longest - size :] = torch.tensor(list(prompts[index]))
            mask[row, longest - size :] = 1
        with torch.no_grad():
            output = cast(Any, model).generate(
                input_ids=input_ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=end,
            )
        for index, ids in zip(indices, output[:, longest:].tolist(), strict=True):
            if end in ids:
                results[index] = str(tokenizer.decode(ids[: ids.index(end)]))
    return results


def answer_figures(
    texts: Sequence[str], answers: Sequence[str | None], references: Sequence[str]
) -> AnswerFigures:
    """Check generated answers against their texts and the reference explanations."""
    formed = faithful = naming = same = 0
    for text, raw, reference in zip(texts, answers, references, strict=True):
        answer = None if raw is None else parse_answer(raw)
        if answer is None:
            continue
        formed += 1
        naming += bool(answer.named)
        faithful += all(occurs(words, text) for words, _ in answer.named)
        same += set(answer.named) == set(named_words(reference))
    count = max(formed, 1)
    return AnswerFigures(
        rows=len(texts),
        well_formed=formed / len(texts),
        names_words=naming / count,
        named_words_all_occur=faithful / count,
        same_words_as_reference=same / count,
    )


def answers_for(
    model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[str | None]:
    """Greedy answers to the sentiment prompt of each text."""
    return greedy_continuations(model, tokenizer, [prompt_ids(tokenizer, text) for text in texts])
