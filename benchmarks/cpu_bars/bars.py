"""The bars of the fused engine on a CPU, and what the recorded rounds say of each.

A ratio is formed inside each round, whose runs lie seconds apart, and its median is judged: ours is
ahead above 1, whatever the unit. FP32 must give the reference's tokens: where it does not, parity
is red and no speed is judged.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gptjet.benchmarks.cpu_bars.design import REFERENCE, Cell, CellKind, Race
from gptjet.benchmarks.cpu_bars.measure import Figures
from gptjet.benchmarks.cpu_bars.runner import Recorded
from gptjet.benchmarks.peers.contestants import ENGINE, SERVER
from gptjet.benchmarks.peers.experiment import Spread, spread

_LOWER_IS_BETTER = frozenset({"ttft_ms"})


class Verdict(enum.StrEnum):
    """How a bar came out."""

    PASS = "pass"
    MISS = "miss"
    PARITY_RED = "PARITY RED"
    NOT_MEASURED = "not measured"
    SHOWN = "shown"


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of the table.

    limit   the ratio asked for; None: the figure is only to be shown
    is_max  the ratio must not exceed the limit, instead of reaching it
    strict  equal is not enough
    """

    text: str
    model: str
    limit: float | None
    measured: str
    ratio: Spread | None
    verdict: Verdict
    note: str = ""
    is_max: bool = False
    strict: bool = False

    @property
    def asked(self) -> str:
        """The limit in words."""
        if self.limit is None:
            return "-"
        sign = "<=" if self.is_max else ">" if self.strict else ">="
        return f"{sign} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Bars:
    """Judges the rounds on file. `backend` is ours."""

    races: Sequence[Race]
    recorded: Recorded
    backend: str

    def all(self) -> Iterator[Bar]:
        """Every bar of the models that are raced."""
        raced = {race.model for race in self.races}
        yield from (bar for bar in self._bars() if bar.model in raced)

    def _bars(self) -> Iterator[Bar]:
        ours = f"{ENGINE}:{self.backend}"
        yield self.speed("W", f"{ours}/fp32", ["ctranslate2/fp32"], 0.98)
        yield self.speed("W", f"{ours}/int8", ["ctranslate2/int8"], 1.0)
        yield self.speed("W", f"{ours}/int4", ["ctranslate2/int8"], 1.4)
        yield self.speed("M", f"{ours}/fp32", ["ctranslate2/fp32"], 1.0, strict=True)
        peers = ["ctranslate2/int8", "openvino/int8"]
        yield self.speed("M", f"{ours}/int8", peers, 1.0, strict=True)
        yield self.speed("M", f"{ours}/int4", [f"{ours}/int8"], 1.0)
        # transformers by itself, and under our engine: what that costs is not theirs.
        transformers = ["transformers/fp32", f"{ENGINE}:{REFERENCE}/fp32"]
        yield self.speed("S", f"{ours}/fp32", transformers, 3.0)
        yield self.speed("S", f"{ours}/fp32", ["ctranslate2/fp32"], 1.0, strict=True)
        yield self.speed("S", f"{ours}/int8", ["ctranslate2/int8"], None)
        for weight_type in ("fp32", "int8"):
            for model in ("S", "M", "W"):
                yield self.prefill(model, f"{ours}/{weight_type}", f"ctranslate2/{weight_type}")
        for weight_type in ("fp32", "int8", "int4"):
            for model in ("M", "S"):
                limit = 3.0 if model == "M" else None
                yield self.streams(model, f"{ours}/{weight_type}", limit)
        for weight_type in ("fp32", "int8"):
            for model in ("M", "W", "S"):
                limit = None if model == "S" else 1.2
                pair = (f"{ours}/{weight_type}", f"ctranslate2/{weight_type}")
                yield self.memory(model, *pair, limit)
        for name in (ours, f"{SERVER}:{self.backend}", "ctranslate2"):
            yield self.under_load("S", f"{name}/fp32")
        for weight_type in ("fp32", "int8"):
            for model in ("M", "W", "S"):
                yield self.prefix(model, f"{ours}/{weight_type}")
        for weight_type in ("fp32", "int8", "int4"):
            yield self.chunks("M", f"{ours}/{weight_type}")
        for model in ("M", "S"):
            for option in ("", "+torch"):
                yield self.deterministic(model, f"{ours}{option}")

    def speed(
        self,
        model: str,
        ours: str,
        others: Sequence[str],
        limit: float | None,
        *,
        strict: bool = False,
    ) -> Bar:
        """Decode beside the better of some others."""
        text = f"decode, {ours} : {' or '.join(others)}"
        return self._against(
            text, model, CellKind.DECODE, "tokens_per_s", ours, others, limit, strict
        )

    def prefill(self, model: str, ours: str, other: str) -> Bar:
        """TTFT of a long prompt."""
        length = next((cell.input_tokens for _, cell in self._cells(model, CellKind.PREFILL)), 0)
        text = f"prefill of {length}, {ours} : {other}"
        return self._against(text, model, CellKind.PREFILL, "ttft_ms", ours, [other], 1.0, False)

    def streams(self, model: str, ours: str, limit: float | None) -> Bar:
        """All streams' tokens a second beside one stream's."""
        text = f"eight streams : one, {ours}"
        pair = ("many_tokens_per_s", "one_tokens_per_s")
        return self._within(text, model, CellKind.STREAMS, ours, pair, limit, "tok/s")

    def prefix(self, model: str, ours: str) -> Bar:
        """TTFT of the first request beside that of the second one with the same prefix."""
        length = next((cell.input_tokens for _, cell in self._cells(model, CellKind.PREFIX)), 0)
        text = f"TTFT first : second with a shared prefix of {length}, {ours}"
        pair = ("first_ttft_ms", "second_ttft_ms")
        return self._within(text, model, CellKind.PREFIX, ours, pair, 5.0, "ms")

    def under_load(self, model: str, name: str) -> Bar:
        """Decode with a busy process on each core beside decode without."""
        text = f"decode under load : quiet, {name}"
        pair = ("busy_tokens_per_s", "quiet_tokens_per_s")
        return self._within(text, model, CellKind.BUSY, name, pair, None, "tok/s")

    def chunks(self, model: str, ours: str) -> Bar:
        """How much longer a late prompt takes than any stream beside it waits for a token."""
        length = next((cell.input_tokens for _, cell in self._cells(model, CellKind.CHUNKS)), 0)
        text = f"TTFT of a prompt of {length} : longest ITL of streams beside it, {ours}"
        pair = ("late_ttft_ms", "longest_itl_ms")
        bar = self._within(text, model, CellKind.CHUNKS, ours, pair, None, "ms")
        rounds = self.rounds(model, CellKind.CHUNKS, ours).values()
        if not rounds:
            return bar
        quiet, beside = (
            spread([figures[name] for figures in rounds]).median
            for name in ("quiet_itl_ms", "itl_ms")
        )
        return replace(bar, note=f"ITL {quiet:.4g} ms before it, {beside:.4g} ms beside it")

    def deterministic(self, model: str, ours: str) -> Bar:
        """Eight streams of ours with --deterministic beside eight without."""
        return self._against(
            f"eight streams, {ours}+deterministic/fp32 : without",
            model,
            CellKind.COST,
            "many_tokens_per_s",
            f"{ours}+deterministic/fp32",
            [f"{ours}/fp32"],
            None,
            False,
        )

    def memory(self, model: str, ours: str, other: str, limit: float | None) -> Bar:
        """Peak memory of a process that decoded and prefilled."""
        text = f"peak memory, {ours} : {other}"
        own, theirs = self.peak_memory(model, ours), self.peak_memory(model, other)
        if own is None or theirs is None:
            missing = ours if own is None else other
            return self._not_measured(text, model, limit, missing, is_max=True)
        ratio = spread([own / theirs])
        measured = f"{own / 2**30:.2f} : {theirs / 2**30:.2f} GiB"
        return self._judged(text, model, limit, measured, ratio, is_max=True)

    # --- what is on file ---

    def rounds(self, model: str, kind: CellKind, name: str) -> dict[int, Figures]:
        """The figures of a contestant's rounds of a cell, by round."""
        found = {}
        for race, cell in self._cells(model, kind):
            for number in range(cell.rounds):
                figures = self.recorded.rounds.get((race.key, cell.key, number), {})
                if name in figures:
                    found[number] = figures[name]
        return found

    def peak_memory(self, model: str, name: str) -> int | None:
        """Most memory over the rounds of decode and prefill; several streams may hold more."""
        values = [
            figures["peak_memory_bytes"]
            for kind in (CellKind.DECODE, CellKind.PREFILL)
            for figures in self.rounds(model, kind, name).values()
            if figures["peak_memory_bytes"] is not None
        ]
        return max(values, default=None)

    def differing_rounds(self, model: str, name: str) -> int | None:
        """FP32 rounds whose tokens are not the reference's; None where nothing was compared."""
        reference = f"{ENGINE}:{REFERENCE}/fp32"
        compared = [
            figures["tokens"] != expected[number]["tokens"]
            for kind in (CellKind.DECODE, CellKind.PREFILL)
            for expected in [self.rounds(model, kind, reference)]
            for number, figures in self.rounds(model, kind, name).items()
            if number in expected
        ]
        return sum(compared) if compared else None

    def why_absent(self, model: str, name: str) -> str:
        """The recorded reason why a contestant has no figures."""
        for race in self.races:
            if race.model == model:
                for reasons in (self.recorded.absent, self.recorded.failures):
                    if (race.key, name) in reasons:
                        return f"{name}: {reasons[race.key, name]}"
        return f"{name}: no rounds on file"

    # --- judging ---

    def _against(
        self,
        text: str,
        model: str,
        kind: CellKind,
        figure: str,
        ours: str,
        others: Sequence[str],
        limit: float | None,
        strict: bool,
    ) -> Bar:
        own = self.rounds(model, kind, ours)
        if not own:
            return self._not_measured(text, model, limit, ours, strict=strict)
        best: tuple[Spread, str, str] | None = None
        missing = []
        for other in others:
            theirs = self.rounds(model, kind, other)
            both = [
                (own[number][figure], theirs[number][figure]) for number in own if number in theirs
            ]
            both = [(mine, other_s) for mine, other_s in both if mine and other_s]
            if not both:
                missing.append(self.why_absent(model, other))
                continue
            inverted = figure in _LOWER_IS_BETTER
            ratio = spread([b / a if inverted else a / b for a, b in both])
            medians = [spread([pair[side] for pair in both]).median for side in (0, 1)]
            unit = "ms" if inverted else "tok/s"
            measured = f"{medians[0]:.4g} : {medians[1]:.4g} {unit}"
            # The better peer is the one that ours is least ahead of.
            if best is None or ratio.median < best[0].median:
                best = ratio, measured, other
        if best is None:
            note = "; ".join(missing)
            return Bar(text, model, limit, "-", None, Verdict.NOT_MEASURED, note, strict=strict)
        ratio, measured, other = best
        notes = missing + ([f"the better one: {other}"] if len(others) > len(missing) + 1 else [])
        red, unchecked = self._parity(model, ours)
        if red:
            return Bar(text, model, limit, "-", None, Verdict.PARITY_RED, red, strict=strict)
        if limit is not None:
            notes += unchecked
        bar = self._judged(text, model, limit, measured, ratio, "; ".join(notes), strict=strict)
        # Ahead of those that are there says nothing of the one that is not.
        is_open = missing and bar.verdict is Verdict.PASS
        return replace(bar, verdict=Verdict.NOT_MEASURED) if is_open else bar

    def _parity(self, model: str, name: str) -> tuple[str, list[str]]:
        """Why no speed of ours may be judged, "" where it may; what to say of it beside."""
        is_ours = name.startswith((f"{ENGINE}:", f"{SERVER}:"))
        if not is_ours or not name.endswith("/fp32"):
            return "", []
        differing = self.differing_rounds(model, name)
        if differing:
            return f"{differing} rounds differ from {REFERENCE}'s tokens", []
        return "", ["parity not checked"] if differing is None else []

    def _within(
        self,
        text: str,
        model: str,
        kind: CellKind,
        name: str,
        pair: tuple[str, str],
        limit: float | None,
        unit: str,
    ) -> Bar:
        values = [
            (figures[pair[0]], figures[pair[1]])
            for figures in self.rounds(model, kind, name).values()
            if figures[pair[0]] and figures[pair[1]]
        ]
        if not values:
            return self._not_measured(text, model, limit, name)
        red, unchecked = self._parity(model, name)
        if red:
            return Bar(text, model, limit, "-", None, Verdict.PARITY_RED, red)
        medians = [spread([value[side] for value in values]).median for side in (0, 1)]
        measured = f"{medians[0]:.4g} : {medians[1]:.4g} {unit}"
        ratio = spread([a / b for a, b in values])
        note = "; ".join(unchecked if limit is not None else [])
        return self._judged(text, model, limit, measured, ratio, note)

    def _judged(
        self,
        text: str,
        model: str,
        limit: float | None,
        measured: str,
        ratio: Spread,
        note: str = "",
        *,
        is_max: bool = False,
        strict: bool = False,
    ) -> Bar:
        if limit is None:
            verdict = Verdict.SHOWN
        elif is_max:
            verdict = Verdict.PASS if ratio.median <= limit else Verdict.MISS
        else:
            holds = ratio.median > limit if strict else ratio.median >= limit
            verdict = Verdict.PASS if holds else Verdict.MISS
        return Bar(text, model, limit, measured, ratio, verdict, note, is_max, strict)

    def _not_measured(
        self,
        text: str,
        model: str,
        limit: float | None,
        missing: str,
        *,
        is_max: bool = False,
        strict: bool = False,
    ) -> Bar:
        note = self.why_absent(model, missing)
        return Bar(text, model, limit, "-", None, Verdict.NOT_MEASURED, note, is_max, strict)

    def _cells(self, model: str, kind: CellKind) -> Iterator[tuple[Race, Cell]]:
        for race in self.races:
            if race.model == model:
                yield from ((race, cell) for cell in race.cells if cell.kind is kind)
