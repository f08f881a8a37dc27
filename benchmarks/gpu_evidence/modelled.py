"""What the kernels would reach on cards that are not at hand: a model, written as a table.

    python -m gptjet.benchmarks.gpu_evidence.modelled --evidence RESULT.json

A decode step is taken to be its launches one after the other: bytes of each kernel over the
bandwidth that it gets, plus a gap between two nodes of a CUDA graph. The bandwidth is the card's
datasheet bandwidth, times what of it a copy reaches, times the kernel's share of a copy. Shares
come from a result file of `make gpu-evidence`; until there is one they are assumptions, and the
table says which. Nothing that this writes was measured on the cards that it is about.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjet.benchmarks.files import write_atomically
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.gpu.tuning import CARDS

# Bytes a weight, with its share of the scales: one float32 a row, one float16 a group of 128.
_BYTES = {"float16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
_NAMES = {"float16": "FP16", "int8": "INT8", "int4": "INT4"}
# The goals of the published cards, tokens/s at batch 1.
GOALS = {(75, "float16"): 22, (70, "float16"): 63, (75, "int8"): 40, (70, "int8"): 115}
_MODELLED_CARDS = (75, 70)
# Tokens that the sequence has: the middle of the published experiment's 50 in, 200 out.
_CONTEXT = 150

# Assumptions, each replaced by what an evidence file has of it.
_ASSUMED_SHARE = 0.9
# Of the datasheet's bandwidth, by a copy: about 3,000 of 3,350 GB/s on an H100. Whether a T4's
# GDDR6 or a V100's HBM2 gives as much is not known here: the table says what each goal would need.
_ASSUMED_COPY = 0.9
# Between the end of one node of a graph and the start of the next.
_ASSUMED_GAP_US = 1.0
# embed, and a layer's rotary + KV write, attention's two launches and two weight passes; lm_head,
# and greedy sampling's two.
_LAUNCHES = 1 + 5 * GPT_J_6B.num_layers + 3


class EvidenceError(Exception):
    """The file is not a result of `make gpu-evidence` on a card; the message is one line."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of the copy's bandwidth; `source` says where from."""

    value: float
    source: str

    @property
    def is_assumed(self) -> bool:
        """Whether nobody has measured it."""
        return self.source == "assumed"


@dataclass(frozen=True, slots=True)
class Shares:
    """By (kernel part, weight type): w_in, w_out, lm_head; and attention."""

    passes: Mapping[tuple[str, str], Share]
    attention: Share
    copy: Share


@dataclass(frozen=True, slots=True)
class Modelled:
    """A card and a weight type. All of it is modelled; needed_share is what the goal asks for."""

    capability: int
    weight_type: str
    ceiling_tokens_per_s: float
    tokens_per_s: float
    goal: int | None
    needed_share: float | None


def read_shares(evidence: Mapping[str, Any] | None) -> Shares:
    """Shares of the kernels' batch 1 launches, those that are missing or red assumed.

    Raises EvidenceError for a file that is not of a card.
    """
    assumed = Share(_ASSUMED_SHARE, "assumed")
    passes = {(part, kind): assumed for part in ("w_in", "w_out", "lm_head") for kind in _BYTES}
    attention = assumed
    # A share of the card at hand's datasheet: another card's memory may give another one.
    copy = Share(_ASSUMED_COPY, "assumed")
    if evidence is None:
        return Shares(passes, attention, copy)
    records = _records_of(evidence)
    bandwidth = next((record for record in records if record.get("kind") == "bandwidth"), None)
    if bandwidth is None or bandwidth.get("device") in (None, "cpu"):
        raise EvidenceError("the evidence has no bandwidth of a card: it was not run on one")
    source = f"measured on {bandwidth['device']}"
    for record in records:
        if record.get("kind") != "kernel" or record.get("red", True) or record.get("rows") != 1:
            continue
        # A share above 1 would be a cache's: reading alone can beat a copy by a little.
        share = Share(min(float(record["share_of_copy"]), 1.0), source)
        part, _, rest = str(record["case"]).partition(" ")
        key = (part, rest.partition(",")[0])
        if key in passes:
            passes[key] = share
        elif record["kernel"] == "paged_attention" and part == "float16":
            attention = share
    return Shares(passes, attention, copy)


