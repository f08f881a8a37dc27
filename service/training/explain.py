"""Tone words and the explanations the model learns to write.

An explanation may only name words that occur in the text, exactly as written there, so a reader
can check it. Which words carry tone comes from two sources, both fitted without held-out rows: the
human-rated VADER lexicon, and a ridge regression of the mean rating on the words of the train
split (it finds "lacks" and "unfunny", which the lexicon does not rate).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import Ridge

from gptjet.service.training.corpus import Label, Row

NO_TONE = " no word carries a clear tone."

# Words of a text: letters and digits with inner apostrophes and hyphens.
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")

# Human means below 1 on the 4-point scale are words such as "feeling" or "number".
MIN_LEXICON_TONE = 1.0
# A word the regression alone vouches for: seen often, and worth this much of the 4-point scale.
MIN_LEARNED_TONE = 0.6
MIN_LEARNED_ROWS = 15
# Names ("Spielberg", "Korean") stand out by their capital, and are not tone.
MIN_LOWERCASE_SHARE = 0.6
RIDGE_PENALTY = 6.0
MAX_NAMED = 3

# A negator turns the tone of a word at most this many words after it.
NEGATION_REACH = 3
# VADER multiplies a negated valence by -0.74 (Hutto & Gilbert 2014, section 3.3).
NEGATION_FACTOR = -0.74
_NEGATOR_LIST = """
not no never none nothing nobody neither nor without cannot hardly barely scarcely isn't aren't
wasn't weren't don't doesn't didn't won't wouldn't can't couldn't shouldn't hasn't haven't
hadn't ain't dont doesnt didnt isnt wasnt wont cant"""
NEGATORS = frozenset(_NEGATOR_LIST.split())


@dataclass(frozen=True)
class ToneSpan:
    """A stretch of the text that carries tone: `text[start:end]`, with its signed strength."""

    start: int
    end: int
    tone: float


class ToneLexicon:
    """Signed tone of words, in points of the raters' [-4, 4] scale."""

    def __init__(self, tones: Mapping[str, float]) -> None:
        self._tones = dict(tones)

    def __len__(self) -> int:
        return len(self._tones)

    def tone(self, word: str) -> float:
        """The word's tone; 0.0 for a word that carries none."""
        return self._tones.get(word.lower(), 0.0)

    def spans(self, text: str) -> list[ToneSpan]:
        """Tone-carrying spans of `text` in order; a negated word's span starts at its negator."""
        found: list[ToneSpan] = []
        words = list(WORD.finditer(text))
        for index, word in enumerate(words):
            tone = self.tone(word.group())
            if tone == 0.0 or word.group().lower() in NEGATORS:
                continue
            start = word.start()
            negator = _negator_before(text, words, index)
            if negator is not None:
                start, tone = negator.start(), tone * NEGATION_FACTOR
            if found and start < found[-1].end:
                # "not good or great": one negator, one span, the stronger tone.
                last = found.pop()
                start, tone = last.start, max(last.tone, tone, key=abs)
            found.append(ToneSpan(start, word.end(), tone))
        return found


def _negator_before(text: str, words: Sequence[re.Match[str]], index: int) -> re.Match[str] | None:
    """The negator that governs words[index]: near enough and not cut off by punctuation."""
    for candidate in reversed(words[max(0, index - NEGATION_REACH) : index]):
        if re.search(r"[,.;:!?()\"]", text[candidate.start() : words[index].start()]):
            return None
        if candidate.group().lower() in NEGATORS:
            return candidate
    return None


def build_tone_lexicon(lexicon: Mapping[str, float], train: Sequence[Row]) -> ToneLexicon:
    """Human-rated words joined by words whose ratings in `train` show a tone.

    A rated word that the regression clearly contradicts in these domains ("like" as a
    preposition, "plot") is left out rather than named wrongly.
    """
    vectorizer = CountVectorizer(token_pattern=WORD.pattern, binary=True, min_df=MIN_LEARNED_ROWS)
    counts = vectorizer.fit_transform([row.text for row in train])
    ridge = Ridge(alpha=RIDGE_PENALTY, random_state=0)
    ridge.fit(counts, [row.mean_rating for row in train])
    learned = dict(zip(vectorizer.get_feature_names_out().tolist(), ridge.coef_, strict=True))

    tones = {}
    for word, rating in lexicon.items():
        in_domain = learned.get(word)
        contradicted = in_domain is not None and in_domain * rating <= 0.0
        if abs(rating) >= MIN_LEXICON_TONE and WORD.fullmatch(word) and not contradicted:
            tones[word] = rating
    spellings = Counter(word for row in train for word in set(WORD.findall(row.text)))
    for word, coefficient in learned.items():
        spelled_low, spelled_high = spellings[word], spellings[word.capitalize()]
        is_name = spelled_low < MIN_LOWERCASE_SHARE * (spelled_low + spelled_high)
        if abs(coefficient) >= MIN_LEARNED_TONE and word.isalpha() and not is_name:
            tones.setdefault(word, float(coefficient))
    return ToneLexicon(tones)


def explanation_for(text: str, label: Label, lexicon: ToneLexicon) -> str:
    """The explanation of `label` for `text`, with its leading space and full stop.

    Words are named as the text spells them and unquoted: in a byte-level BPE the copy then has
    the tokens of the original, and naming a word becomes copying it.
    """
    spans = lexicon.spans(text)
    positive = _named(text, [span for span in spans if span.tone > 0])
    negative = _named(text, [span for span in spans if span.tone < 0])
    if not positive and not negative:
        return NO_TONE
    if label == "positive" and positive:
        return f" {_clause(positive, 'positive')}."
    if label == "negative" and negative:
        return f" {_clause(negative, 'negative')}."
    if label == "neutral" and positive and negative:
        return f" {_clause(positive[:1], 'positive')} but {_clause(negative[:1], 'negative')}."
    tone, named = ("positive", positive) if positive else ("negative", negative)
    return f" only {_clause(named[:1], tone)}; the whole reads {label}."


def _named(text: str, spans: Sequence[ToneSpan]) -> list[str]:
    """Up to MAX_NAMED distinct spans, the strongest ones, in the order of the text."""
    strongest = sorted(spans, key=lambda span: -abs(span.tone))
    chosen: dict[str, ToneSpan] = {}
    for span in strongest:
        chosen.setdefault(text[span.start : span.end].lower(), span)
    kept = sorted(list(chosen.values())[:MAX_NAMED], key=lambda span: span.start)
    return [text[span.start : span.end] for span in kept]


def _clause(words: Sequence[str], tone: str) -> str:
    if len(words) == 1:
        several = " " in words[0]
        return f"the word{'s' * several} {words[0]} sound{'s' * (not several)} {tone}"
    listed = ", ".join(words[:-1]) + f" and {words[-1]}"
    return f"the words {listed} sound {tone}"
