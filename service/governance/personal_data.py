"""Personal data: e-mail and IP addresses, telephone, card, account and identity numbers.

phonenumbers knows the numbering plans, python-stdnum the check digits; what is ours is where to
look, so that a number in several words or tokens is seen whole. A text is cut into segments that
no such datum crosses: a word, or several words of digits ("+49 30 1234 567", "GB29 NWBK 6016").
Only the last segment of a stream is held back, so prose waits for the end of a word at most.

Looked for in ASCII characters, full-width ones read as such; account numbers in groups are seen in
capitals only.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from gptjet.service.governance.automaton import Found
from gptjet.service.governance.libraries import load

# Longer than any datum: an e-mail address has at most 254 characters (RFC 5321, 4.5.3.1.3).
_LONGEST = 256
# And any number with what separates its groups.
_LONGEST_NUMBER = 96
_MOST_SEGMENT = 512
_MOST_ENTRIES = 65_536
_INNER = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789@._%+-()/:#'")
_RUN = re.compile(f"[{re.escape(''.join(sorted(_INNER)))}]+")
_DIGITS = frozenset("0123456789")
# White space that may stand inside a number.
_JOINERS = frozenset(" \u00a0\u2007\u202f")
_GROUP = re.compile(r"[A-Za-z0-9]+")
_SHORT_CAPITALS = re.compile(r"[A-Z]{1,4}")
_EMAIL = re.compile(r"[A-Za-z0-9._%+'-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_IP = re.compile(
    r"(?<![0-9A-Za-z.:])(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f:]{2,39})(?![0-9A-Za-z])"
)
_SEPARATORS = re.compile(r"[ \-./]{0,3}")
_FEWEST_PHONE_DIGITS = 7
# ISO/IEC 7812-1 card numbers as issued; ISO 13616 account numbers; the rest of python-stdnum.
_CARD_DIGITS = (13, 19)
_IBAN_LENGTHS = (15, 34)
_IBAN_BEGINS = re.compile(r"[A-Za-z]{2}[0-9]{2}")
_NUMBER_LENGTHS = (5, 24)

Finder = Callable[[str], Iterable[tuple[int, int]]]

KINDS = ("card", "email", "iban", "ip", "phone")


def make_finders(kinds: Sequence[str], regions: Sequence[str]) -> list[Finder]:
    """A function for each kind, from a segment to the (start, end) of what is in it.

    kinds    of KINDS, or the number formats of python-stdnum by country and name: "us.ssn"
    regions  ISO 3166 codes; telephone numbers without a country code are read as theirs

    Raises MissingLibraryError, or ValueError for a kind or region that there is not.
    """
    return [_finder(kind, regions) for kind in kinds]


def _finder(kind: str, regions: Sequence[str]) -> Finder:
    if kind == "email":
        return _email
    if kind == "ip":
        return _ip
    if kind == "phone":
        return _phone(regions)
    if kind == "card":
        return _numbers(load("stdnum.luhn", "python-stdnum").is_valid, _CARD_DIGITS, digits=True)
    if kind == "iban":
        is_valid = load("stdnum.iban", "python-stdnum").is_valid
        return _numbers(is_valid, _IBAN_LENGTHS, begins=_IBAN_BEGINS)
    country, dot, name = kind.partition(".")
    module = load("stdnum", "python-stdnum").get_cc_module(country, name) if dot else None
    if module is None:
        raise ValueError(
            f"{kind!r} is no kind of personal data: {', '.join(KINDS)}, or a format of "
            "python-stdnum such as us.ssn or de.idnr"
        )
    return _numbers(module.is_valid, _NUMBER_LENGTHS)


def _email(text: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield match.span()


def _ip(text: str) -> Iterator[tuple[int, int]]:
    if text.count(".") < 3 and text.count(":") < 2:
        return
    for match in _IP.finditer(text):
        address = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
        try:
            ipaddress.ip_address(address)
        except ValueError:
            continue
        yield match.start(), match.start() + len(address)


def _phone(regions: Sequence[str]) -> Finder:
    phonenumbers = load("phonenumbers", "phonenumberslite")
    unknown = sorted(set(regions) - set(phonenumbers.SUPPORTED_REGIONS))
    if unknown:
        raise ValueError(f"regions: {', '.join(unknown)}: no region with telephone numbers")

    def find(text: str) -> Iterator[tuple[int, int]]:
        if sum(character in _DIGITS for character in text) < _FEWEST_PHONE_DIGITS:
            return
        for region in regions or (None,):
            for match in phonenumbers.PhoneNumberMatcher(text, region):
                yield match.start, match.end

    return find


def _numbers(
    is_valid: Callable[[str], bool],
    lengths: tuple[int, int],
    *,
    digits: bool = False,
    begins: re.Pattern[str] | None = None,
) -> Finder:
    """Try each run of groups of characters, as numbers are printed in several of them."""
    fewest, most = lengths

    def find(text: str) -> Iterator[tuple[int, int]]:
        groups = [match.span() for match in _GROUP.finditer(text)]
        for first, (start, _) in enumerate(groups):
            characters, previous_end = "", start
            for begin, end in groups[first:]:
                if not _SEPARATORS.fullmatch(text, previous_end, begin):
                    break
                characters += text[begin:end]
                previous_end = end
                if len(characters) > most or (digits and not characters.isdigit()):
                    break
                if len(characters) < fewest:
                    continue
                if begins is not None and not begins.match(characters):
                    break
                if _has_digit(characters) and is_valid(characters):
                    yield start, end

    return find


def _has_digit(text: str) -> bool:
    return not _DIGITS.isdisjoint(text)


class PersonalDataMatcher:
    """The personal data in one text that arrives in pieces, for the rules `owners`.

    finders  owner -> its finders. A datum is certain where its segment has ended.
    """

    __slots__ = ("_finders", "_numeric", "_position", "_segment", "_start", "_word")

    def __init__(self, finders: Sequence[tuple[int, Sequence[Finder]]], position: int = 0) -> None:
        self._finders = finders
        self._position = position
        self._start = 0
        # One character for each of the text from _start on.
        self._segment = ""
        # Where in the segment the last word begins, None after white space.
        self._word: int | None = None
        self._numeric = False

    @property
    def hold(self) -> int:
        """Where the text begins that a datum may still cover."""
        return self._start if self._segment else self._position

    def push(self, text: str) -> list[Found]:
        """Take the next piece; what became certain, in the order it did."""
        found: list[Found] = []
        place = 0
        while place < len(text):
            run = _RUN.match(text, place)
            if run is not None:
                place = run.end()
                found += self._extend(run[0])
                continue
            plain = _PLAIN[text[place]]
            place += 1
            if plain in _INNER:
                found += self._extend(plain)
                continue
            self._position += 1
            if not self._segment:
                continue
            if plain in _JOINERS and self._joins():
                self._segment += " "
                if len(self._segment) >= _MOST_SEGMENT:
                    found += self._cut()
            else:
                found += self._close()
        return found

    def finish(self) -> list[Found]:
        """The text has ended: what is in its last segment."""
        return self._close()

    def copy(self) -> PersonalDataMatcher:
        """The same place of the same text, to go on from twice."""
        twin = PersonalDataMatcher(self._finders)
        twin._position, twin._start, twin._word = self._position, self._start, self._word
        twin._segment, twin._numeric = self._segment, self._numeric
        return twin

    def _extend(self, run: str) -> list[Found]:
        """More characters of a word."""
        found: list[Found] = []
        while run:
            if not self._segment:
                self._start = self._position
            if self._word is None:
                self._word = len(self._segment)
            piece = run[: _MOST_SEGMENT - len(self._segment)]
            run = run[len(piece) :]
            self._segment += piece
            self._position += len(piece)
            if len(self._segment) >= _MOST_SEGMENT:
                found += self._cut()
        return found

    def _joins(self) -> bool:
        """Whether a number may go on after the white space that has come."""
        if self._word is None:
            return False  # two spaces in a row
        word = self._segment[self._word :]
        self._word = None
        if _has_digit(word):
            self._numeric = True
            return True
        if not any(character.isalnum() for character in word):
            return True
        return self._numeric and _SHORT_CAPITALS.fullmatch(word) is not None

    def _close(self) -> list[Found]:
        found = self._look()
        self._segment, self._word, self._numeric = "", None, False
        return found

    def _cut(self) -> list[Found]:
        """Keep the end that a datum may have begun in; what begins before it is certain."""
        in_word = 0 if self._word is None else len(self._segment) - self._word
        kept = min(max(in_word, _LONGEST_NUMBER), _LONGEST)
        cut = self._start + len(self._segment) - kept
        found = [item for item in self._look() if item.start < cut]
        cut = max([cut, *(item.end for item in found)])
        self._segment = self._segment[cut - self._start :]
        self._start = cut
        if not self._segment or self._segment.endswith(" "):
            self._word = None
        else:
            self._word = self._segment.rfind(" ") + 1
        return found

    def _look(self) -> list[Found]:
        segment = self._segment
        if not (_has_digit(segment) or "@" in segment or ":" in segment):
            return []
        found = {
            Found(owner, self._start + start, self._start + end, self._position)
            for owner, finders in self._finders
            for finder in finders
            for start, end in finder(segment)
        }
        return sorted(found)


class _PlainTable(dict[str, str]):
    """character -> what it is read as."""

    def __missing__(self, character: str) -> str:
        if len(self) >= _MOST_ENTRIES:
            self.clear()
        plain = self[character] = _plain(character)
        return plain


def _plain(character: str) -> str:
    """A full-width character as the usual one, a hyphen or dash of any kind as "-"."""
    if unicodedata.category(character) == "Pd":
        return "-"
    normal = unicodedata.normalize("NFKC", character)
    return normal if len(normal) == 1 else character


_PLAIN = _PlainTable()
