"""Varied train texts and short texts made from the rated lexicon.

Twenty thousand snippets name most tone words once or never. Both tools here use only the train
split and the human-rated lexicon: a tone word is exchanged for another of about the same rating,
and lexicon words are put into plain sentences ("The food was wonderful.") rated by the lexicon.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptjet.service.training.corpus import Row
from gptjet.service.training.explain import NEGATION_FACTOR, WORD, ToneLexicon

# Exchanged words differ by at most this much on the raters' scale.
EXCHANGE_TOLERANCE = 0.4
EXCHANGE_WORD_SHARE = 0.5
# VADER's increment for "very", "extremely" and their like (Hutto & Gilbert 2014).
BOOST = 0.293

_NOUN_LIST = """
food service staff phone camera battery screen story acting plot movie film book song picture
sound product player software support price design day weather game trip hotel room meal coffee
concert show ending script cast music idea meeting result team city train website view update
flight article speech letter decision policy school garden museum party weekend dress car laptop
dinner lunch pizza soup driver teacher doctor neighbour cover remote menu"""
_NOUNS = _NOUN_LIST.split()
_BOOSTERS = ("very", "really", "so", "extremely", "absolutely", "incredibly", "truly")
_DETERMINERS = ("The", "the", "This", "That", "My", "Our", "Their", "His", "Her", "Your")
_VERBS = ("was", "is", "seems", "felt", "looks", "turned out", "has been")
_PLAIN = (
    "{det} {noun} arrives at {n} o'clock.",
    "{det} {noun} is on the table.",
    "We moved {det_low} {noun} to the other room.",
    "{det} {noun} has {n} parts.",
    "I will send you {det_low} {noun} on Monday.",
    "{det} {noun} was there at {n}.",
    "{det} {noun} costs ${n}.",
    "Where is {det_low} {noun}?",
    "There are {n} pages about {det_low} {noun}.",
    "{det} {noun} and {det_low} {noun2} are in the same street.",
)


@dataclass(frozen=True)
class RatedText:
    """A text and the rating it stands for in [-4, 4]; `made` texts are not written by people."""

    text: str
    rating: float
    made: bool = False


class Augmenter:
    """Draws varied and made texts; every draw uses the caller's random generator only."""

    def __init__(self, lexicon: Mapping[str, float], tones: ToneLexicon) -> None:
        self._tones = tones
        known = [(rating, word) for word, rating in lexicon.items() if tones.tone(word) == rating]
        self._by_rating = sorted(known)
        self._ratings = [rating for rating, _ in self._by_rating]
        self._words = [word for _, word in self._by_rating]
        self._emoticons = [
            (word, rating) for word, rating in lexicon.items() if not any(map(str.isalnum, word))
        ]

    def exchange_tones(self, text: str, rng: random.Random) -> str:
        """`text` with about half its rated tone words replaced by words rated alike."""
        pieces, end = [], 0
        for match in WORD.finditer(text):
            tone = self._tones.tone(match.group())
            if tone == 0.0 or rng.random() > EXCHANGE_WORD_SHARE:
                continue
            replacement = self._word_near(tone, match.group(), rng)
            pieces += [text[end : match.start()], replacement]
            end = match.end()
        return "".join([*pieces, text[end:]])

    def made_text(self, rng: random.Random) -> RatedText:
        """A short text around one to three lexicon words, or around none."""
        draw = rng.random()
        if draw < 0.15:
            return RatedText(self._plain(rng), 0.0, made=True)
        if draw < 0.20:
            emoticon, rating = rng.choice(self._emoticons)
            return RatedText(f"{self._subject(rng)} today {emoticon}", rating, made=True)
        word, rating = self._any_word(rng)
        if draw < 0.35:
            text = rng.choice((word, word.capitalize(), f"{word}!", f"{word.capitalize()}."))
            return RatedText(text, rating, made=True)
        subject = f"{self._subject(rng)} {rng.choice(_VERBS)}"
        end = rng.choice((".", ".", "!", ""))
        if draw < 0.50:
            second = self._word_near(rating, word, rng)
            return RatedText(f"{subject} {word} and {second}{end}", 1.3 * rating, made=True)
        if draw < 0.68:
            negation = rng.choice(("not", "not very", "never", "not really", "hardly"))
            text = f"{subject} {negation} {word}{end}"
            return RatedText(text, NEGATION_FACTOR * rating, made=True)
        if draw < 0.80:
            text = f"{subject} {rng.choice(_BOOSTERS)} {word}{end}"
            return RatedText(text, rating + (BOOST if rating > 0 else -BOOST), made=True)
        return RatedText(f"{subject} {word}{end}", rating, made=True)

    def _subject(self, rng: random.Random) -> str:
        return rng.choice(("It", "I think it", f"{rng.choice(_DETERMINERS)} {rng.choice(_NOUNS)}"))

    def _plain(self, rng: random.Random) -> str:
        determiner = rng.choice(_DETERMINERS)
        return rng.choice(_PLAIN).format(
            det=determiner,
            det_low=determiner.lower(),
            noun=rng.choice(_NOUNS),
            noun2=rng.choice(_NOUNS),
            n=rng.randint(2, 60),
        )

    def _any_word(self, rng: random.Random) -> tuple[str, float]:
        rating, word = rng.choice(self._by_rating)
        return word, rating

    def _word_near(self, tone: float, like: str, rng: random.Random) -> str:
        low = bisect_left(self._ratings, tone - EXCHANGE_TOLERANCE)
        high = bisect_right(self._ratings, tone + EXCHANGE_TOLERANCE)
        if low >= high:
            return like
        word = self._words[rng.randrange(low, high)]
        return word.capitalize() if like[:1].isupper() else word


def neighbours(rows: Sequence[Row], least: int, most: int, rng: random.Random) -> RatedText:
    """Consecutive snippets of one document as one text, rated by their mean.

    `rows` are the snippets of a document in order; `least`..`most` of them are joined.
    """
    count = min(len(rows), rng.randint(least, most))
    start = rng.randint(0, len(rows) - count)
    chosen = rows[start : start + count]
    rating = sum(row.mean_rating for row in chosen) / count
    return RatedText(" ".join(row.text for row in chosen), rating)
