"""The goals on a card, each judged from what was measured in the same run, or not judged at all."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptjet.benchmarks.gpu_evidence.stages import BATCHES, STREAM_CELL
from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.gpu.compile_case import GPT_J_6B

Record = dict[str, Any]

PASS, MISS, NOT_MEASURED = "PASS", "MISS", "not measured"

# What one stream at a time is judged by, and what the first token after a long prompt.
_CELL = (50, 200)
_LONG_CELL = (1000, 50)


@dataclass(frozen=True, slots=True)
class Bar:
    """A goal: `value` must be at least (`at_most`: at most) `goal`; None where not measured."""

    name: str
    goal: float
    value: float | None
    unit: str = "x"
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """PASS, MISS, or that nothing was measured."""
        if self.value is None:
            return NOT_MEASURED
        return (
            PASS if (self.value <= self.goal if self.at_most else self.value >= self.goal) else MISS
        )


def judge_bars(records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """One record a bar. Only times of GPT-J-6B's geometry, of kernels that ran on a card, count."""
    found = _Found(records)
    fp16 = found.tokens_per_s("fused-float16", _CELL)
    streams = _ratio(
        found.streams_tokens_per_s(BATCHES[-1]), found.tokens_per_s("huggingface", STREAM_CELL)
    )
    bars = (
        Bar("FP16, batch 1: share of the copy bandwidth", 0.9, found.share_of_copy(), ""),
        Bar(
            "FP16, batch 1, over DeepSpeed",
            1.5,
            _ratio(fp16, found.tokens_per_s("deepspeed", _CELL)),
        ),
        Bar(
            "FP16, batch 1, over HF eager",
            4.0,
            _ratio(fp16, found.tokens_per_s("huggingface", _CELL)),
        ),
        Bar("INT8 over FP16", 1.8, _ratio(found.tokens_per_s("fused-int8", _CELL), fp16)),
        Bar("INT4 over FP16", 3.0, _ratio(found.tokens_per_s("fused-int4", _CELL), fp16)),
        Bar("32 streams of 512 / 128 over HF one at a time", 15.0, streams),
        Bar("TTFT at 1,000 tokens over its floor", 1.3, found.ttft_over_floor(), at_most=True),
        Bar("gRPC adds, a token", 0.2, found.grpc_ms(), "ms", at_most=True),
    )
    return [
        {
            "bar": bar.name,
            "goal": bar.goal,
            "at_most": bar.at_most,
            "value": None if bar.value is None else round(bar.value, 4),
            "unit": bar.unit,
            "verdict": bar.verdict,
        }
        for bar in bars
    ]


def bars_table(bars: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal."""
    lines = [f"{'goal':<48}{'asked':>10}{'measured':>14}  verdict"]
    for bar in bars:
        sign = "<=" if bar["at_most"] else ">="
        measured = "-" if bar["value"] is None else f"{bar['value']:.3f} {bar['unit']}".strip()
        goal = f"{sign} {bar['goal']:g}"
        lines.append(f"{bar['bar']:<48}{goal:>10}{measured:>14}  {bar['verdict']}")
    return "\n".join(lines)


def weight_pass_bytes(geometry: BlockGeometry, bytes_a_weight: float) -> float:
    """Of all weights that a decode step reads: the blocks' matrices and lm_head."""
    hidden, width = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    block = hidden * (3 * width + geometry.inner_size) + hidden * (width + geometry.inner_size)
    return bytes_a_weight * (geometry.num_layers * block + geometry.vocab_size * hidden)


def prefill_flops(geometry: BlockGeometry, tokens: int) -> float:
    """Of a prompt: two a weight and token, causal attention, and the last token's logits."""
    weights = weight_pass_bytes(geometry, 1.0) - geometry.vocab_size * geometry.hidden_size
    width = geometry.num_heads * geometry.head_dim
    pairs = tokens * (tokens + 1) / 2
    attention = 4 * geometry.num_layers * width * pairs
    return 2 * tokens * weights + attention + 2 * geometry.vocab_size * geometry.hidden_size


class _Found:
    """What the records hold of GPT-J-6B on a card."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._records = records
        # A CPU's times (interpreted kernels, transformers on two cores) are no evidence.
        self._on_card = {
            record["backend"]
            for record in records
            if record["kind"] == "model"
            and record.get("geometry") == "gpt-j-6b"
            and not str(record.get("device", "cpu")).startswith("cpu")
        }

    def tokens_per_s(self, backend: str, cell: tuple[int, int]) -> float | None:
        record = self._cell(backend, cell)
        return None if record is None else statistics.median(record["tokens_per_s"])

    def share_of_copy(self) -> float | None:
        """Bytes of weights and KV over the time between tokens, of what a copy moves."""
        record, copy = self._cell("fused-float16", _CELL), self._bandwidth("copy_gb_s")
        if record is None or copy is None:
            return None
        itl_ms = statistics.median(ms for run in record["itl_ms"] for ms in run)
        context = _CELL[0] + _CELL[1] / 2
        sizes = GPT_J_6B
        kv = 2 * 2 * sizes.num_layers * sizes.num_heads * sizes.head_dim * context
        moved = weight_pass_bytes(sizes, 2.0) + kv
        return float(moved / (itl_ms / 1000) / 1e9 / copy)

    def ttft_over_floor(self) -> float | None:
        """The floor: the prompt's arithmetic at the rate that a large product was measured at."""
        record, rate = self._cell("fused-float16", _LONG_CELL), self._bandwidth("matrix_tflops")
        if record is None or rate is None:
            return None
        floor_ms = 1000 * prefill_flops(GPT_J_6B, _LONG_CELL[0]) / (rate * 1e12)
        return float(statistics.median(record["ttft_ms"]) / floor_ms)

    def streams_tokens_per_s(self, streams: int) -> float | None:
        rates = [
            record["tokens_per_s"]
            for record in self._of("serving")
            if record["path"] == "engine"
            and record["streams"] == streams
            and (record["input_tokens"], record["output_tokens"]) == STREAM_CELL
        ]
        return statistics.median(rates) if rates else None

    def grpc_ms(self) -> float | None:
        costs = [record["added_ms_per_token"] for record in self._of("grpc_cost")]
        return costs[-1] if costs else None

    def _cell(self, backend: str, cell: tuple[int, int]) -> Mapping[str, Any] | None:
        for record in self._of("cell"):
            lengths = (record["input_tokens"], record["output_tokens"])
            if record["backend"] == backend and lengths == cell:
                return record
        return None

    def _bandwidth(self, name: str) -> float | None:
        for record in self._records:
            if record["kind"] == "bandwidth" and record["device"] != "cpu":
                return float(record[name])
        return None

    def _of(self, kind: str) -> list[Mapping[str, Any]]:
        return [
            record
            for record in self._records
            if record["kind"] == kind and record.get("backend") in self._on_card
        ]


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
