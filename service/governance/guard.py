"""A chain applied to one text: what may leave of it, and what was found.

What leaves depends on the text alone, never on the pieces it came in: a character leaves as soon as
no rule that enforces can still find something that covers it. Text that is redacted leaves as its
rule's replacement, once for each stretch of overlapping matches.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from gptjet.service.governance.automaton import Found
from gptjet.service.governance.policy import Chain, Matcher, Rule
from gptjet.service.governance.policy_file import Action

# Shown to a reviewer beside a match, where texts may be kept at all.
EXCERPT_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule found in text[start:end], and what was done: the rule's action, or more.

    matched  the text itself, "" for a rule on length; it goes no further than its digest unless
             excerpts are configured
    before   up to EXCERPT_CHARACTERS of the text before it
    """

    rule: Rule
    action: Action
    start: int
    end: int
    matched: str
    before: str


# Whether a reviewer has rejected what a rule found: (rule name, matched text).
IsRejected = Callable[[str, str], bool]


class Guard:
    """One text under a chain. `blocked` is the finding that ended it; nothing leaves after that.

    context  the text that stands before it (a prompt before its output): what begins there and ends
             here is found, and the part that lies here is what it covers

    patterns_only  apply only rules of phrases and expressions

    `findings` grows as text comes. Not thread-safe.
    """

    def __init__(
        self,
        chain: Chain,
        is_rejected: IsRejected,
        context: str = "",
        *,
        patterns_only: bool = False,
    ) -> None:
        self._chain = chain
        self._is_rejected = is_rejected
        # Folded patterns skip characters, so more of the context than they are long.
        tail = context[-2 * chain.context - EXCERPT_CHARACTERS :] if chain.context else ""
        reading, others = chain.matchers(len(tail), patterns_only=patterns_only)
        for matcher, _ in reading:
            matcher.push(tail)
        self._matchers: list[Matcher] = []
        self._holding: list[int] = []
        for index, (matcher, holds) in enumerate((*reading, *others)):
            self._matchers.append(matcher)
            if holds:
                self._holding.append(index)
        # Text from _base on; negative in the context.
        self._text = tail
        self._base = -len(tail)
        self._end = 0
        self._released = 0
        self._redacted_to = 0
        self._spans: list[tuple[int, int, int, str]] = []
        # (end, start) of what is redacted, by the end.
        self._covered: list[tuple[int, int]] = []
        self.hold = 0
        self.findings: list[Finding] = []
        self.blocked: Finding | None = None

    def push(self, text: str) -> None:
        """Take the next piece; `release` gives what may leave."""
        if self.blocked is not None or not text:
            return
        before = [matcher.copy() for matcher in self._matchers] if self._chain.may_block else []
        found = [item for matcher in self._matchers for item in matcher.push(text)]
        offset = self._end
        self._text += text
        self._end += len(text)
        if found:
            seen = self._take(found)
            if seen is not None:
                # As far as a reader who got one character at a time would have got.
                for matcher in before:
                    matcher.push(text[: seen - 1 - offset])
                self._matchers = before
                self._set_hold(seen - 1)
                return
        self._set_hold(self._end)

    def finish(self) -> None:
        """The text has ended."""
        if self.blocked is not None:
            return
        found = [item for matcher in self._matchers for item in matcher.finish()]
        if self._take(found) is None:
            self.hold = self._end

    def release(self, limit: int | None = None) -> str:
        """What may leave now and has not yet, of the first `limit` characters if that is given."""
        upto = self.hold if limit is None else min(self.hold, limit)
        parts: list[str] = []
        position = self._released
        while position < upto:
            while self._spans and self._spans[0][0] < self._redacted_to:
                self._redacted_to = max(self._redacted_to, self._spans.pop(0)[2])
            if position < self._redacted_to:
                position = min(self._redacted_to, upto)
                continue
            if self._spans and self._spans[0][0] < upto:
                start, _, end, replacement = self._spans.pop(0)
                parts.append(self._slice(position, start))
                parts.append(replacement)
                position, self._redacted_to = start, end
                continue
            parts.append(self._slice(position, upto))
            position = upto
        self._released = max(position, self._released)
        self._forget()
        return "".join(parts)

    def covers(self, start: int, end: int) -> bool:
        """Whether something in text[start:end] is redacted; everything in it must be certain.

        Of an empty range: whether it lies inside of something. Ranges are asked in their order.
        """
        while self._covered and self._covered[0][0] <= start:
            self._covered.pop(0)
        if start == end:
            return any(first < start < last for last, first in self._covered)
        return any(first < end and start < last for last, first in self._covered)

    def _take(self, found: list[Found]) -> int | None:
        """Note what was found; if that blocks, after how many characters it did."""
        for item in sorted(found, key=lambda item: (item.seen, item.owner, item.start)):
            if item.end <= 0:
                continue  # all in the context, where other rules have judged it
            finding = self._finding(item)
            self.findings.append(finding)
            if finding.action == "block":
                self.blocked = finding
                return item.seen
            if finding.action == "redact":
                span = (finding.start, item.owner, finding.end, finding.rule.replacement)
                insort(self._spans, span)
                insort(self._covered, (finding.end, finding.start))
        return None

    def _finding(self, item: Found) -> Finding:
        rule = self._chain.rules[item.owner]
        matched = self._slice(item.start, item.end) if rule.kind != "length" else ""
        action = rule.action
        if (
            action == "flag"
            and rule.context
            and self._chain.block_rejected
            and self._is_rejected(rule.name, matched)
        ):
            action = "block"
        before = self._slice(max(item.start - EXCERPT_CHARACTERS, self._base), item.start)
        return Finding(rule, action, max(item.start, 0), item.end, matched, before)

    def _set_hold(self, end: int) -> None:
        hold = end
        for index in self._holding:
            hold = min(hold, self._matchers[index].hold)
        self.hold = max(hold, self.hold)

    def _slice(self, start: int, end: int) -> str:
        return self._text[max(start - self._base, 0) : max(end - self._base, 0)]

    def _forget(self) -> None:
        """Drop text that neither leaves nor is shown any more."""
        needed = min([self._released, *(matcher.hold for matcher in self._matchers)])
        surplus = needed - EXCERPT_CHARACTERS - self._base
        if surplus > 4 * EXCERPT_CHARACTERS:
            self._text = self._text[surplus:]
            self._base += surplus
