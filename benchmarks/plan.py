"""Will a model fit a card, how many streams, how fast at best: all modelled, nothing measured.

One card, or two of them: as a tensor-parallel pair (each holds half of every matrix, and sums its
half with the other's in every layer) against two replicas (each holds the whole model).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptjet.benchmarks.config import ConfigError, load_config
from gptjet.benchmarks.environment import record_environment
from gptjet.benchmarks.geometry import Geometry, GeometryError, config_of, geometry_from_config
from gptjet.benchmarks.hardware import GIB, Hardware, measured_rates
from gptjet.benchmarks.roofline import (
    KV_CACHE_BYTES,
    WEIGHT_TYPES,
    Rates,
    WeightType,
    decode_work,
    kv_bytes_per_token,
    prefill_work,
    weight_bytes,
)

# CUDA context, cuBLAS workspace, activations and fragmentation: our allowance, no measurement.
DEFAULT_RESERVE_GIB = 1.0
_BLOCK_TOKENS = 16
# A block's row of scales must fit a head's row of bytes (gptjet.kernels.batch.MIN_INT8_HEAD_DIM).
_INT8_KV_HEAD_DIM = 64
_PROMPTS = (50, 200, 500, 1000, 2000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The modelled best of a placement; lists are (tokens, value). Empty where no rate is known.

    ttft_ms             by prompt length, one request alone
    tokens_per_s        by context length, one stream alone
    batch_tokens_per_s  of as many streams as fit (64 at most), each at half its context
    """

    basis: str
    bound: str
    ttft_ms: tuple[tuple[int, float], ...]
    tokens_per_s: tuple[tuple[int, float], ...]
    batch_streams: int
    batch_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A model on one or more cards. Bytes are of one card; tokens and streams of all together."""

    name: str
    cards: int
    fits: bool
    reason: str
    weight_bytes_per_card: int
    kv_bytes_per_card: int
    kv_tokens: int
    full_context_streams: int
    speed: Speed | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `gptjet plan` prints."""

    model: str
    model_type: str
    num_parameters: int
    card: str
    card_title: str
    weights: str
    kv_cache_dtype: str
    context: int
    memory_bytes_per_card: int
    reserve_bytes_per_card: int
    kv_bytes_per_token: int
    placements: tuple[Placement, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether any placement does."""
        return any(placement.fits for placement in self.placements)

    def as_json(self) -> dict[str, Any]:
        """Plain data, `fits` included."""
        return {"schema": 1, "fits": self.fits, **asdict(self)}


def make_plan(
    model: str,
    card: str,
    weights: str,
    *,
    kv_cache_dtype: str = "auto",
    context: int | None = None,
    cards: int = 1,
    reserve_gib: float = DEFAULT_RESERVE_GIB,
    bandwidth: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a model on a card of a configuration; `bandwidth` holds measured rates for a CPU.

    kv_cache_dtype  as `gptjet serve`'s: one of KV_CACHE_BYTES

    Raises ConfigError and GeometryError, one line each.
    """
    weight_type = WEIGHT_TYPES.get(weights)
    if weight_type is None:
        raise ConfigError(f"unknown weight type {weights!r}: {', '.join(WEIGHT_TYPES)}")
    if kv_cache_dtype not in KV_CACHE_BYTES:
        raise ConfigError(f"unknown KV cache dtype {kv_cache_dtype!r}: {', '.join(KV_CACHE_BYTES)}")
    weight_type = replace(weight_type, kv_bytes=KV_CACHE_BYTES[kv_cache_dtype])
    hardware = load_config(card).hardware
    geometry = geometry_from_config(config_of(model))
    if kv_cache_dtype == "int8" and geometry.head_dim < _INT8_KV_HEAD_DIM:
        raise GeometryError(
            f"{model}: an int8 KV cache needs heads of {_INT8_KV_HEAD_DIM} features or more, "
            f"these have {geometry.head_dim}"
        )
    length = context or geometry.max_context
    if length is None:
        raise GeometryError(f"{model}: its config.json names no context; give --context")
    notes = []
    if geometry.max_context is not None and length > geometry.max_context:
        notes.append(f"the context of {length} is beyond the model's own {geometry.max_context}")
    memory = _memory_bytes(hardware)
    rates = hardware.datasheet_rates(weight_type) or measured_rates(bandwidth, weight_type)
    if rates is None:
        notes.append("no rates are known for this hardware: --measure measures this machine's")
    if weight_type.matrix_rate not in hardware.matrix_tflops and hardware.matrix_tflops:
        notes.append(f"no {weight_type.matrix_rate} units: computed at the FP32 rate")
    if cards > 1 and hardware.interconnect is None and rates is not None:
        notes.append(
            f"no interconnect is known for {hardware.name}: what two of them exchange under tensor "
            f"parallel is taken to cost nothing"
        )
    reserve = int(reserve_gib * GIB)
    job = _Job(geometry, weight_type, hardware, rates, length, memory - reserve)
    placements = [job.single()]
    if cards == 2:
        placements += [job.tensor_parallel(2), job.replicas(2)]
    return Plan(
        model=model if "/" not in model else model.rstrip("/").rpartition("/")[2],
        model_type=geometry.model_type,
        num_parameters=geometry.num_parameters,
        card=hardware.name,
        card_title=hardware.title,
        weights=weight_type.name,
        kv_cache_dtype=kv_cache_dtype,
        context=length,
        memory_bytes_per_card=memory,
        reserve_bytes_per_card=reserve,
        kv_bytes_per_token=kv_bytes_per_token(geometry, weight_type),
        placements=tuple(placements),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True)
class _Job:
    geometry: Geometry
    weights: WeightType
    hardware: Hardware
    rates: Rates | None
    context: int
    usable_bytes: int

    def single(self) -> Placement:
        return self._place("one card", 1, 1)

    def tensor_parallel(self, cards: int) -> Placement:
        """Every matrix and every KV head split over the cards."""
        if self.geometry.num_kv_heads % cards:
            reason = f"{self.geometry.num_kv_heads} KV heads do not divide over {cards} cards"
            return self._unplaced("tensor parallel", cards, reason)
        return self._place("tensor parallel", cards, cards)

    def replicas(self, cards: int) -> Placement:
        """The whole model on each card: twice the streams, each as fast as on one."""
        one = self._place("replicas", 1, 1)
        speed = one.speed
        if speed is not None:
            speed = Speed(
                basis=speed.basis,
                bound=speed.bound,
                ttft_ms=speed.ttft_ms,
                tokens_per_s=speed.tokens_per_s,
                batch_streams=cards * speed.batch_streams,
                batch_tokens_per_s=cards * speed.batch_tokens_per_s,
            )
        return Placement(
            name="replicas",
            cards=cards,
            fits=one.fits,
            reason=one.reason,
            weight_bytes_per_card=one.weight_bytes_per_card,
            kv_bytes_per_card=one.kv_bytes_per_card,
            kv_tokens=cards * one.kv_tokens,
            full_context_streams=cards * one.full_context_streams,
            speed=speed,
        )

    def _place(self, name: str, cards: int, shards: int) -> Placement:
        held = math.ceil(weight_bytes(self.geometry, self.weights) / shards)
        free = self.usable_bytes - held
        per_token = kv_bytes_per_token(self.geometry, self.weights) / shards
        blocks = max(0, int(free / per_token) // _BLOCK_TOKENS)
        tokens = blocks * _BLOCK_TOKENS
        streams = tokens // self.context
        if free < 0:
            reason = f"the weights need {-free / GIB:.1f} GiB more than a card has"
        elif streams == 0:
            reason = f"the weights fit, a context of {self.context} does not: {tokens} tokens do"
        else:
            reason = ""
        return Placement(
            name=name,
            cards=cards,
            fits=streams > 0,
            reason=reason,
            weight_bytes_per_card=held,
            kv_bytes_per_card=max(0, free),
            kv_tokens=tokens,
            full_context_streams=streams,
            speed=self._speed(shards, streams) if free >= 0 else None,
        )

    def _unplaced(self, name: str, cards: int, reason: str) -> Placement:
        return Placement(
            name=name,
            cards=cards,
            fits=False,
            reason=reason,
            weight_bytes_per_card=0,
            kv_bytes_per_card=0,
            kv_tokens=0,
            full_context_streams=0,
            speed=None,
        )

    def _speed(self, shards: int, streams: int) -> Speed | None:
        if self.rates is None:
            return None
        rates = Rates(
            shards * self.rates.bandwidth_gb_s, shards * self.rates.matrix_tflops, self.rates.basis
        )
        prompts = [tokens for tokens in _PROMPTS if tokens < self.context]
        contexts = sorted({1, self.context // 2, self.context})
        streams = max(1, min(64, streams))

        def step_ms(tokens: float, batch: int) -> float:
            work = decode_work(self.geometry, self.weights, tokens, batch)
            return work.time_ms(rates) + self._reduce_ms(shards, batch)

        return Speed(
            basis=self.rates.basis,
            bound=decode_work(self.geometry, self.weights, self.context).bound(rates),
            ttft_ms=tuple(
                (
                    tokens,
                    prefill_work(self.geometry, self.weights, tokens).time_ms(rates)
                    + self._reduce_ms(shards, tokens),
                )
                for tokens in prompts
            ),
            tokens_per_s=tuple((tokens, 1000 / step_ms(tokens, 1)) for tokens in contexts),
            batch_streams=streams,
            batch_tokens_per_s=1000 * streams / step_ms(self.context / 2, streams),
        )

    def _reduce_ms(self, shards: int, tokens: int) -> float:
        """Summing halves over the cards: each layer's all-reduces of `tokens` hidden vectors."""
        link = self.hardware.interconnect
        if shards == 1 or link is None:
            return 0.0
        size = tokens * self.geometry.hidden_size * self.weights.activation_bytes
        # A ring of n sends 2 (n - 1) / n of the data over each link.
        moving = 2 * (shards - 1) / shards * size / (link.gb_s * 1e9)
        count = self.geometry.num_layers * self.geometry.reduces_per_layer
        return 1000 * count * (moving + link.latency_us * 1e-6)


def describe(plan: Plan) -> Sequence[str]:
    """The plan as lines of text."""
    lines = [
        f"{plan.model} ({plan.model_type}, {plan.num_parameters / 1e9:.2f}e9 parameters) in "
        f"{plan.weights} on {plan.card} ({plan.card_title}), context {plan.context}",
        f"card memory {plan.memory_bytes_per_card / GIB:.1f} GiB, "
        f"{plan.reserve_bytes_per_card / GIB:.1f} GiB of it kept free; "
        f"KV cache {plan.kv_bytes_per_token / 1024:g} KiB a token"
        + ("" if plan.kv_cache_dtype == "auto" else f" in {plan.kv_cache_dtype}"),
    ]
    for placement in plan.placements:
        lines += ["", *_describe_placement(placement)]
    lines += ["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []
    return [*lines, "", "All of it is modelled: a ceiling to design by, not a measurement."]


def _describe_placement(placement: Placement) -> list[str]:
    many = f" x {placement.cards}" if placement.cards > 1 else ""
    verdict = "fits" if placement.fits else f"does not fit: {placement.reason}"
    lines = [
        f"{placement.name}{many}: {verdict}",
        f"  weights                {placement.weight_bytes_per_card / GIB:8.2f} GiB a card",
        f"  KV cache               {placement.kv_tokens:8d} tokens",
        f"  full-context streams   {placement.full_context_streams:8d}",
    ]
    speed = placement.speed
    if speed is None:
        return lines
    ttft = ", ".join(f"{ms:.1f} ms at {tokens}" for tokens, ms in speed.ttft_ms)
    alone = ", ".join(f"{rate:.1f} at {tokens}" for tokens, rate in speed.tokens_per_s)
    return [
        *lines,
        f"  best TTFT              {ttft} prompt tokens",
        f"  best tokens/s, alone   {alone} context tokens",
        f"  best tokens/s, batch   {speed.batch_tokens_per_s:.0f} with {speed.batch_streams} "
        f"streams at half their context",
        f"  rates from             {speed.basis}; a step is bound by {speed.bound}",
    ]


def _memory_bytes(hardware: Hardware) -> int:
    memory = hardware.memory_gib or record_environment()["memory_gib"]
    if memory is None:
        raise ConfigError(f"{hardware.name}: memory_gib is not set and cannot be read here")
    return int(float(memory) * GIB)
