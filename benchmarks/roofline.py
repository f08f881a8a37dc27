"""The floor under a request's latency: the bytes that must move and the FLOPs that must be done.

A step cannot be faster than its bytes at the memory's bandwidth, nor than its FLOPs at the matrix
units' rate (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009). Everything here is
modelled; what was measured stands elsewhere and never in the same column.

Counted: each weight matrix once a step, the KV cache of the context once, the new token's KV once.
Left out, which keeps a floor a floor: activations, sampling, launches, the network, row scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gptjet.benchmarks.geometry import Geometry


@dataclass(frozen=True, slots=True)
class WeightType:
    """How the matrices are stored. Vectors and embeddings have the activations' type.

    weight_bytes      bytes a weight, group scales included
    activation_bytes  bytes an element of activations, vectors and embedding tables
    matrix_rate       which matrix rate of the hardware computes it: weight-only quantisation
                      computes in the activations' type
    kv_bytes          bytes an element of KV cache; None: as the activations
    """

    name: str
    weight_bytes: float
    activation_bytes: int
    matrix_rate: str
    kv_bytes: float | None = None

    @property
    def kv_element_bytes(self) -> float:
        """Bytes an element of KV cache, its share of the scales included."""
        return self.activation_bytes if self.kv_bytes is None else self.kv_bytes


# INT4: one FP16 scale for each group of 128 weights, the usual choice of GPTQ and AWQ.
_INT4_GROUP = 128

WEIGHT_TYPES: dict[str, WeightType] = {
    "fp32": WeightType("fp32", 4.0, 4, "fp32"),
    "bf16": WeightType("bf16", 2.0, 2, "bf16"),
    "fp16": WeightType("fp16", 2.0, 2, "fp16"),
    "int8": WeightType("int8", 1.0, 2, "fp16"),
    "int4": WeightType("int4", 0.5 + 2 / _INT4_GROUP, 2, "fp16"),
}

# INT8: a row of scales beside every 16 tokens' rows (gptjet.kernels.batch.INT8_KV_ROWS).
KV_CACHE_BYTES: dict[str, float | None] = {
    "auto": None,
    "float16": 2.0,
    "float32": 4.0,
    "int8": 17 / 16,
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine can do. `basis` says where from: "datasheet" or "measured"."""

    bandwidth_gb_s: float
    matrix_tflops: float
    basis: str


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that move and floating-point operations of one step."""

    num_bytes: float
    flops: float

    def time_ms(self, rates: Rates) -> float:
        """The longer of moving and computing: both at once, at best."""
        moving = self.num_bytes / (rates.bandwidth_gb_s * 1e9)
        computing = self.flops / (rates.matrix_tflops * 1e12)
        return 1000 * max(moving, computing)

    def bound(self, rates: Rates) -> str:
        """Which of the two decides: "bandwidth" or "compute"."""
        moving = self.num_bytes / (rates.bandwidth_gb_s * 1e9)
        return "bandwidth" if moving >= self.flops / (rates.matrix_tflops * 1e12) else "compute"


@dataclass(frozen=True, slots=True)
class Floor:
    """The modelled lower bound of one request at batch 1; `bound` is what decides a decode step."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    basis: str
    bound: str


def weight_bytes(geometry: Geometry, weights: WeightType) -> float:
    """Bytes all weights occupy in memory."""
    vectors = geometry.num_layers * geometry.layer_vector_parameters + geometry.other_parameters
    return weights.weight_bytes * _matrix_parameters(geometry) + weights.activation_bytes * (
        vectors + geometry.embedding_parameters
    )


def streamed_bytes(geometry: Geometry, weights: WeightType) -> float:
    """Bytes of weights a step reads: all but the embedding tables."""
    tables = weights.activation_bytes * geometry.embedding_parameters
    return weight_bytes(geometry, weights) - tables


def kv_bytes_per_token(geometry: Geometry, weights: WeightType) -> int:
    """Bytes of KV cache a token needs over all layers."""
    return math.ceil(geometry.kv_elements_per_token * weights.kv_element_bytes)


def prefill_work(geometry: Geometry, weights: WeightType, prompt_tokens: int) -> Work:
    """One prompt of `prompt_tokens` through the model, up to the logits of its last position."""
    kv = kv_bytes_per_token(geometry, weights) * prompt_tokens
    matrices = 2 * prompt_tokens * geometry.num_layers * geometry.layer_matrix_parameters
    # Causal: position i attends to i positions, two products of 2 FLOPs an element each.
    pairs = prompt_tokens * (prompt_tokens + 1) // 2
    attention = 4 * geometry.num_layers * geometry.num_heads * geometry.head_dim * pairs
    head = 2 * geometry.head_parameters
    return Work(streamed_bytes(geometry, weights) + kv, matrices + attention + head)


def decode_work(
    geometry: Geometry, weights: WeightType, context_tokens: float, batch_size: int = 1
) -> Work:
    """One step of `batch_size` sequences, each with `context_tokens` after it (its new one too)."""
    kv = kv_bytes_per_token(geometry, weights) * context_tokens
    matrices = 2 * _matrix_parameters(geometry)
    width = geometry.num_heads * geometry.head_dim
    attention = 4 * geometry.num_layers * width * context_tokens
    return Work(
        streamed_bytes(geometry, weights) + batch_size * kv, batch_size * (matrices + attention)
    )


def request_floor(
    geometry: Geometry, weights: WeightType, rates: Rates, input_tokens: int, output_tokens: int
) -> Floor:
    """The floor of a request alone on the machine: a prefill, then a step a further token."""
    ttft_ms = prefill_work(geometry, weights, input_tokens).time_ms(rates)
    contexts = range(input_tokens + 1, input_tokens + output_tokens)
    decode_ms = sum(decode_work(geometry, weights, tokens).time_ms(rates) for tokens in contexts)
    last = decode_work(geometry, weights, input_tokens + output_tokens)
    return Floor(
        ttft_ms=ttft_ms,
        tpot_ms=decode_ms / len(contexts) if contexts else 0.0,
        e2e_ms=ttft_ms + decode_ms,
        basis=rates.basis,
        bound=last.bound(rates),
    )


def matrix_rate(weights: WeightType, tflops: Mapping[str, float]) -> float | None:
    """The rate that computes these weights, of a table by type; None where the table has none.

    A machine without BF16 or FP16 units computes those by conversion, at FP32's rate.
    """
    return tflops.get(weights.matrix_rate, tflops.get("fp32"))


def _matrix_parameters(geometry: Geometry) -> int:
    return geometry.num_layers * geometry.layer_matrix_parameters + geometry.head_parameters