def _records_of(evidence: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if evidence.get("kind") != "gpu-evidence" or not isinstance(evidence.get("stages"), list):
        raise EvidenceError("not a result file of gpu-evidence")
    return [record for stage in evidence["stages"] for record in stage.get("records", [])]


def model_card(capability: int, weight_type: str, shares: Shares) -> Modelled:
    """Tokens/s at batch 1: see the module."""
    datasheet = CARDS[capability].bandwidth_gb_s * 1e9
    copy = datasheet * shares.copy.value
    parts = _bytes_by_part(_BYTES[weight_type])
    gaps_s = _LAUNCHES * _ASSUMED_GAP_US / 1e6
    kv = 2 * 2 * GPT_J_6B.num_layers * GPT_J_6B.num_heads * GPT_J_6B.head_dim * _CONTEXT
    seconds = kv / (copy * shares.attention.value) + gaps_s
    for part, moved in parts.items():
        seconds += moved / (copy * shares.passes[part, weight_type].value)
    total = sum(parts.values()) + kv
    goal = GOALS.get((capability, weight_type))
    needed = None if goal is None else total / (1 / goal - gaps_s) / datasheet
    return Modelled(capability, weight_type, datasheet / total, 1 / seconds, goal, needed)


def _bytes_by_part(bytes_a_weight: float) -> dict[str, float]:
    """That a decode step reads of each kind of weight pass."""
    sizes = GPT_J_6B
    hidden, width = sizes.hidden_size, sizes.num_heads * sizes.head_dim
    layers = sizes.num_layers
    return {
        "w_in": bytes_a_weight * layers * hidden * (3 * width + sizes.inner_size),
        "w_out": bytes_a_weight * layers * hidden * (width + sizes.inner_size),
        "lm_head": bytes_a_weight * hidden * sizes.vocab_size,
    }


def render(shares: Shares) -> str:
    """The page."""
    rows = [model_card(card, kind, shares) for card in _MODELLED_CARDS for kind in _BYTES]
    lines = [
        "# Modelled: GPT-J-6B decoding on T4 and V100",
        "",
        "**Every figure on this page is modelled. None was measured on these cards.** Written by",
        "`python -m gptjet.benchmarks.gpu_evidence.modelled`; do not edit. What was measured",
        "stands in `benchmarks/results`.",
        "",
        f"Batch 1, {_CONTEXT} tokens of context, FP16 KV cache, one CUDA graph a step. The ceiling "
        "is the bytes",
        "of a step over the datasheet's bandwidth.",
        "",
        "| card | weights | ceiling tok/s (modelled) | decode tok/s (modelled) | goal tok/s "
        "| of the datasheet's bandwidth that the goal needs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        card = CARDS[row.capability]
        goal = "-" if row.goal is None else str(row.goal)
        needed = "-" if row.needed_share is None else f"{100 * row.needed_share:.0f} %"
        lines.append(
            f"| {card.name}, {card.bandwidth_gb_s:g} GB/s | {_NAMES[row.weight_type]} "
            f"| {row.ceiling_tokens_per_s:.1f} | {row.tokens_per_s:.1f} | {goal} | {needed} |"
        )
    lines += [
        "",
        "## What it is modelled from",
        "",
        "| share | value | source |",
        "|---|---|---|",
        f"| copy, of the datasheet's bandwidth | {shares.copy.value:.3f} | {shares.copy.source} |",
        f"| attention, of the copy | {shares.attention.value:.3f} | {shares.attention.source} |",
    ]
    lines += [
        f"| {part} {_NAMES[kind]}, of the copy | {share.value:.3f} | {share.source} |"
        for (part, kind), share in shares.passes.items()
    ]
    lines += [
        f"| between two of {_LAUNCHES} launches of a step | {_ASSUMED_GAP_US:g} us | assumed |",
        "",
        "A share that was measured on one card is taken to hold on another, which is itself an",
        "assumption: INT8 and INT4 are unpacked by arithmetic, of which older cards have less for",
        "each byte that they read. So is the copy's share of the datasheet's bandwidth.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written, 2 the evidence cannot be used."""
    parser = argparse.ArgumentParser(description="the modelled T4 and V100 table")
    parser.add_argument("--evidence", type=Path, help="a result file; without: all is assumed")
    parser.add_argument("--output", type=Path, default=Path("docs") / "modelled-cards.md")
    flags = parser.parse_args(arguments)
    try:
        evidence = None
        if flags.evidence is not None:
            evidence = json.loads(flags.evidence.read_text(encoding="utf-8"))
        text = render(read_shares(evidence))
    except (OSError, ValueError, EvidenceError) as error:
        print(f"{flags.evidence}: {error}", file=sys.stderr)
        return 2
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(flags.output, text)
    print(f"written to {flags.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
